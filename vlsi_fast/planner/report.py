"""`vlsi-fast plan`: the planner's numbers as tables and as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from ..config import ConfigError, RunConfig, load_config
from ..sizes import format_count, format_size
from ..teacher import mode_under
from .arguments import Machine
from .build import Models, setup_of, step_of
from .memory import RESERVE_BYTES, Batch, Setup
from .recalled import can_be_cached
from .shapes import ModelShape
from .speed import inside_nodes, operations, over_pcie, speed, traffic
from .walk import walk
from .window import resolved_setup
from .worth import cache_lines, cache_table, worth_of_cache

COLUMNS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "teacher": "teacher",
    "gathered": "gathered layers, heads",
    "inputs": "inputs",
    "activations": "activations",
    "targets": "KL targets",
    "workspace": "head workspace",
}
MAX_ROWS = 1024
TEACHER_MODES = ("zero3", "replicated", "offload", "int8", "nf4", "cached")


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
            return Batch(rows, tokens, rows * min(answers, tokens - 1), patches, masked=rows > 1 or shape.masked)

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
    room = machine.memory_bytes - RESERVE_BYTES

    def setup_at(at: Machine, count: int = micro) -> Setup:
        setup = setup_of(config, stage, at.ranks, node=at.gpus)
        return resolved_setup(models, stage, setup, rows.batch(count), room)

    setup = setup_at(machine)
    curve = walk(step_of(models, stage, setup, rows.batch(micro)))
    other = {}
    for name, on in (("with_checkpointing", True), ("without_checkpointing", False)):
        changed = dataclasses.replace(setup, checkpointing=on)
        changed = resolved_setup(models, stage, changed, rows.batch(micro), room)
        other[name] = walk(step_of(models, stage, changed, rows.batch(micro))).peak

    def fits(count: int) -> bool:
        # a window is chosen for the rows; one that the config names is kept
        return walk(step_of(models, stage, setup_at(machine, count), rows.batch(count))).peak.total <= room

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
        "teacher_window": setup.window,
        "persist_heads": setup.persist_heads,
        "flops_per_sample": {name: value / micro for name, value in operations(mean).items()},
        "traffic_bytes_per_micro_batch": moved,
        "inside_nodes_bytes_per_micro_batch": inside_nodes(mean, moved),
        "pcie_bytes_per_micro_batch": over_pcie(mean),
        "scaling": [],
    }
    for nodes in sorted({machine.nodes, 1, 2, 8, 64}):
        at = dataclasses.replace(machine, nodes=nodes)
        there = setup_at(at)
        found = speed(step_of(models, stage, there, rows.batch(micro, mean=True)), at)
        total = walk(step_of(models, stage, there, rows.batch(micro))).peak.total
        result["scaling"].append(
            {
                "nodes": nodes,
                "gpus": at.ranks,
                "second_shards": there.secondary > 1,
                "teacher_window": there.window,
                "peak_bytes": total,
                "compute_seconds": found.compute_seconds,
                "communication_seconds": found.communication_seconds,
                "pcie_seconds": found.pcie_seconds,
                "rows_per_step": found.samples,
                "communication_share": found.communication_seconds / found.exposed,
                "step_seconds": [found.hidden, found.exposed],
                "days": list(found.days(samples)),
            }
        )
    return result


def compare_modes(models: Models, machine: Machine, rows: Rows, samples: int) -> dict[str, dict[str, Any]]:
    """Largest peak and days of the stages that have a teacher, for every `teacher.mode` that the run could have."""
    config, found = models.config, {}
    for mode in TEACHER_MODES if can_be_cached(config) else TEACHER_MODES[:-1]:
        peaks, low, high = [], 0.0, 0.0
        for stage in config.stages:
            setup = setup_of(config, stage, machine.ranks, node=machine.gpus)
            if mode == "zero3" and setup.zero is None:
                break
            # of a cached teacher, verbalize has itself in the job
            here = mode_under("auto", setup.zero is not None) if mode == "cached" and stage != "interact" else mode
            setup = dataclasses.replace(setup, teacher_mode=here)
            micro = config.stage_training(stage).per_device_train_batch_size
            setup = resolved_setup(models, stage, setup, rows.batch(micro), machine.memory_bytes - RESERVE_BYTES)
            step = step_of(models, stage, setup, rows.batch(micro))
            if "teacher" not in step.roles and step.recalled is None:
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
        arguments.gpus,
        arguments.nodes,
        arguments.gpu_memory,
        arguments.peak_tflops * 1e12,
        arguments.utilisation,
        arguments.link_gbs * 1e9,
        arguments.network_gbs * 1e9,
        arguments.pcie_gbs * 1e9,
    )
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
        "active_parameters": {role: shape.active_parameters for role, shape in models.shapes.items()},
        "stages": [plan_stage(models, stage, machine, rows, arguments.samples) for stage in config.stages],
        "evaluated": [stage for stage in config.stages if config.stage_training(stage).eval_steps is not None],
        "teacher_modes": compare_modes(models, machine, rows, arguments.samples),
        "teacher_cache": worth_of_cache(models, machine, rows, arguments.samples),
    }


# ---- tables ----


BYTES = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
DECIMAL_BYTES = {"GB": 1e9, "MB": 1e6, "KB": 1e3}
FLOPS = {"TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6}


def _unit(largest: float, units: dict[str, float]) -> tuple[str, float]:
    """The first of `units` that the largest number of a table comes to, else the last."""
    return next(((name, size) for name, size in units.items() if largest >= size), list(units.items())[-1])


def _number(value: float) -> str:
    """One digit behind the point, more where that would leave nothing; a dash for nothing."""
    if value == 0:
        return "-"
    return f"{value:.1f}" if value >= 0.95 else f"{value:.1g}" if value >= 0.01 else "<0.01"


def _span(low: float, high: float) -> str:
    """Without spaces, so that no table breaks it."""
    ends = [f"{value:.1f}" if value >= 0.95 else f"{value:.2g}" if value >= 0.01 else "<0.01" for value in (low, high)]
    return "-".join(dict.fromkeys(ends))


def _fits(found: dict[str, Any]) -> str:
    return "fits" if found["fits"] else "TOO MUCH"


def _parameters(plan: dict[str, Any], role: str) -> str:
    found, active = plan["parameters"][role], plan["active_parameters"][role]
    met = f" ({format_count(active)} of them for a token)" if active < found else ""
    return f"{role} {format_count(found)} parameters{met}"


def print_plan(plan: dict[str, Any]) -> None:
    """The tables of `vlsi-fast plan`."""
    from ..tabular import console, print_table

    machine, rows, say = plan["machine"], plan["rows"], console().print
    counts = ", ".join(_parameters(plan, role) for role in plan["parameters"])
    say(
        f"[bold]Prediction on paper, nothing measured.[/bold] {machine['nodes']} x {machine['gpus']} GPUs of "
        f"{format_size(machine['memory_bytes'])}; {counts}\n"
        f"memory: rows of {rows['tokens']} tokens, {rows['answers']} of them answers; time: {rows['mean_tokens']} and "
        f"{rows['mean_answers']}; one image of {rows['image_tokens']} tokens a row"
    )
    print_table(_memory_table(plan))
    print_table(_work_table(plan))
    print_table(_scaling_table(plan))
    if any(at["second_shards"] for s in plan["stages"] for at in s["scaling"]):
        say("several nodes: with second shards in each node (zero_hpz_partition_size), which hold the frozen weights")
    say("step s, days: from communication wholly hidden behind computation to not at all; PCIe's copies too")
    if plan["evaluated"]:
        say(f"evaluations while training ({', '.join(plan['evaluated'])}: training.eval_steps) are not counted")
    if plan["teacher_modes"]:
        print_table(_modes_table(plan))
        say("int8 and nf4: the time of their conversions is not counted; cached: the time to build the cache is not")
    if plan["teacher_cache"]:
        print_table(cache_table(plan["teacher_cache"], plan["samples"]))
        for line in cache_lines(plan["teacher_cache"]):
            say(line, highlight=False)


def _memory_table(plan: dict[str, Any]):
    from rich.table import Table

    stages = plan["stages"]
    unit, size = _unit(max(s["peak"]["total"] for s in stages), BYTES)

    def at_peak(stage: dict[str, Any], column: str) -> str:
        """A column's share of the peak, and its own largest where that was at another moment."""
        sizes = (stage["peak"]["bytes"], stage["largest_of_each"])
        here, largest_ = (_number(each.get(column, 0) / size) for each in sizes)
        return here if here == largest_ else f"{here} ({largest_})"

    table = Table(f"{unit} a GPU at the peak (its own largest)", *(s["stage"] for s in stages))
    for key, label in COLUMNS.items():
        table.add_row(label, *(at_peak(s, key) for s in stages))
    reserve = plan["reserve_bytes"]
    limit = format_size(plan["machine"]["memory_bytes"] - reserve)
    totals = (f"{_number(s['peak']['total'] / size)} {_fits(s)}" for s in stages)
    table.add_row(f"total (of {limit} after {format_size(reserve)} reserve)", *totals)
    table.add_row("the peak is at", *(s["peak"]["moment"] for s in stages))
    for name in ("with_checkpointing", "without_checkpointing"):
        both = (f"{_number(s[name] / size)} ({_number(s['activations'][name] / size)})" for s in stages)
        table.add_row(f"total (activations) {name.replace('_', ' ')}", *both)
    table.add_row("micro-batch, rows", *(str(s["micro_batch"]) for s in stages))
    table.add_row("largest that fits", *(str(s["largest_micro_batch"]) for s in stages))
    if any(s["teacher_window"] > 1 for s in stages):
        windows = (str(s["teacher_window"]) if s["stage"] == "interact" else "-" for s in stages)
        table.add_row("teacher's window, micro-batches", *windows)
    table.add_row("frozen heads kept for the step", *("yes" if s["persist_heads"] else "no" for s in stages))
    return table


