"""Measured peak memory of a true training step on the CPU: every allocation of the process, by torch's profiler.

torch counts no CPU memory, but its profiler reports each allocation and release, those inside operators included. The
live bytes at the start of the step (weights, optimizer state, batches: all storages that were not there before the run)
plus the running sum of the events give the curve, and its maximum is the peak.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerCallback

from vlsi_fast.config import RunConfig
from vlsi_fast.planner.build import Models, setup_of, step_of
from vlsi_fast.planner.memory import Batch, Curve
from vlsi_fast.planner.walk import walk
from vlsi_fast.stages import STAGE_CLASSES
from vlsi_fast.stages.trainer import StageTrainer


def storages() -> dict[int, int]:
    """Address -> bytes of all storages alive, for tensors that Python knows."""
    gc.collect()
    found = {}
    for item in gc.get_objects():
        if isinstance(item, torch.Tensor):  # .detach(): a parameter's gradient and a subclass's storage alike
            for tensor in (item, item.grad if item.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu" and tensor.layout == torch.strided:
                    storage = tensor.untyped_storage()
                    try:
                        found[storage.data_ptr()] = storage.nbytes()
                    except RuntimeError:  # a fake tensor that a test of torch.compile left behind: no memory
                        continue
    return found


@dataclass
class Measured:
    """What one optimizer step held."""

    peak: int = 0  # bytes, the largest sum alive
    start: int = 0  # bytes alive when the step began
    module: Any = None
    batches: list[dict] = field(default_factory=list)  # per micro-batch what StageModule.forward took
    curve: list[tuple[int, int]] = field(default_factory=list)  # (time in ns, bytes alive)


class _Watch(TrainerCallback):
    """Profiles optimizer step `step` (counted from 0), when the optimizer's state exists."""

    def __init__(self, measured: Measured, before: set[int], step: int):
        self.measured, self.before, self.step = measured, before, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.measured.start = sum(size for at, size in storages().items() if at not in self.before)
            activities = [torch.profiler.ProfilerActivity.CPU]
            self.profile = torch.profiler.profile(activities=activities, profile_memory=True)
            self.profile.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step + 1:
            self.profile.__exit__(None, None, None)
            events = self.profile.profiler.kineto_results.events()
            memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
            live = self.measured.peak = self.measured.start
            for at, size in memory:
                live += size
                self.measured.curve.append((at, live))
                self.measured.peak = max(self.measured.peak, live)


def measure(config: RunConfig, stage: str, monkeypatch, step: int = 1) -> Measured:
    """Run a stage of at least `step + 1` optimizer steps and watch that one."""
    measured = Measured()
    before = set(storages())
    start, compute = StageTrainer.__init__, StageTrainer.compute_loss

    def watched(self, *args, **kwargs):
        start(self, *args, **kwargs)
        self.add_callback(_Watch(measured, before, step))
        measured.module = None

    def keep_shapes(self, model, inputs, *args, **kwargs):
        if self.state.global_step == step:
            shapes = {
                role: {
                    "tokens": tuple(part["inputs"]["input_ids"].shape),
                    "answers": part["index"].numel(),
                    "patches": len(part["inputs"].get("pixel_values", ())),
                }
                for role, part in inputs["batch"].items()
                if role != "taught"
            }
            measured.batches.append(shapes)
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "__init__", watched)
    monkeypatch.setattr(StageTrainer, "compute_loss", keep_shapes)
    STAGE_CLASSES[stage](config).run()
    monkeypatch.undo()
    return measured


def predicted(config: RunConfig, stage: str, measured: Measured) -> Curve:
    """The planner's curve with the largest peak over the micro-batches of the measured step, in one process."""
    models, curves = Models(config), []
    for shapes in measured.batches:
        batches = {role: Batch(*found["tokens"], found["answers"], found["patches"]) for role, found in shapes.items()}
        setup = setup_of(config, stage, 1, "cpu")
        curves.append(walk(step_of(models, stage, setup, lambda shape, found=batches: found[shape.name])))
    return max(curves, key=lambda curve: curve.peak.total)
