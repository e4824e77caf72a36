"""The rows of a run as model inputs of student and teacher, aligned by their answer tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch.utils.data import Dataset

from vlsi_fast.config_data import DataConfig
from vlsi_fast.data.encoding import IGNORED, configure_image_bounds, encode
from vlsi_fast.data.images import check_pixels, load_image
from vlsi_fast.data.messages import Sample
from vlsi_fast.data.shared_images import SharedImages, share_images
from vlsi_fast.data.skipped import SpecialTokenError, UnusableRow
from vlsi_fast.data.sources import ConcatSource
from vlsi_fast.data.storage import retried
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
    """Map-style: row -> `{"id", "student", "teacher", "skipped", "answered"}`, the roles being those of `processors`.

    A row that cannot be used is replaced by the next usable one, and noted in the "skipped" list of the row returned.

    Args:
        sources: the rows, from `build_source`.
        processors: "student", "teacher" or both -> that model's processor. The config's pixel bounds are set on them.
        data_config: bounds on tokens and pixels.
        taught: gives what a teacher that is not here said to a row, from the sample and the student's labels; it is
            then in the row as `taught`.

    Raises:
        ValueError: no role or an unknown one, or pixel bounds that a processor does not have.
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
            the row's answers.

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

    def _encode(self, sample: Sample) -> dict[str, dict[str, torch.Tensor]]:
        data = self.data_config
        check_pixels(sample.images, data.max_image_pixels, data.max_row_pixels)
        loader = lru_cache(maxsize=None)(partial(load_image, max_image_pixels=data.max_image_pixels))
        rows = {}
        try:
            for role, processor in self.processors.items():
                if self.shared and rows:
                    rows[role] = next(iter(rows.values()))
                else:
                    rows[role] = encode(sample, processor, data, loader)
        finally:
            if self.images is not None:
                self.images.forget()
        if len(rows) == 2 and not self.shared:
            check_same_answers(sample.id, rows, self.processors)
            self._aligned = True
        if self._taught is not None:
            rows["taught"] = self._taught(sample, rows["student"]["labels"])
            self._aligned = True
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