def _work_table(plan: dict[str, Any]):
    from rich.table import Table

    stages = plan["stages"]
    all_ = [sum(s["flops_per_sample"].values()) for s in stages]
    unit, size = _unit(max(all_), FLOPS)
    table = Table(f"{unit} a sample", *(s["stage"] for s in stages))
    for name in dict.fromkeys(name for s in stages for name in s["flops_per_sample"]):
        table.add_row(name, *(_number(s["flops_per_sample"].get(name, 0) / size) for s in stages))
    table.add_row("all", *(_number(total / size) for total in all_))
    moved = {
        "moved": [sum(s["traffic_bytes_per_micro_batch"].values()) for s in stages],
        "of it inside a node": [s["inside_nodes_bytes_per_micro_batch"] for s in stages],
        "over PCIe": [s["pcie_bytes_per_micro_batch"] for s in stages],
    }
    for what, sizes in moved.items():
        if what == "moved" or any(sizes):
            unit, size = _unit(max(sizes), DECIMAL_BYTES)
            table.add_row(f"{unit} {what} a micro-batch", *(_number(each / size) for each in sizes))
    return table


def _scaling_table(plan: dict[str, Any]):
    """Narrow enough for 80 columns."""
    from rich.table import Table

    unit, size = _unit(max(at["peak_bytes"] for s in plan["stages"] for at in s["scaling"]), BYTES)
    days = f"days for {plan['samples'] / 1e6:g}M rows"
    table = Table(
        "stage",
        "nodes",
        f"{unit} a GPU",
        "compute s",
        "comm. s",
        "share",
        "step s",
        "rows a step",
        days,
        box=None,
        padding=(0, 2, 0, 0),
        pad_edge=False,
    )
    for s in plan["stages"]:
        for at in s["scaling"]:
            table.add_row(
                s["stage"],
                str(at["nodes"]),
                _number(at["peak_bytes"] / size),
                _number(at["compute_seconds"]),
                _number(at["communication_seconds"]),
                f"{at['communication_share']:.0%}",
                _span(*at["step_seconds"]),
                str(at["rows_per_step"]),
                _span(*at["days"]),
            )
    return table


def _modes_table(plan: dict[str, Any]):
    from rich.table import Table

    modes = plan["teacher_modes"]
    unit, size = _unit(max(found["peak_bytes"] for found in modes.values()), BYTES)
    days = f"days of its stages for {plan['samples'] / 1e6:g}M rows"
    table = Table("teacher.mode", f"{unit} a GPU, largest of its stages", "", days)
    for mode, found in modes.items():
        name = mode + (" (this plan)" if mode == plan["teacher_mode"] else "")
        table.add_row(name, _number(found["peak_bytes"] / size), _fits(found), _span(*found["days"]))
    return table


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Run the command. Returns the exit code: 1 where a stage does not fit."""
    plan = make_plan(load_config(arguments.config, overrides), arguments)
    if arguments.json:
        print(json.dumps(plan, indent=2))
    else:
        print_plan(plan)
    return 0 if all(s["fits"] for s in plan["stages"]) else 1
