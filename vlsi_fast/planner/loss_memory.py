"""What the losses add to the memory curve, in the order of `vlsi_fast.losses`. Letters as in memory.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .memory import Curve, Setup, divergence_scratch, statistics_scratch

if TYPE_CHECKING:
    from .walk import Step


def answer_loss(curve: Curve, step: Step, role: str, layers: int, trained_head: bool) -> None:
    """Cross-entropy of `layers` N rows: holds the gradient's direction in the inputs' dtype."""
    shape, batch, setup = step.roles[role].shape, step.batches[role], step.setup
    e, d, rows = setup.compute_bytes, shape.width, layers * batch.answers
    scratch = statistics_scratch(rows, d, d, step.vocab, 1, setup)
    # float32 expectation of a block, the labels' rows of the head, and their product with the hidden states
    block = min(rows, 2048) * d * 4 * (3 if setup.device == "cpu" else 1)
    curve.hold("activations", e * rows * d)
    head = e * shape.head if step.roles[role].is_gathered(setup) else 0
    curve.moment(f"{role} answer loss", workspace=scratch + block, gathered=head)
    if trained_head:
        scratch = statistics_scratch(rows, d, 0, step.vocab, 1, setup) + 4 * d * min(step.vocab, 8192)
        size = e if setup.zero is not None or e < 4 else 4
        gradients = size * shape.head * (2 if setup.zero is not None and not setup.whole else 1)
        curve.moment("head backward", workspace=scratch, gradients=gradients, gathered=head)
        if setup.zero is None and setup.accumulation == 1:
            curve.hold("gradients", size * shape.head)


def heads_gathered(step: Step) -> int:
    return step.setup.compute_bytes * sum(s.shape.head for s in step.roles.values() if s.is_gathered(step.setup))


def teacher_statistics(curve: Curve, step: Step, teachers: int) -> None:
    """Targets of `teachers` layers for one micro-batch: holds L N (d_s + 1) float32 numbers."""
    n, d = step.batches["student"].answers, step.roles["student"].shape.width
    curve.hold("targets", 4 * teachers * n * (d + 1))
    scratch = statistics_scratch(teachers * n, step.teacher_width, d, step.vocab, 2, step.setup)
    curve.moment("teacher statistics", workspace=scratch, gathered=heads_gathered(step))


def kl(curve: Curve, step: Step, students: int, teachers: int, grad: bool = True) -> None:
    """KL matrix of `students` x `teachers` layers: holds both expectations, float32 (teacher: L N (d_s + 1), which a
    window has made before, or a cache brought).

    Without gradient it only drives the matching: nothing of it stays.
    """
    student, setup, heard = step.roles["student"].shape, step.setup, step.has_states and not step.windowed
    e, n, d = setup.compute_bytes, step.batches["student"].answers, student.width
    heads = e * student.head if step.windowed and step.roles["student"].is_gathered(setup) else heads_gathered(step)
    joined = e * n * students * d if grad else 0  # torch.cat of the layers and the last
    if heard and grad:
        joined += e * n * teachers * step.teacher_width
    curve.hold("activations", joined)
    if heard:
        teacher_statistics(curve, step, teachers)
    curve.hold("targets", 4 * students * n * d if grad else 0)
    scratch = statistics_scratch(students * n, d, d if grad else 0, step.vocab, 1, setup)
    curve.moment("student statistics", workspace=scratch, gathered=heads)
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
    e, n = setup.compute_bytes, step.batches["student"].answers
    heads, settings = heads_gathered(step), step.settings
    calls = [step.roles["student"].layers] * step.matched if settings.layers_by_other_divergence else []
    for rows in [*calls, 1] if settings.last_by_other_divergence else calls:
        chosen = e * rows * n * other  # the matched layers, copied
        curve.hold("activations", e * rows * n * d)
        scratch = divergence_scratch(rows * n, d, other, step.vocab, setup)
        curve.moment("divergence of pairs", workspace=scratch, activations=chosen, gathered=heads)


def own_output(curve: Curve, step: Step, role: str) -> None:
    """KL of a role's layers from its own last one: holds both expectations, float32; the answers' are a row of W."""
    spoken, batch, setup = step.roles[role], step.batches[role], step.setup
    e, n, d = setup.compute_bytes, batch.answers, spoken.shape.width
    head = e * spoken.shape.head if spoken.is_gathered(setup) else 0
    columns = 1 + (step.settings.objective == "both")
    curve.hold("targets", 4 * columns * n * (d + 1))
    scratch = statistics_scratch(n, d, d, step.vocab, 2, setup)
    curve.moment(f"{role} last layer's statistics", workspace=scratch, gathered=head)
    curve.hold("targets", 4 * spoken.layers * n * d)
    scratch = statistics_scratch(spoken.layers * n, d, d, step.vocab, 1, setup)
    curve.moment(f"{role} statistics", workspace=scratch, gathered=head)
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
