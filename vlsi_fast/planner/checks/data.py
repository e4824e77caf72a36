"""Checks of the rows: sampled ones decode, encode, and have the same answers for both models."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

import torch

from ...data.dataset import ROLES, AnswerMismatchError, align_answers, check_same_answers, comparable
from ...data.encoding import IGNORED, configure_image_bounds, encode
from ...data.images import check_pixels, load_image
from ...data.messages import Sample
from ...data.skipped import UnusableRow
from ...data.sources import ConcatSource
from .subject import Failed, Notice, Subject, Unchecked

SURPRISE = 0.01
"""Unusable rows in a sample fail where `data.max_skipped_share` would give as many with less than this probability."""


def check_data(subject: Subject) -> str:
    """Every source opens, and sampled rows decode and encode."""
    said, bad, read = [], [], 0
    for name, opened in subject.sources().items():
        try:
            source = opened()
        except Unchecked as error:
            raise Failed(_named(name, error), f"correct {name} or remove it") from error
        found, count = _sample(subject, source)
        said.append(f"{name}: {len(source)} rows")
        bad, read = bad + found, read + count
        if found and _surprising(len(found), count, subject.config.data.max_skipped_share):
            causes = ", ".join(f"{cause} {n}" for cause, n in Counter(e.cause for _, e in found).most_common())
            at, error = found[0]
            raise Failed(
                f"{name}: {len(found)} of {count} sampled rows cannot be used ({causes}); first: {at}: {error}",
                "repair them, correct image_root, or raise data.max_skipped_share if they may be left out",
            )
    for name, opened in subject.sources("eval").items():
        try:
            said.append(f"{name}: {len(opened())} rows")
        except Unchecked as error:
            fix = f"correct {name}, or remove it: only training.eval_steps needs it"
            raise Failed(_named(name, error), fix) from error
    detail = f"{'; '.join(said)}; {read - len(bad)} of {read} sampled rows of data.train can be used"
    if bad:
        raise Notice(f"{detail}; first unusable: {bad[0][0]}: {bad[0][1]}")
    return detail


def check_alignment(subject: Subject) -> str:
    """Teacher and student have the same answer tokens on sampled rows; a translating teacher has states for them."""
    lengths = []
    for opened in subject.sources().values():
        source = opened()
        for index in _spread(len(source), subject.rows):
            try:
                lengths.append(aligned(subject, source[index]))
            except UnusableRow:
                continue  # `data` counts them
    if not lengths:
        raise Unchecked("no sampled row can be used")
    tokens, answers, taught = (sum(column) / len(lengths) for column in zip(*lengths))
    told = f"{len(lengths)} rows; mean {tokens:.0f} tokens, {answers:.0f} of them answers (for plan's --mean-tokens)"
    if not subject.config.verbalizer.translates:
        return told
    return f"{told}; the teacher has a state for {100 * taught / answers:.0f}% of the answers' tokens"


def _named(name: str, error: Unchecked) -> str:
    """What was wrong with a source, its name once."""
    cause = str(error.__cause__)
    return cause if cause.startswith(name) else f"{name}: {cause}"


def _spread(rows: int, count: int) -> list[int]:
    """`count` row numbers evenly over the source."""
    return sorted({i * rows // count for i in range(min(count, rows))} if rows > count else range(rows))


def _surprising(bad: int, read: int, share: float) -> bool:
    """Whether `bad` or more of `read` rows would be rare if `share` of all were unusable."""
    below = sum(math.comb(read, k) * share**k * (1 - share) ** (read - k) for k in range(bad))
    return 1 - below < SURPRISE


def _sample(subject: Subject, source: ConcatSource) -> tuple[list[tuple[str, UnusableRow]], int]:
    bad, indices = [], _spread(len(source), subject.rows)
    for index in indices:
        try:
            _encoded(subject, source[index], "student")
        except UnusableRow as error:
            bad.append((source.row_id(index), error))
    return bad, len(indices)


def _encoded(subject: Subject, sample: Sample, role: str, with_answers: bool = False) -> dict[str, torch.Tensor]:
    data, processor = subject.config.data, subject.processor(role)
    configure_image_bounds(processor, data.min_pixels, data.max_pixels)
    check_pixels(sample.images, data.max_image_pixels, data.max_row_pixels)
    loader = partial(load_image, max_image_pixels=data.max_image_pixels)
    return encode(sample, processor, data, loader, with_answers=with_answers)


def aligned(subject: Subject, sample: Sample) -> tuple[int, int, int]:
    """Of a row of the student's: tokens, answer tokens, and those of them that the teacher has a state for.

    Raises:
        Failed: the roles' answers differ, token by token or, where the teacher translates, in their words.
        UnusableRow: the row cannot be trained on.
    """
    processors = {role: subject.processor(role) for role in ROLES}
    translated = subject.config.verbalizer.translates and not comparable(processors)
    rows = {role: _encoded(subject, sample, role, with_answers=translated) for role in ROLES}
    tokens, answers = rows["student"]["input_ids"].shape[1], int((rows["student"]["labels"] != IGNORED).sum())
    try:
        if translated:
            return tokens, answers, len(align_answers(sample.id, rows))
        check_same_answers(sample.id, rows, processors)
    except AnswerMismatchError as error:
        raise Failed(str(error), "set chat templates on both processors that write an answer alike") from error
    return tokens, answers, answers
