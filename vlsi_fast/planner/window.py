"""What auto comes to where memory decides: `teacher.window`, for how many micro-batches of a step the teacher runs at
once (see stages/window.py), and then `training.persist_heads`, whether frozen heads stay whole (ranks/heads.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ..config import RunConfig
from .build import Models, setup_of, step_of
from .loss_memory import read_heads
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


def with_heads(models: Models, stage: str, setup: Setup, batch: Callable[[ModelShape], Batch], room: int) -> Setup:
    """A setup with `teacher.window` resolved, and now `training.persist_heads`: auto keeps heads whole where that fits
    into `room` bytes of a GPU, and where a stage reads any."""
    if models.config.stage_training(stage).persist_heads != "auto":
        return setup
    kept = dataclasses.replace(setup, persist_heads=True)
    step = step_of(models, stage, kept, batch)
    fits = setup.device == "cuda" and read_heads(step) and MARGIN * walk(step).peak.total <= room
    return kept if fits else setup


def resolved_setup(models: Models, stage: str, setup: Setup, batch: Callable[[ModelShape], Batch], room: int) -> Setup:
    """A setup with all that memory decides resolved. The window first: it saves the larger gathers."""
    if models.config.stage_training(stage).persist_heads == "auto":
        setup = dataclasses.replace(setup, persist_heads=False)
    return with_heads(models, stage, with_window(models, stage, setup, batch, room), batch, room)


def fitting_heads(config: RunConfig, stage: str, configs: dict[str, Any], ranks: int, memory: int) -> bool:
    """Whether a stage keeps its frozen heads whole on this machine's GPUs; arguments as `fitting_window`'s, with
    `training.persist_heads` auto."""
    models, setup, rows = _at_hand(config, stage, configs, ranks)
    return resolved_setup(models, stage, setup, rows, memory - RESERVE_BYTES).persist_heads


def fitting_window(config: RunConfig, configs: dict[str, Any], ranks: int, memory: int) -> int:
    """Micro-batches of a window of stage interact on this machine's GPUs, for rows of data.max_length.

    Args:
        config: of the run, with `teacher.window` auto.
        configs: role -> transformers config.
        ranks: of the run.
        memory: bytes of a GPU.
    """
    models, setup, rows = _at_hand(config, "interact", configs, ranks)
    return with_window(models, "interact", setup, rows, memory - RESERVE_BYTES).window


def _at_hand(config: RunConfig, stage: str, configs: dict[str, Any], ranks: int):
    """Models, setup and rows of a stage whose models' configs are read already."""
    from .report import rows_of

    models = Models(config, configs=configs)
    rows = rows_of(config, models).batch(config.stage_training(stage).per_device_train_batch_size)
    return models, setup_of(config, stage, ranks), rows
