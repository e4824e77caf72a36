"""`teacher.window: auto`: for how many micro-batches of a step the teacher can run at once (see stages/window.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ..config import RunConfig
from .build import Models, setup_of, step_of
from .memory import RESERVE_BYTES, Batch, Setup
from .shapes import ModelShape
from .walk import walk

MARGIN = 1.1
"""Predictions of the peak are within 10% (`tests/test_planner.py`)."""


def with_window(models: Models, stage: str, setup: Setup, batch: Callable[[ModelShape], Batch], room: int) -> Setup:
    """A setup with `teacher.window` auto resolved: as few windows a step as fit into `room` bytes of a GPU.

    1 where nothing of the teacher is gathered, where not even that fits, and where the config says a number.
    """
    if models.config.teacher.window != "auto" or stage != "interact" or setup.device != "cuda":
        return setup
    setup = dataclasses.replace(setup, window=1)
    step = step_of(models, stage, setup, batch)
    teacher = step.roles.get("teacher")
    if teacher is None or (setup.teacher_mode != "offload" and not teacher.is_gathered(setup)):
        return setup
    for windows in range(1, setup.accumulation + 1):
        found = dataclasses.replace(setup, window=-(-setup.accumulation // windows))
        if MARGIN * walk(dataclasses.replace(step, setup=found)).peak.total <= room:
            return found
    return setup


def fitting_window(config: RunConfig, configs: dict[str, Any], ranks: int, memory: int) -> int:
    """Micro-batches of a window of stage interact on this machine's GPUs, for rows of data.max_length.

    Args:
        config: of the run, with `teacher.window` auto.
        configs: role -> transformers config.
        ranks: of the run.
        memory: bytes of a GPU.
    """
    from .report import rows_of

    models = Models(config, configs=configs)
    rows = rows_of(config, models).batch(config.stage_training("interact").per_device_train_batch_size)
    setup = setup_of(config, "interact", ranks)
    return with_window(models, "interact", setup, rows, memory - RESERVE_BYTES).window
