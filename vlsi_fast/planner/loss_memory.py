"""What the losses add to the memory curve, in the order of `vlsi_fast.losses`. Letters as in memory.py.

A frozen head is whole while a loss reads it. With `training.persist_heads` it is so from the first loss of an optimizer
step to the last, and so is, in bfloat16 on a GPU, the float16 copy of one that the fused kernels multiply with (V d
numbers, V the rows that take part); of heads that nobody shards the copy stays for the run.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .memory import Curve, Setup, divergence_scratch, statistics_scratch

if TYPE_CHECKING:
    from .walk import Step


def read_heads(step: Step) -> dict[str, bool]:
    """Roles (`Step.head_role`) whose head is read, not trained -> whether a float16 copy of it is multiplied with."""
    if step.stage == "verbalize":
        return dict.fromkeys(map(step.head_role, step.roles), True)
    student = step.roles["student"]
    if step.stage == "sft":
        return {} if student.mode == "full" else {"student": True}
    by_kl = step.settings.matches_by_kl or step.settings.last_by_forward_kl or bool(step.pairs)
    heads = {"student": True} if by_kl or step.settings.learns_answers else {}
    apart = "teacher" in step.roles and step.head_role("teacher") == "teacher"
    return heads | ({"teacher": False} if by_kl and apart else {})


def head_bytes(step: Step, *roles: str, released: bool = False) -> Counter[str]:
    """Bytes of whole heads that `roles` speak through, and of the copies of kept ones, by column; `released`: only what
    ends with the step."""
    found, setup, read = Counter(), step.setup, read_heads(step)
    for role in dict.fromkeys(map(step.head_role, roles)):
        spoken = step.roles[role]
        shape, sharded = spoken.voice, spoken.language is None and spoken.is_gathered(setup)
        if released and not sharded:
            continue
        found["gathered"] += setup.compute_bytes * shape.head if sharded else 0
        copied = setup.persist_heads and read.get(role) and setup.compute_bytes == 2 and setup.device != "cpu"
        found["workspace"] += 2 * step.vocab * shape.width if copied else 0
    return found


@contextlib.contextmanager
def whole(curve: Curve, step: Step, *roles: str) -> Iterator[None]:
    """Heads of `roles` are whole inside, and gone behind it; where they are kept, they are in the curve already."""
    sizes = Counter() if step.setup.persist_heads else head_bytes(step, *roles)
    for column, size in sizes.items():
        curve.hold(column, size)
    yield
    for column, size in sizes.items():
        curve.hold(column, -size)


def answer_loss(curve: Curve, step: Step, role: str, layers: int, trained_head: bool) -> None:
    """Cross-entropy of `layers` N rows: holds the gradient's direction in the inputs' dtype."""
    shape, batch, setup = step.roles[role].voice, step.batches[role], step.setup
    e, d, rows = setup.compute_bytes, shape.width, layers * batch.answers
    scratch = statistics_scratch(rows, d, d, step.vocab, 1, setup, frozen=not trained_head)
    # float32 expectation of a block, the labels' rows of the head, and their product with the hidden states
    block = min(rows, 2048) * d * 4 * (3 if setup.device == "cpu" else 1)
    curve.hold("activations", e * rows * d)
    if not trained_head:
        with whole(curve, step, role):
            curve.moment(f"{role} answer loss", workspace=scratch + block)
    else:
        head = e * shape.head if step.roles[role].is_gathered(setup) else 0
        curve.moment(f"{role} answer loss", workspace=scratch + block, gathered=head)
        scratch = statistics_scratch(rows, d, 0, step.vocab, 1, setup) + 4 * d * min(step.vocab, 8192)
        size = e if setup.zero is not None or e < 4 else 4
        gradients = size * shape.head * (2 if setup.zero is not None and not setup.whole else 1)
        curve.moment("head backward", workspace=scratch, gradients=gradients, gathered=head)
        if setup.zero is None and setup.accumulation == 1:
            curve.hold("gradients", size * shape.head)


def teacher_statistics(curve: Curve, step: Step, teachers: int) -> None:
    """Targets of `teachers` layers for one micro-batch, both heads whole: holds L N (d_s + 1) float32 numbers."""
    n, d = step.batches["student"].answers, step.roles["student"].shape.width
    curve.hold("targets", 4 * teachers * n * (d + 1))
    scratch = statistics_scratch(teachers * n, step.teacher_width, d, step.vocab, 2, step.setup)
    curve.moment("teacher statistics", workspace=scratch)


def kl(curve: Curve, step: Step, students: int, teachers: int, grad: bool = True) -> None:
    """KL matrix of `students` x `teachers` layers: holds both expectations, float32 (teacher: L N (d_s + 1), which a
    window has made before, or a cache brought).

    Without gradient it only drives the matching: nothing of it stays.
    """
    student, setup, heard = step.roles["student"].shape, step.setup, step.has_states and not step.windowed
    e, n, d = setup.compute_bytes, step.batches["student"].answers, student.width
    joined = e * n * students * d if grad else 0  # torch.cat of the layers and the last
    if heard and grad:
        joined += e * n * teachers * step.teacher_width
    curve.hold("activations", joined)
    read = [role for role in step.roles if role == "student" or heard]
    with whole(curve, step, *read):
        if heard:
            teacher_statistics(curve, step, teachers)
        curve.hold("targets", 4 * students * n * d if grad else 0)
        scratch = statistics_scratch(students * n, d, d if grad else 0, step.vocab, 1, setup)
        curve.moment("student statistics", workspace=scratch)
        pairs = 3 * 8 * students * teachers * n  # float64: the KLs, masked, and weighted
        curve.moment("KL of pairs", workspace=pairs + pair_block(students, teachers, n, d, setup))
    curve.hold("activations", -joined)
    if grad:
        curve.moment("KL backward", workspace=students * n * d * (2 * 4 + e))
    elif heard:
        curve.hold("targets", -4 * teachers * n * (d + 1))


def divergence(curve: Curve, step: Step) -> None:
    """`linear_divergence` of the matched pairs: holds the gradient's direction in the inputs' dtype."""
    setup, d, other = step.setup, step.roles["student"].shape.width, step.teacher_width
    e, n, settings = setup.compute_bytes, step.batches["student"].answers, step.settings
    calls = [step.roles["student"].layers] * step.matched if settings.layers_by_other_divergence else []
    for rows in [*calls, 1] if settings.last_by_other_divergence else calls:
        chosen = e * rows * n * other  # the matched layers, copied
        curve.hold("activations", e * rows * n * d)
        scratch = divergence_scratch(rows * n, d, other, step.vocab, setup)
        with whole(curve, step, *step.roles):
            curve.moment("divergence of pairs", workspace=scratch, activations=chosen)


def own_output(curve: Curve, step: Step, role: str) -> None:
    """KL of a role's layers from its own last one: holds both expectations, float32; the answers' are a row of W."""
    spoken, batch, setup = step.roles[role], step.batches[role], step.setup
    n, d = batch.answers, spoken.shape.width
    columns = 1 + (step.settings.objective == "both")
    curve.hold("targets", 4 * columns * n * (d + 1))
    with whole(curve, step, role):
        scratch = statistics_scratch(n, d, d, step.vocab, 1, setup)
        curve.moment(f"{role} last layer's statistics", workspace=scratch)
        curve.hold("targets", 4 * spoken.layers * n * d)
        scratch = statistics_scratch(spoken.layers * n, d, d, step.vocab, 1, setup)
        curve.moment(f"{role} statistics", workspace=scratch)
        pairs = 3 * 8 * spoken.layers * columns * n + pair_block(spoken.layers, columns, n, d, setup)
        curve.moment(f"{role} KL of layers", workspace=pairs)


def pair_block(students: int, teachers: int, n: int, d: int, setup: Setup) -> int:
    """float64 copies of a block of tokens, on the CPU's path only; as many tokens as the workspace takes."""
    if setup.device != "cpu":
        return 0
    from vlsi_kernels._common import DEFAULT_WORKSPACE_BYTES

    budget = setup.workspace or DEFAULT_WORKSPACE_BYTES["cpu"]
    token = 8 * d * (students + teachers)
    return token * min(n, max(1, budget // token))
