"""What differs between stages: the module that one trains. Its forward takes a batch and returns the loss."""

from __future__ import annotations

from torch import nn


class StageModule(nn.Module):
    """What a stage trains.

    `forward(student=None, teacher=None, generator=None, **schedule)` takes for each role `{"inputs": processor tensors,
    "index": [N] answer positions, "labels": [N]}`, with what `schedule` gave, and returns

        loss      scalar, sum over `parts`, each a mean over the N answer tokens of the micro-batch
        parts     [P] float32, detached, in the order of `part_names`
        kl        [S, L] float32, detached (interact only)
        matches   [S, L] float32 counts of chosen pairs (interact only)
    """

    part_names: list[str]
    """Names of the parts of the loss, as logged."""
    roles: tuple[str, ...]
    """Which of student and teacher the stage runs."""
    matrix_shape: tuple[int, int] | None = None
    """[S, L] where the stage matches layers."""
    window: int = 1
    """Micro-batches for which the teacher runs at once (interact's `teach`); 1: in each one's forward."""
    teacher_names: tuple[str, ...] | list[str] = ()
    """Of several teachers, whose layers are side by side in the matrix, `teacher_widths` of each."""
    teacher_widths: tuple[int, ...] | list[int] = ()
    layer_names: tuple[list[int], list[int]] = ([], [])
    """Target layers of student and teacher, for logs."""

    def schedule(self, progress: float) -> dict[str, float]:
        """Numbers that `forward` takes and metrics.jsonl tells; `progress` is the share of the stage's optimizer steps
        that are done, 0 at the first. A function of where the run is, so a resumed run has the same."""
        return {}
