"""Peak memory of each operator and of eager PyTorch against tokens, vocabulary and number of pairs.

    python benchmarks/profile_memory.py [--shapes 7b-to-2b:2048] [--dtype bfloat16]

A number is the most memory alive at once during a step (gradients included) beyond the inputs; outputs count. On a GPU,
without --quick, also the bar: 72b-to-7b, N 4096, V 152064, 7 x 20 layers, at most 1 GiB beyond inputs and outputs, with
what the student pass keeps for backward (S N Ds 4 bytes) counted and shown. Some 70 points of at most 0.5 s a step, two
steps each, and their inputs: under a minute on an H200.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import bench_divergence
import bench_layer_kl
import bench_verb_ffn
import bench_verbalize_ce
import torch
from harness import NO_MEMORY, OK, Case, Run, attempt, bar, new_row, parse, tidy
from inputs import HeadProblem, LayerProblem, PairProblem
from meter import peak_extra_bytes, tensor_bytes
from report import document, finish
from shapes import TOKENS, Shape, shape

from vlsi_kernels import layer_kl_matrix, teacher_targets

SHAPES = {"cuda": ["7b-to-2b:2048"], "cpu": ["small"]}
BETA = 0.5
BAR_BYTES = 2**30


def ours(device: torch.device) -> str:
    """The implementation that "auto" takes."""
    return "triton" if device.type == "cuda" else "torch"


def cases(run: Run, sizes: Shape, pairs: int | None = None) -> dict[str, Callable[[], Case]]:
    """Name -> how to build the case; inputs are made there, so that only one problem is alive at a time."""
    impl, where = ours(run.device), (run.device, run.dtype)

    def layer_kl(build: Callable) -> Case:
        problem = LayerProblem(sizes, *where)
        everything = [(s, l) for l in range(sizes.teacher_layers) for s in range(sizes.student_layers)]
        return build(problem, everything[:pairs] if pairs else problem.matched)

    found = {
        "layer KL, ours": lambda: layer_kl(lambda p, drawn: bench_layer_kl.our_case(p, impl, drawn)),
        "layer KL, eager": lambda: layer_kl(bench_layer_kl.eager_case),
    }
    if pairs:
        return found
    return found | {
        "cross-entropy, ours": lambda: bench_verbalize_ce.our_case(HeadProblem(sizes, *where), impl),
        "cross-entropy, eager": lambda: bench_verbalize_ce.eager_case(HeadProblem(sizes, *where), False),
        "divergence, ours": lambda: bench_divergence.our_case(PairProblem(sizes, *where), BETA, impl),
        "divergence, eager": lambda: bench_divergence.eager_case(PairProblem(sizes, *where), BETA, False),
    }


def networks(run: Run, sizes: Shape) -> dict[str, Callable[[], Case]]:
    """The verbalizer's network, which knows neither vocabulary nor pairs."""
    problem = partial(bench_verb_ffn.Problem, sizes, run.device, run.dtype, "weights")
    return {
        "verb-FFN, ours": lambda: bench_verb_ffn.our_case(problem(), ours(run.device), False),
        "verb-FFN, eager": lambda: bench_verb_ffn.case_of(problem(), bench_verb_ffn.eager),
    }


