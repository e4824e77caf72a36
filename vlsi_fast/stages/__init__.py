"""The three stages of VLsI: one file each says what is trained and what the loss is."""

from __future__ import annotations

import time
from typing import Any

from ..config import STAGES, ConfigError, RunConfig
from ..config_files import nearest
from ..errors import SELF_EXPLAINING
from ..named_files import require_files
from ..ranks.watch import watch
from .interact import InteractStage
from .sft import SftStage
from .trainer import NonFiniteLossError
from .verbalize import VerbalizeStage

STAGE_CLASSES = {stage.name: stage for stage in (VerbalizeStage, InteractStage, SftStage)}

__all__ = ["STAGE_CLASSES", "NonFiniteLossError", "run"]


def run(config: RunConfig, stage: str = "all", resume: bool = False) -> dict[str, Any]:
    """Run one stage, or those of the config's `stages` in order.

    Args:
        config: from `load_config`.
        stage: verbalize, interact, sft or all.
        resume: continue from the last checkpoint; stages that are finished are left as they are.

    Returns:
        Stage name -> its record, as in `<output_dir>/<stage>/vlsi_stage.json`.

    Raises:
        ConfigError: unknown stage, or a config that does not fit the models.
        LineageError: earlier results missing or of another run; a folder that is taken, or
            that another run writes to; damaged checkpoints.
        DiskFullError: a checkpoint or result did not fit.
        StoppedEarly: after SIGTERM, or after `max_hours`; a checkpoint is saved.
    """
    if stage != "all" and stage not in STAGES:
        raise ConfigError(f"unknown stage {stage!r}{nearest(stage, (*STAGES, 'all'))}")
    names = config.stages if stage == "all" else (stage,)
    deadline = None if config.max_hours is None else time.monotonic() + 3600 * config.max_hours
    require_files(config, names)
    try:
        return {name: STAGE_CLASSES[name](config, deadline).run(resume) for name in names}
    except Exception as error:
        if watch.interrupted:  # the collectives' errors are only its echo
            raise KeyboardInterrupt from None
        if not isinstance(error, SELF_EXPLAINING):
            watch.failed(error)
        raise
    finally:
        watch.end()
