"""All stages of a config, one after the other, each as a step on the device."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field

from vlsi_kernels import resolve_impl

from ...acceleration import use_liger
from ...config import RunConfig
from ..build import Models, setup_of, step_of
from ..memory import Batch
from ..report import Rows
from ..speed import operations
from ..walk import walk
from .device import DEVICE, on, require_torch
from .gpus import Gpu
from .kernels import Launches, compiling_for, table_of
from .stage import DryStage
from .tape import Kernel, Tape, place_of

TOLERANCE = 0.05
"""Difference from the planner's peak, as a share of it, above which one of the two is wrong."""
WORKING = ("activations", "targets", "workspace")
"""Columns of the planner that are one here: what a forward and backward make."""


@dataclass
class Found:
    """What a dry run found of one stage. Bytes and FLOPs of one micro-batch and optimizer step of one GPU."""

    stage: str
    problem: str = ""
    """What stopped it, with file and line; empty where the step went through."""
    seconds: float = 0.0
    peak: dict[str, int] = field(default_factory=dict)
    peak_part: str = ""
    planned_peak: dict[str, int] = field(default_factory=dict)
    planned_moment: str = ""
    waits: dict[str, int] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    planned_flops: dict[str, float] = field(default_factory=dict)
    operators: dict[str, int] = field(default_factory=dict)
    work: list[tuple[Kernel, int]] = field(default_factory=list)
    """What was launched, and how often."""
    batches: dict[str, Batch] = field(default_factory=dict)
    """Model's name -> the micro-batch, as the planner sees it."""
    kernels: list[Launches] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def memory_differs(self) -> bool:
        """Whether peak and planner are further apart than `TOLERANCE`."""
        planned = sum(self.planned_peak.values())
        return abs(sum(self.peak.values()) - planned) > TOLERANCE * planned


def dry_run(config: RunConfig, models: Models, rows: Rows, gpu: Gpu) -> list[Found]:
    """One step of every stage of the config, without weights; `rows`: from `rows_that_fit`.

    Raises:
        TorchChangedError: this torch lacks what it rests on.
        ConfigError: the config cannot be run dry.
    """
    require_torch()
    return [run_stage(config, models, stage, rows, gpu) for stage in config.stages]


def run_stage(config: RunConfig, models: Models, name: str, rows: Rows, gpu: Gpu) -> Found:
    """One stage; what stops it is told in the result."""
    found, began, tape = Found(name), time.perf_counter(), Tape()
    setup = dataclasses.replace(setup_of(config, name, 1), whole=True, window=1, secondary=1, persist_heads=False)
    try:
        compiling = compiling_for(gpu, tape) if uses_triton(config) else contextlib.nullcontext()
        with warnings.catch_warnings(), compiling as driver, on(gpu, tape):
            warnings.simplefilter("ignore")
            stage = DryStage(models, name, setup, rows)
            stage.build(tape)
            batch = stage.batch(tape)
            tape.begin()
            stage.micro_step(batch, tape)
            stage.step(tape)
            found.peak, found.peak_part = _working_as_one(tape.peak), tape.peak_part
            found.waits = dict(tape.waits)
            found.flops, found.operators = _by_part(tape.flops), _by_part(tape.operators)
            found.work = [(each._replace(part=_part(each.part)), count) for each, count in tape.work.items()]
            found.notes, found.batches = stage.notes, stage.planned
            found.kernels = [] if driver is None else table_of(driver)
            del stage, batch
    except Exception as error:
        found.problem = f"{type(error).__name__}: {error} ({place_of(error)})"
        found.notes.append(traceback.format_exc())
    else:
        step = step_of(models, name, setup, lambda shape: found.batches[shape.name])
        peak = walk(step).peak
        found.planned_peak, found.planned_moment = _working_as_one(peak.columns), peak.moment
        found.planned_flops = operations(step)
    gc.collect()
    found.seconds = time.perf_counter() - began
    return found


def uses_triton(config: RunConfig) -> bool:
    """Whether kernels would be launched on a GPU."""
    return use_liger(config.liger, DEVICE) or resolve_impl(config.impl, DEVICE) == "triton"


def _working_as_one(columns: dict[str, int]) -> dict[str, int]:
    """Columns with those of `WORKING` joined."""
    kept = {name: size for name, size in columns.items() if name not in WORKING and size}
    return kept | {"activations": sum(columns.get(name, 0) for name in WORKING)}


def _by_part(counted: Counter[str]) -> dict[str, int]:
    """Under the planner's names."""
    found: Counter[str] = Counter()
    for part, value in counted.items():
        found[_part(part)] += value
    return {name: value for name, value in found.items() if value}


def _part(name: str) -> str:
    """The planner's name: a part's own backward counts to it, but that of the backbone, which has a line."""
    if name.endswith(" forward recomputation"):
        return name.replace(" forward recomputation", " recomputation")
    if name.endswith(" forward backward"):
        return name.replace(" forward backward", " backward")
    return name.removesuffix(" backward").removesuffix(" recomputation")
