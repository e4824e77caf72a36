"""The rows of a run as model inputs of student and teacher, aligned by their answer tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch.utils.data import Dataset

from vlsi_fast.config_data import DataConfig
from vlsi_fast.data.alignment import pair_tokens
from vlsi_fast.data.encoding import IGNORED, configure_image_bounds, encode
from vlsi_fast.data.images import check_pixels, load_image
from vlsi_fast.data.messages import Sample
from vlsi_fast.data.shared_images import SharedImages, share_images
from vlsi_fast.data.skipped import SpecialTokenError, UnusableRow
from vlsi_fast.data.sources import ConcatSource
from vlsi_fast.data.storage import retried
from vlsi_fast.data.tokens import shared_tokens
from vlsi_fast.errors import UserError

ROLES = ("student", "teacher")
MAX_TRIES = 1000
"""Rows tried in a row before the dataset gives up."""
MAX_MISMATCHES = 8
"""Rows whose answers differ between the roles, before any row's agree: then templates or tokenizers are to blame."""


class AnswerMismatchError(UserError, ValueError):
    """Teacher and student would be compared on different answer tokens."""

    exit_code = 1
    of_one_rank = True


class NoUsableRowError(UserError, RuntimeError):
    """No row could be used among all those tried."""

    exit_code = 1
    of_one_rank = True


class VlsiDataset(Dataset):
    """Map-style: row -> `{"id", "student", "teacher", "skipped", "answered", "unaligned"}`, the roles being those of
    `processors`.

    A row that cannot be used is replaced by the next usable one, and noted in the "skipped" list of the row returned.

    Args:
        sources: the rows, from `build_source`.
        processors: "student", "teacher" or both -> that model's processor. The config's pixel bounds are set on them.
        data_config: bounds on tokens and pixels.
        taught: gives what a teacher that is not here said to a row (`teacher_cache.recalling.Said`), from the sample
            and all of the student's labels; it is then in the row as `taught`.
        translated: the teacher speaks the student's tokens. Where the tokenizers of both roles cannot be compared token
            by token (`shared_tokens`), answers are aligned by their bytes (`alignment.py`): both roles' labels are the
            student's tokens that the teacher has a state for, the teacher's where that state is.

    Raises:
        ValueError: no role or an unknown one, pixel bounds that a processor does not have, or `translated` without a
            student to translate for.
    """

    def __init__(
        self,
        sources: ConcatSource,
        processors: dict,
        data_config: DataConfig,
        taught: Callable | None = None,
        translated: bool = False,
    ):
        unknown = set(processors) - set(ROLES)
        if unknown or not processors:
            raise ValueError(f"processors has the roles {sorted(processors)}; use one or both of {', '.join(ROLES)}")
        self.sources = sources
        self.processors = dict(processors)
        self.data_config, self._taught = data_config, taught
        for processor in self.processors.values():
            configure_image_bounds(processor, data_config.min_pixels, data_config.max_pixels)
        self.shared = len(processors) == 2 and equivalent(*self.processors.values())
        self.images: SharedImages | None = None
        if len(processors) == 2 and not self.shared:
            self.processors, self.images = share_images(self.processors)
        if translated and "student" not in processors:
            raise ValueError("translated answers are the student's tokens; give the student's processor as well")
        self.translated = translated and len(processors) == 2 and not comparable(processors)
        self._aligned = False  # whether the roles have agreed on a row's answer tokens

    def __len__(self) -> int:
        return len(self.sources)

    @retried
    def __getitem__(self, index: int) -> dict:
        """Row `index`, or the next usable one.

        Returns:
            `id`: the row used; each role's inputs as `encode` returns them (the same object for both roles where their
            processors are equivalent, the same vision tensors where their image processors agree); `skipped`:
            records of the rows passed over, as `ConcatSource.skip_record` makes them; `answered`: whether a model wrote
            the row's answers; `unaligned`: how many of the student's answer tokens have no state of the teacher and are
            left out of its labels; `whole`: where answers are aligned, the student's labels with those.

        Raises:
            AnswerMismatchError: the roles' answer tokens differ in `MAX_MISMATCHES` rows, or in all that can be used,
                and have not agreed in any row yet.
            NoUsableRowError: `MAX_TRIES` rows, or all there are, cannot be used.
            SpecialTokenError: a row's text holds a special token and `data.special_tokens` is error.
            StorageError: the file system failed, again and again.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        skipped, mismatches = [], []
        for offset in range(min(len(self), MAX_TRIES)):
            at = (index + offset) % len(self)
            try:
                sample = self.sources[at]
                answered = sample.answered_by is not None
                return {"id": sample.id, **self._encode(sample), "skipped": skipped, "answered": answered}
            except AnswerMismatchError as error:
                mismatches.append(error)
                if not self._aligned and len(mismatches) == MAX_MISMATCHES:
                    raise mismatches[0] from None
                skipped.append(self.sources.skip_record(at, UnusableRow("answer_mismatch", str(error))))
            except UnusableRow as error:
                skipped.append(self.sources.skip_record(at, error))
                if error.cause == "special_token" and self.data_config.special_tokens == "error":
                    raise SpecialTokenError(special_token_message(skipped[-1])) from error
        if mismatches and not self._aligned:
            raise mismatches[0]
        counts = ", ".join(f"{cause} {n}" for cause, n in Counter(row["cause"] for row in skipped).most_common())
        raise NoUsableRowError(
            f"none of {len(skipped)} rows from row {index} on can be used: {counts}. "
            f"First: {skipped[0]['id']}: {skipped[0]['cause']}: {skipped[0]['detail']}"
        )

    def _encode(self, sample: Sample) -> dict[str, Any]:
        data = self.data_config
        check_pixels(sample.images, data.max_image_pixels, data.max_row_pixels)
        loader = lru_cache(maxsize=None)(partial(load_image, max_image_pixels=data.max_image_pixels))
        rows = {}
        try:
            for role, processor in self.processors.items():
                if self.shared and rows:
                    rows[role] = next(iter(rows.values()))
                else:
                    rows[role] = encode(sample, processor, data, loader, with_answers=self.translated)
        finally:
            if self.images is not None:
                self.images.forget()
        whole, kept = rows["student"]["labels"] if "student" in rows else None, None
        if self.translated:
            kept = align_answers(sample.id, rows)
            self._aligned = True
        elif len(rows) == 2 and not self.shared:
            check_same_answers(sample.id, rows, self.processors)
            self._aligned = True
        if self._taught is not None:
            rows["taught"] = self._taught(sample, whole)
            self._aligned, kept = True, rows["taught"].kept
        rows["unaligned"] = 0
        if kept is not None:
            rows["student"]["labels"], rows["whole"] = keep_answers(whole, kept), whole
            rows["unaligned"] = int((whole != IGNORED).sum()) - len(kept)
        return rows


def special_token_message(record: dict) -> str:
    """What to tell where a row of that record ends the run."""
    place = f"{record['file']}:{record['line']}" if "line" in record else record["file"]
    return (
        f"row {record['id']} ({place}): {record['detail']}. data.special_tokens is error: repair the row, or set it to "
        "text (such tokens are read as text) or skip"
    )


def equivalent(first, second) -> bool:
    """Whether two processors make the same model inputs: same class, settings, tokenizer and chat template."""
    if first is second:
        return True
    if type(first) is not type(second) or first.to_dict() != second.to_dict():
        return False
    one, other = first.tokenizer, second.tokenizer
    return (
        (first.chat_template or one.chat_template) == (second.chat_template or other.chat_template)
        and one.get_vocab() == other.get_vocab()
        and one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
    )


def comparable(processors: dict) -> bool:
    """Whether the tokenizers of two roles' processors can be compared token by token."""
    return shared_tokens(*(processors[role].tokenizer for role in ROLES)).problem is None