def axes(run: Run) -> dict[str, list[tuple[int, dict[str, Callable[[], Case]]]]]:
    """Axis -> (value, cases) of each point."""
    base = run.shapes[0]
    gpu = run.device.type == "cuda"
    tokens = TOKENS if gpu else [base.tokens * k for k in (1, 2, 4)]
    rows = [base.vocab * k // 8 for k in (1, 2, 4, 8)]
    every = base.student_layers * base.teacher_layers
    pairs = sorted({base.student_layers, every // 4, every // 2, every} - {0})
    return {
        "tokens": [(n, cases(run, replace(base, tokens=n)) | networks(run, replace(base, tokens=n))) for n in tokens],
        "vocabulary": [(v, cases(run, replace(base, student_rows=v, teacher_rows=v))) for v in rows],
        "pairs with a gradient": [(p, cases(run, base, p)) for p in pairs],
    }


def measure_point(builders: dict[str, Callable[[], Case]], run: Run) -> list[dict[str, Any]]:
    """One row a case: its peak on the second step, when kernels are built and the libraries have their workspaces."""
    rows = []
    for name, build in builders.items():
        row = new_row(name.replace(", ours", "").replace(", eager", ""))
        row |= {"variant": name.rsplit(", ", 1)[1], "role": "ours" if name.endswith("ours") else "peer"}
        case = attempt(row, build, building=True)
        if case is not None and attempt(row, lambda case=case: (case.step(), True)):
            row["peak_extra_bytes"] = attempt(row, lambda case=case: peak_extra_bytes(case.step, run.device))
        del case
        tidy(run.device)
        rows.append({k: row[k] for k in ("name", "variant", "role", "status", "reason", "peak_extra_bytes")})
    return rows


def memory_bar(run: Run) -> dict[str, Any]:
    """The bar's case in its three phases. Outputs are taken to be alive at the peak of the phase that makes them."""
    sizes = replace(shape("72b-to-7b:4096"), student_rows=152064, teacher_rows=152064)
    problem, kept_alive = LayerProblem(sizes, run.device, run.dtype), {}
    heads = problem.teacher_weight, problem.student_weight
    drawn = tuple(list(side) for side in zip(*problem.matched))

    def teachers() -> None:
        kept_alive["targets"] = teacher_targets(problem.teacher, *heads, impl="triton")

    def forward() -> None:
        kept_alive["leaf"] = problem.student.detach().requires_grad_()
        kept_alive["kl"] = layer_kl_matrix(kept_alive["leaf"], heads[1], kept_alive["targets"], impl="triton")

    def backward() -> None:
        (kept_alive["gradient"],) = torch.autograd.grad(kept_alive["kl"][drawn].sum(), kept_alive["leaf"])

    peaks = {}
    for _ in range(2):  # the first time builds kernels and workspaces
        kept_alive.clear()
        for phase in (teachers, forward, backward):
            peaks[phase.__name__] = peak_extra_bytes(phase, run.device)
    kept = 4 * problem.student.numel()
    outputs = {
        "teachers": tensor_bytes(*kept_alive["targets"][:2]),
        "forward": tensor_bytes(kept_alive["kl"]),
        "backward": tensor_bytes(kept_alive["gradient"]),
    }
    beyond = {name: peaks[name] - outputs[name] for name in peaks}
    beyond["backward"] += kept  # alive since the forward phase
    value = max(beyond.values())
    return {
        "shape": vars(sizes),
        "peak_bytes": peaks,
        "output_bytes": outputs,
        "beyond_inputs_and_outputs_bytes": beyond,
        "kept_for_backward_bytes": kept,
        "bars": [
            bar("bytes beyond inputs and outputs", value, at_most=BAR_BYTES),
            bar("the same without what is kept for backward", max(beyond["teachers"], value - kept), at_most=BAR_BYTES),
        ],
    }


def print_points(parts: list[dict[str, Any]]) -> None:
    """MiB; one line a case and axis, one column a point."""
    from rich.console import Console
    from rich.table import Table

    for axis in dict.fromkeys(part["axis"] for part in parts):
        points = [part for part in parts if part["axis"] == axis]
        table = Table("MiB", *(str(part["value"]) for part in points), title=f"peak extra memory against {axis}")
        for i, first in enumerate(points[0]["rows"]):
            table.add_row(f"{first['name']}, {first['variant']}", *(_cell(part["rows"][i]) for part in points))
        Console(width=140).print(table)


def _cell(row: dict[str, Any]) -> str:
    if row["status"] == OK:
        return f"{row['peak_extra_bytes'] / 2**20:,.1f}"
    return "no memory" if row["status"] == NO_MEMORY else row["status"]


def draw(figure, parts: list[dict[str, Any]]) -> None:
    """Three panels, one an axis; logarithmic, ours solid and eager dashed in one colour an operator."""
    names = list(dict.fromkeys(part["axis"] for part in parts))
    figure.set_size_inches(5 * len(names), 4.2)
    colors = {}
    for panel, axis in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        points = [part for part in parts if part["axis"] == axis]
        for i, first in enumerate(points[0]["rows"]):
            known = [(part["value"], part["rows"][i]["peak_extra_bytes"]) for part in points]
            known = [(x, y / 2**20) for x, y in known if y]
            color = colors.setdefault(first["name"], f"C{len(colors)}")
            style = "-o" if first["variant"] == "ours" else "--x"
            panel.plot(*zip(*known), style, color=color, label=f"{first['name']}, {first['variant']}", markersize=4)
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="peak extra memory, MiB")
        panel.set_xticks([part["value"] for part in points], [str(part["value"]) for part in points], fontsize=7)
        panel.minorticks_off()
        panel.legend(fontsize=7)


def main() -> int:
    """Sweep, print, write."""
    run = parse(__doc__, "profile_memory", SHAPES, timed=False, compared=False)
    parts = []
    for axis, points in axes(run).items():
        for value, builders in points:
            parts.append({"axis": axis, "value": value, "rows": measure_point(builders, run)})
    swept = list(parts)
    print_points(swept)
    limit = None
    if run.device.type == "cuda" and not run.arguments["quick"]:
        row = new_row("ours, the bar's case")
        limit = attempt(row, lambda: memory_bar(run))
        parts.append({"axis": "bar", "value": 0, "rows": [row]})
        for one in limit["bars"] if limit else []:
            print(f"{one['name']}: {one['value'] / 2**30:.3f} GiB (at most {BAR_BYTES / 2**30:g}), met: {one['met']}")
    result = document(run, shape=vars(run.shapes[0]), beta=BETA, parts=parts, memory_bar=limit)
    return finish(run, result, lambda figure: draw(figure, swept))


if __name__ == "__main__":
    sys.exit(main())
