"""What the demo compares: ways to train the same student, each a config file of its own that can be run alone.

The demo's config (`configs/demo.yaml`) is VLsI. The others lie in the folder of its name (`configs/demo/`), each with
what differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import ConfigError, RunConfig, load_config


@dataclass(frozen=True)
class Arm:
    """One way to train the student."""

    name: str
    """In summary.json; of its config file, and of its folder in the run's (VLsI's is the run itself)."""
    label: str
    """In tables."""
    seconds: float
    """About what it takes on two cores; only shares of it count, for the time that is left."""
    control: bool = False
    """sft on the labels alone: --no-control leaves it out."""
    quick: bool = False
    """Part of --quick."""
    answered: bool = False
    """Trains on the teacher's answers to pictures without labels, too."""


RANKS = 2
"""That the configs' rows of a rank are meant for."""
VLSI = Arm("student_after", "student after VLsI", 200, quick=True)
ARMS = (
    Arm("sft_best", "sft alone, best steps", 65, control=True, quick=True),
    Arm("last_layer", "last-layer KL", 175),
    VLSI,
    Arm("unlabelled", "sft, + teacher's answers", 60, answered=True),
)
"""In the order of their runs."""
FURTHER = (
    Arm("sft_only", "sft alone, VLsI's steps", 115, control=True),
    Arm("unlabelled_vlsi", "VLsI, + teacher's answers", 200, answered=True),
)
"""Not part of the demo but with --all-arms; `benchmarks/demo_seeds.py` runs them too."""
BASES = {"teacher": "teacher", "student_before": "student before"}
"""What is scored as it is: name in summary.json -> label."""
LABELS = BASES | {arm.name: arm.label for arm in (*ARMS, *FURTHER)}


def chosen(quick: bool, control: bool, further: bool = False) -> list[Arm]:
    """The arms to run."""
    arms = (*ARMS, *FURTHER) if further else ARMS
    return [arm for arm in arms if (arm.quick or not quick) and (control or not arm.control)]


def arm_file(arm: Arm, config: str | Path) -> Path:
    """Config file of an arm, the demo's being `config`."""
    return Path(config) if arm is VLSI else Path(config).with_suffix("") / f"{arm.name}.yaml"


def arm_changes(arm: Arm, vlsi: RunConfig, ranks: int = RANKS) -> dict[str, Any]:
    """Overrides of an arm's file: the run's folder, its data, student and seed; and the steps of `sft_only`.

    Args:
        arm: whose.
        vlsi: the demo's config.
        ranks: of its launch; a step has the same rows on any number of them.

    Raises:
        ConfigError: a step's rows cannot be shared out.
    """
    output, rows = Path(vlsi.output_dir), RANKS * vlsi.training.per_device_train_batch_size
    if ranks < 1 or rows % ranks:
        raise ConfigError(f"--ranks {ranks}: a step's {rows} rows cannot be shared out evenly; use a divisor of {rows}")
    changes = {
        "output_dir": str(output if arm is VLSI else output / arm.name),
        "data.root": str(output / "data"),
        "student.path": str(output / "start" / "student"),
        "seed": vlsi.seed,
    }
    if ranks != RANKS:
        changes["training.per_device_train_batch_size"] = rows // ranks
    if arm.name == "sft_only":
        changes["sft.training.max_steps"] = sum(vlsi.stage_training(stage).max_steps for stage in vlsi.stages)
    return changes


def arm_config(arm: Arm, config: str | Path, vlsi: RunConfig, ranks: int = RANKS) -> RunConfig:
    """An arm's config.

    Raises:
        FileNotFoundError: no such file beside the demo's.
        ConfigError: an option is wrong, or a stage has no max_steps.
    """
    file = arm_file(arm, config)
    found = load_config(file, arm_changes(arm, vlsi, ranks))
    for stage in found.stages:
        if found.stage_training(stage).max_steps < 1:
            raise ConfigError(f"{file}: {stage}.training.max_steps: the demo counts steps; set a number")
    return found