def keep_answers(labels: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Labels [1, T] of those answer tokens alone whose numbers among all answer tokens of `labels` [1, T] are kept."""
    found = torch.full_like(labels, IGNORED)
    places = (labels[0] != IGNORED).nonzero()[:, 0][kept]
    found[0, places] = labels[0, places]
    return found


def align_answers(sample_id: str, rows: dict) -> torch.Tensor:
    """Gives the teacher the student's tokens as labels, each where its state is about to say it.

    Args:
        sample_id: the row, for the message.
        rows: student and teacher -> encoded row with `labels` [1, T] and `answers`, which is taken out; the teacher's
            labels are replaced.

    Returns:
        [K] int64, rising: which of the student's answer tokens the teacher has a state for.

    Raises:
        AnswerMismatchError: an answer's words differ between the roles.
        UnusableRow: no token of the student has a state of the teacher; cause answer_mismatch.
    """
    turns = list(zip(*(rows[role].pop("answers") for role in ROLES), strict=True))
    pairs, ours, theirs = [], 0, 0
    for number, (student, teacher) in enumerate(turns):
        if student.words != teacher.words:
            raise AnswerMismatchError(
                f"row {sample_id}: the chat templates write answer {number + 1} of {len(turns)} differently, so the "
                f"two cannot be compared.\n  student: {_shown(student.words)}\n  teacher: {_shown(teacher.words)}\n"
                "Set chat templates on both that leave an answer's words as they are."
            )
        pairs += [(ours + i, theirs + j) for i, j in pair_tokens(student, teacher)]
        ours, theirs = ours + len(student.starts), theirs + len(teacher.starts)
    if not pairs:
        raise UnusableRow("answer_mismatch", "no answer token of the student starts where one of the teacher starts")
    kept, states = torch.tensor(pairs).T.contiguous()
    tokens, labels = rows["student"]["labels"], rows["teacher"]["labels"]
    places = (labels[0] != IGNORED).nonzero()[:, 0][states]
    rows["teacher"]["labels"] = torch.full_like(labels, IGNORED)
    rows["teacher"]["labels"][0, places] = tokens[tokens != IGNORED][kept]
    return kept


def _shown(words: bytes, limit: int = 200) -> str:
    text = words.decode()
    return repr(text if len(text) <= limit else text[:limit] + "..")


def check_same_answers(sample_id: str, rows: dict, processors: dict) -> None:
    """Refuses a row whose answers are other tokens for the teacher than for the student.

    Args:
        sample_id: the row, for the message.
        rows: role -> encoded row with `labels` [1, T].
        processors: role -> processor, for decoding.

    Raises:
        AnswerMismatchError: the label ids differ in number or value.
    """
    answers = {role: row["labels"][row["labels"] != IGNORED] for role, row in rows.items()}
    student, teacher = answers["student"], answers["teacher"]
    if torch.equal(student, teacher):
        return
    shown = {role: repr(processors[role].tokenizer.decode(ids)) for role, ids in answers.items()}
    raise AnswerMismatchError(
        f"row {sample_id}: student and teacher have different answer tokens, so they cannot be compared.\n"
        f"  student: {len(student)} tokens, {shown['student']}\n"
        f"  teacher: {len(teacher)} tokens, {shown['teacher']}\n"
        f"The two need one vocabulary and chat templates that end a turn alike; set the same chat template on both."
    )
