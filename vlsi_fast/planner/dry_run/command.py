"""`vlsi-fast check --dry-run`: what `run.py` found, as a table and as JSON."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from ...config import RunConfig
from ...sizes import format_size
from ..build import Models
from ..report import COLUMNS, Rows, rows_of
from .gpus import GPUS, Gpu
from .kernels import Launches
from .rows import rows_that_fit
from .run import Found, dry_run

UNPROVEN = (
    "Not proven by this: numbers (tensors have none), speed, ZeRO-3's sharding and its collectives (here one GPU holds "
    "all, and teacher.window is 1), what kernels need beside their results, and what the Trainer does around a step."
)


def main(config: RunConfig, arguments: argparse.Namespace) -> int:
    """Run it and print. Returns the exit code: 1 where a stage does not go through, or a kernel spills."""
    gpu = GPUS[arguments.gpu]
    models = Models(config, {"teacher": arguments.teacher_config, "student": arguments.student_config})
    rows = rows_that_fit(rows_of(config, models), config)
    stages = dry_run(config, models, rows, gpu)
    if arguments.json:
        print(json.dumps(as_json(stages, rows, gpu), indent=2))
    else:
        print_report(stages, rows, gpu)
    return 1 if any(found.problem or spills(found) for found in stages) else 0


def spills(found: Found) -> list[Launches]:
    """Kernels that keep registers in memory."""
    return [kernel for kernel in found.kernels if kernel.spill_bytes]


def as_json(stages: list[Found], rows: Rows, gpu: Gpu) -> dict[str, Any]:
    """Everything that was found."""
    return {
        "kind": "one step of each stage on a GPU that is not there; nothing was measured",
        "gpu": dataclasses.asdict(gpu),
        "rows": dataclasses.asdict(rows),
        "not_proven": UNPROVEN,
        "stages": [dataclasses.asdict(found) | {"memory_differs": found.memory_differs} for found in stages],
    }


def print_report(stages: list[Found], rows: Rows, gpu: Gpu) -> None:
    """Tables of all stages beside each other, then what each has to say."""
    from ...tabular import console, print_table

    say = console().print
    say(
        f"[bold]One step of each stage on a {gpu.name} that is not there.[/bold] Rows of {rows.tokens} tokens, "
        f"{rows.answers} of them answers, {rows.image_tokens} of an image; all of it on one GPU, nothing sharded",
        highlight=False,
    )
    for found in stages:
        if found.problem:
            say(f"[bold]{found.stage} does not go through:[/bold]", highlight=False)
            say(found.problem, markup=False, highlight=False)
    done = [found for found in stages if not found.problem]
    if done:
        for table in (_memory_table(done), _work_table(done), _kernel_table(done), _wait_table(done)):
            if table.row_count:
                print_table(table)
    for found in done:
        for note in found.notes:
            say(f"{found.stage}: {note}", markup=False, highlight=False)
        if found.memory_differs:
            text = "peak and planner are more than 5% apart, so one is wrong: please report it with this config"
            say(f"{found.stage}: {text}", markup=False, highlight=False)
        for kernel in spills(found):
            say(f"{found.stage}: {kernel.kernel} ({kernel.signature}) spills registers", markup=False, highlight=False)
    say(UNPROVEN, markup=False, highlight=False)


def _memory_table(stages: list[Found]):
    from rich.table import Table

    table = Table("at the peak, planner", *(found.stage for found in stages))
    for column in _names(stages, "peak", "planned_peak"):
        label = "activations, targets, workspace" if column == "activations" else COLUMNS.get(column, column)
        sizes = [(found.peak.get(column, 0), found.planned_peak.get(column, 0)) for found in stages]
        table.add_row(label, *(f"{format_size(here)}, {format_size(planned)}" for here, planned in sizes))
    totals = [(sum(found.peak.values()), sum(found.planned_peak.values())) for found in stages]
    table.add_row("total", *(f"{format_size(here)}, {format_size(planned)}" for here, planned in totals))
    table.add_row("the peak is in", *(f"{found.peak_part},\n{found.planned_moment}" for found in stages))
    return table


def _work_table(stages: list[Found]):
    from rich.table import Table

    table = Table("TFLOP, planner (launches)", *(found.stage for found in stages))

    def cell(found: Found, part: str) -> str:
        here, planned = (each.get(part, 0) / 1e12 for each in (found.flops, found.planned_flops))
        launches = found.operators.get(part, 0)
        if not launches and not planned:
            return "-"
        return f"{_number(here)}, {_number(planned)} ({launches})" if here or planned else f"({launches})"

    for part in _names(stages, "flops", "planned_flops", "operators"):
        table.add_row(part, *(cell(found, part) for found in stages))
    sums = [[sum(each.values()) for each in (found.flops, found.planned_flops, found.operators)] for found in stages]
    table.add_row("all", *(f"{_number(a / 1e12)}, {_number(b / 1e12)} ({c})" for a, b, c in sums))
    return table


def _kernel_table(stages: list[Found]):
    from rich.table import Table

    table = Table("Triton kernel", "registers", "spills", "shared", *(found.stage for found in stages))
    rows: dict[tuple[str, str], dict[str, Launches]] = {}
    for found in stages:
        for kernel in found.kernels:
            rows.setdefault((kernel.kernel, kernel.signature), {})[found.stage] = kernel
    for (name, signature), where in sorted(rows.items()):
        kernel = next(iter(where.values()))
        counts = (str(where[found.stage].count) if found.stage in where else "-" for found in stages)
        size = format_size(kernel.shared_bytes)
        table.add_row(f"{name}\n{signature}", str(kernel.registers), str(kernel.spill_bytes), size, *counts)
    return table


def _wait_table(stages: list[Found]):
    from rich.table import Table

    table = Table("the host waits for the GPU at", *(found.stage for found in stages))
    for place in dict.fromkeys(place for found in stages for place in found.waits):
        table.add_row(place, *(str(found.waits.get(place, "-")) for found in stages))
    return table


def _names(stages: list[Found], *fields: str) -> list[str]:
    """Keys of these fields of all stages, each once, in order."""
    return list(dict.fromkeys(name for field in fields for found in stages for name in getattr(found, field)))


def _number(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.3g}"
