"""Checkpoints by the clock, and a run that ends before its last step: on SIGTERM, or when its hours are over."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..ranks.sharding import rank
from ..ranks.watch import watch

WISHES = 3
"""Numbers of `Leaving.wishes`."""


class Leaving(TrainerCallback):
    """Asks for a checkpoint, or for the end, at the same step on all ranks.

    What each rank wishes is added over ranks with the step's own sums (`wishes`, `agreed`), so no rank waits for more
    than it does anyway. Rank 0's clock alone counts.

    Args:
        deadline: `time.monotonic()` after which the run is to end; None: no limit.
        save_minutes: minutes between checkpoints; None: only every `save_steps`.
    """

    def __init__(self, deadline: float | None, save_minutes: float | None):
        self.deadline, self.save_seconds = deadline, save_minutes and 60 * save_minutes
        self.reason = ""
        """Why the run is to end; empty while it is not."""
        self._saved, self._save = time.monotonic(), False

    def wishes(self) -> Tensor:
        """This rank's, [3] float64: a checkpoint by the clock, the end by the clock, the end by SIGTERM."""
        now = time.monotonic() if rank() == 0 else None
        save = now is not None and self.save_seconds is not None and now - self._saved >= self.save_seconds
        over = now is not None and self.deadline is not None and now >= self.deadline
        return torch.tensor([save, over, watch.asked_to_leave], dtype=torch.float64)

    def agreed(self, wishes: list[float]) -> None:
        """Take `wishes`, added over ranks, during the step at whose end they are granted."""
        save, over, asked = (wish > 0 for wish in wishes)
        self._save = save
        self.reason = "it was asked to end (SIGTERM)" if asked else "its time is over (max_hours)" if over else ""

    def on_step_end(self, args, state, control, **kwargs):
        if self.reason and state.global_step < state.max_steps:
            control.should_training_stop = True
            control.should_save = True
            control.should_evaluate = False  # it may be long: the run that goes on from here makes up for it
        elif self._save:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        self._saved, self._save = time.monotonic(), False
