"""`vlsi-fast plan`: the planner's numbers as tables and as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from ..config import ConfigError, RunConfig, load_config
from .arguments import Machine
from .build import Models, setup_of, step_of
from .memory import RESERVE_BYTES, Batch
from .shapes import ModelShape
from .speed import operations, over_pcie, speed, traffic
from .walk import walk

COLUMNS = {
    "parameters": "parameters", "gradients": "gradients", "optimizer": "optimizer", "teacher": "teacher",
    "gathered": "gathered layers, heads", "inputs": "inputs", "activations": "activations",
    "targets": "KL targets", "workspace": "head workspace",
}  # fmt: skip
MAX_ROWS = 1024
TEACHER_MODES = ("zero3", "replicated", "offload", "int8", "nf4")


@dataclasses.dataclass(frozen=True)
class Rows:
    """Lengths that a plan assumes: the longest row decides memory, the mean row time."""

    tokens: int
    answers: int
    mean_tokens: int
    mean_answers: int
    image_tokens: int

    def batch(self, rows: int, mean: bool = False):
        """A function from a model's shape to its micro-batch."""
        tokens, answers = (self.mean_tokens, self.mean_answers) if mean else (self.tokens, self.answers)
        tokens = max(2, tokens)

        def make(shape: ModelShape) -> Batch:
            patches = rows * min(self.image_tokens, tokens) * shape.merge
            return Batch(rows, tokens, rows * min(answers, tokens - 1), patches, masked=rows > 1)

        return make


def rows_of(config: RunConfig, models: Models, arguments: argparse.Namespace | None = None) -> Rows:
    """From the options, else from the config: one image a row of at most `data.max_pixels`."""
    option = vars(arguments).get if arguments is not None else lambda name: None
    tokens = option("tokens") or config.data.max_length
    image = option("image_tokens")
    if image is None:
        image = models.image_tokens(config.data.max_pixels or 1280 * 28 * 28)
    image = min(image, tokens)
    mean = option("mean_tokens") or min(tokens, image + 256)
    answers = min(option("answer_tokens") or 512, tokens - 1)
    return Rows(tokens, answers, mean, min(option("mean_answer_tokens") or 128, mean - 1), image)


def plan_stage(models: Models, stage: str, machine: Machine, rows: Rows, samples: int) -> dict[str, Any]:
    """All numbers of one stage, bytes, FLOPs and seconds."""
    config = models.config
    micro = config.stage_training(stage).per_device_train_batch_size
    setup = setup_of(config, stage, machine.ranks)
    curve = walk(step_of(models, stage, setup, rows.batch(micro)))
    room = machine.memory_bytes - RESERVE_BYTES
    other = {}
    for name, on in (("with_checkpointing", True), ("without_checkpointing", False)):
        changed = dataclasses.replace(setup, checkpointing=on)
        other[name] = walk(step_of(models, stage, changed, rows.batch(micro))).peak

    def fits(count: int) -> bool:
        return walk(step_of(models, stage, setup, rows.batch(count))).peak.total <= room

    mean = step_of(models, stage, setup, rows.batch(micro, mean=True))
    moved = traffic(mean)
    result = {
        "stage": stage,
        "micro_batch": micro,
        "peak": {"moment": curve.peak.moment, "bytes": curve.peak.columns, "total": curve.peak.total},
        "largest_of_each": curve.largest,
        "fits": curve.peak.total <= room,
        **{name: peak.total for name, peak in other.items()},
        "activations": {name: peak.columns.get("activations", 0) for name, peak in other.items()},
        "largest_micro_batch": largest(fits),
        "flops_per_sample": {name: value / micro for name, value in operations(mean).items()},
        "traffic_bytes_per_micro_batch": moved,
        "pcie_bytes_per_micro_batch": over_pcie(mean),
        "scaling": [],
    }
    for nodes in sorted({machine.nodes, 1, 2, 8, 64}):
        at = dataclasses.replace(machine, nodes=nodes)
        there = dataclasses.replace(setup, ranks=at.ranks)
        found = speed(step_of(models, stage, there, rows.batch(micro, mean=True)), at)
        total = walk(step_of(models, stage, there, rows.batch(micro))).peak.total
        result["scaling"].append({
            "nodes": nodes, "gpus": at.ranks, "peak_bytes": total, "compute_seconds": found.compute_seconds,
            "communication_seconds": found.communication_seconds, "pcie_seconds": found.pcie_seconds,
            "rows_per_step": found.samples,
            "communication_share": found.communication_seconds / found.exposed,
            "step_seconds": [found.hidden, found.exposed], "days": list(found.days(samples)),
        })  # fmt: skip
    return result


def compare_modes(models: Models, machine: Machine, rows: Rows, samples: int) -> dict[str, dict[str, Any]]:
    """Largest peak and days of the stages that have a teacher, for every `teacher.mode` that the run could have."""
    config, found = models.config, {}
    for mode in TEACHER_MODES:
        peaks, low, high = [], 0.0, 0.0
        for stage in config.stages:
            setup = setup_of(config, stage, machine.ranks)
            if mode == "zero3" and setup.zero is None:
                break
            setup = dataclasses.replace(setup, teacher_mode=mode)
            micro = config.stage_training(stage).per_device_train_batch_size
            step = step_of(models, stage, setup, rows.batch(micro))
            if "teacher" not in step.roles:
                continue
            peaks.append(walk(step).peak.total)
            days = speed(step_of(models, stage, setup, rows.batch(micro, mean=True)), machine).days(samples)
            low, high = low + days[0], high + days[1]
        if peaks:
            fits = max(peaks) <= machine.memory_bytes - RESERVE_BYTES
            found[mode] = {"peak_bytes": max(peaks), "fits": fits, "days": [low, high]}
    return found


def largest(fits) -> int:
    """The largest count up to MAX_ROWS that fits (0: not even one row), by halving."""
    low, high = 0, 1
    while high <= MAX_ROWS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return min(low, MAX_ROWS)


def make_plan(config: RunConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every stage's numbers and what they assume.

    Raises:
        ConfigError: a model's config.json is not to be found, or a run that the arithmetic does not cover.
    """
    if min(arguments.gpus, arguments.nodes) < 1:
        raise ConfigError("--gpus and --nodes must be at least 1")
    machine = Machine(
        arguments.gpus, arguments.nodes, arguments.gpu_memory, arguments.peak_tflops * 1e12, arguments.utilisation,
        arguments.link_gbs * 1e9, arguments.network_gbs * 1e9, arguments.pcie_gbs * 1e9,
    )  # fmt: skip
    models = Models(config, {"teacher": arguments.teacher_config, "student": arguments.student_config})
    rows = rows_of(config, models, arguments)
    return {
        "kind": "prediction on paper; nothing was measured",
        "teacher_mode": setup_of(config, "interact", machine.ranks).teacher_mode,
        "machine": dataclasses.asdict(machine),
        "rows": dataclasses.asdict(rows),
        "samples": arguments.samples,
        "reserve_bytes": RESERVE_BYTES,
        "parameters": {role: sum(shape.parameters) for role, shape in models.shapes.items()},
        "stages": [plan_stage(models, stage, machine, rows, arguments.samples) for stage in config.stages],
        "teacher_modes": compare_modes(models, machine, rows, arguments.samples),
    }


# ---- tables ----


def gib(size: float) -> str:
    """Bytes as GiB, or MiB below a tenth."""
    return f"{size / 2**30:.1f}" if size >= 0.05 * 2**30 else (f"{size / 2**20:.0f}M" if size >= 2**19 else "-")


def _at_peak(stage: dict[str, Any], column: str) -> str:
    """A column's share of the peak, and its own largest where that was at another moment."""
    here, largest_ = (gib(sizes.get(column, 0)) for sizes in (stage["peak"]["bytes"], stage["largest_of_each"]))
    return here if here == largest_ else f"{here} ({largest_})"


def _span(low: float, high: float, digits: int = 1) -> str:
    return f"{low:.{digits}f} - {high:.{digits}f}"


def print_plan(plan: dict[str, Any]) -> None:
    """The tables of `vlsi-fast plan`."""
    from rich.console import Console
    from rich.table import Table

    console, machine, rows = Console(), plan["machine"], plan["rows"]
    counts = ", ".join(f"{role} {n / 1e9:.2f}B parameters" for role, n in plan["parameters"].items())
    console.print(
        f"[bold]Prediction on paper, nothing measured.[/bold] {machine['nodes']} x {machine['gpus']} GPUs of "
        f"{gib(machine['memory_bytes'])} GiB; {counts}\n"
        f"memory: rows of {rows['tokens']} tokens, {rows['answers']} of them answers; time: {rows['mean_tokens']} and "
        f"{rows['mean_answers']}; one image of {rows['image_tokens']} tokens a row"
    )
    table = Table("GiB a GPU at the peak (its own largest)", *(s["stage"] for s in plan["stages"]))
    for key, label in COLUMNS.items():
        table.add_row(label, *(_at_peak(s, key) for s in plan["stages"]))
    limit = machine["memory_bytes"] - plan["reserve_bytes"]
    table.add_row(f"total (of {gib(limit)} after {gib(plan['reserve_bytes'])} reserve)", *(
        f"{gib(s['peak']['total'])} {'fits' if s['fits'] else 'TOO MUCH'}" for s in plan["stages"]
    ))  # fmt: skip
    table.add_row("the peak is at", *(s["peak"]["moment"] for s in plan["stages"]))
    for name in ("with_checkpointing", "without_checkpointing"):
        table.add_row(
            f"total (activations) {name.replace('_', ' ')}",
            *(f"{gib(s[name])} ({gib(s['activations'][name])})" for s in plan["stages"]),
        )
    table.add_row("micro-batch, rows", *(str(s["micro_batch"]) for s in plan["stages"]))
    table.add_row("largest that fits", *(str(s["largest_micro_batch"]) for s in plan["stages"]))
    console.print(table)
    names = dict.fromkeys(name for s in plan["stages"] for name in s["flops_per_sample"])
    table = Table("TFLOP a sample", *(s["stage"] for s in plan["stages"]))
    for name in names:
        table.add_row(name, *(f"{s['flops_per_sample'].get(name, 0) / 1e12:.1f}" for s in plan["stages"]))
    table.add_row("all", *(f"{sum(s['flops_per_sample'].values()) / 1e12:.1f}" for s in plan["stages"]))
    table.add_row("GB moved a micro-batch", *(
        f"{sum(s['traffic_bytes_per_micro_batch'].values()) / 1e9:.0f}" for s in plan["stages"]
    ))  # fmt: skip
    if any(s["pcie_bytes_per_micro_batch"] for s in plan["stages"]):
        table.add_row("GB over PCIe a micro-batch", *(
            f"{s['pcie_bytes_per_micro_batch'] / 1e9:.0f}" for s in plan["stages"]
        ))  # fmt: skip
    console.print(table)
    table = Table("stage", "nodes", "GiB a GPU", "compute s", "communication s", "share", "step s", "rows a step",
                  f"days for {plan['samples'] / 1e6:g}M rows")  # fmt: skip
    for s in plan["stages"]:
        for at in s["scaling"]:
            table.add_row(
                s["stage"], str(at["nodes"]), gib(at["peak_bytes"]), f"{at['compute_seconds']:.1f}",
                f"{at['communication_seconds']:.1f}", f"{at['communication_share']:.0%}", _span(*at["step_seconds"]),
                str(at["rows_per_step"]), _span(*at["days"], 1 if at["days"][0] >= 1 else 2),
            )  # fmt: skip
    console.print(table)
    console.print("step and days: from communication wholly hidden behind computation to not at all; PCIe's copies too")
    if not plan["teacher_modes"]:
        return
    days = f"days of its stages for {plan['samples'] / 1e6:g}M rows"
    table = Table("teacher.mode", "GiB a GPU, largest of its stages", "", days)
    for mode, found in plan["teacher_modes"].items():
        table.add_row(
            mode + (" (this plan)" if mode == plan["teacher_mode"] else ""), gib(found["peak_bytes"]),
            "fits" if found["fits"] else "TOO MUCH", _span(*found["days"]),
        )  # fmt: skip
    console.print(table)
    console.print("int8 and nf4: the time of their conversions is not counted")


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Run the command. Returns the exit code: 1 where a stage does not fit."""
    plan = make_plan(load_config(arguments.config, overrides), arguments)
    if arguments.json:
        print(json.dumps(plan, indent=2))
    else:
        print_plan(plan)
    return 0 if all(s["fits"] for s in plan["stages"]) else 1
