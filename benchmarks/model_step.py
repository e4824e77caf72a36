"""A step's time by arithmetic: what a dry run launches, on rooflines of GPUs that are not there. Nothing is measured.

    python benchmarks/model_step.py [--config configs/qwen2vl_7b_to_2b.yaml ...] [--gpus a100 h100] [--ranks 8]

The stages' own code runs once on tensors without numbers (`vlsi-fast check --dry-run`), and each launch is noted with
its operations and the bytes of its inputs and results. A launch takes the longest of

    operations / peak of its dtype         bytes / bandwidth of the memory         a floor for launching anything

and a part of the step the sum of its launches. Peaks and bandwidths are the datasheets' (planner/dry_run/gpus.py).
"bound": all of them reached, so that a measured time can only be longer. "expected": the shares of them that good
kernels reach (`--product-share`, `--bandwidth-share`): an assumption. Of an optimizer step, the micro-batch's parts
count as often as gradients are accumulated, and the optimizer's are divided over the ranks, as ZeRO-3 divides them.

Left out: whatever overlaps, the allocator, the host where it is slower than the GPU, the reading of rows, and
communication, whose bytes and seconds are the planner's and stand in a line of their own. Attention counts all pairs of
positions, also those that a causal mask hides. The optimizer is the operators of `torch.optim.AdamW`, not a fused one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from report import ROOT, origin

from vlsi_fast.config import RunConfig, load_config
from vlsi_fast.planner.arguments import Machine
from vlsi_fast.planner.build import Models, setup_of, step_of
from vlsi_fast.planner.dry_run.gpus import GPUS, Gpu
from vlsi_fast.planner.dry_run.rows import rows_that_fit
from vlsi_fast.planner.dry_run.run import Found, run_stage
from vlsi_fast.planner.dry_run.tape import Kernel
from vlsi_fast.planner.report import Rows, rows_of
from vlsi_fast.planner.speed import speed, traffic

CONFIGS = ("qwen2vl_7b_to_2b", "qwen2vl_72b_to_7b")
NAMES = ("a100", "h100", "h200", "b200", "rtx4090")


@dataclasses.dataclass(frozen=True)
class Roofline:
    """What a launch is held against."""

    peaks: dict[str, float]
    """Operations a second of products, by dtype."""
    bandwidth: float
    """Bytes a second."""
    floor: float
    """Seconds that any launch takes."""

    @classmethod
    def of(cls, gpu: Gpu, floor: float, product_share: float = 1.0, bandwidth_share: float = 1.0) -> Roofline:
        """That of a GPU, or shares of it."""
        peaks = dict.fromkeys(("bfloat16", "float16"), gpu.half_flops)
        peaks |= {"float32": gpu.float_flops, "float64": gpu.double_flops}
        peaks = {kind: peak * product_share for kind, peak in peaks.items()}
        return cls(peaks, gpu.bandwidth * bandwidth_share, floor)

    def seconds(self, kernel: Kernel) -> float:
        """Of one launch. Raises KeyError for products in a dtype without a peak."""
        products = kernel.flops / self.peaks[kernel.dtype] if kernel.flops else 0.0
        return max(products, kernel.moved / self.bandwidth, self.floor)

    def bound_by(self, kernel: Kernel) -> str:
        """What decides a launch's time: products, memory or launch."""
        seconds = self.seconds(kernel)
        if seconds == self.floor:
            return "launch"
        return "memory" if seconds == kernel.moved / self.bandwidth else "products"


def parts_of(work: list[tuple[Kernel, int]], roofline: Roofline, accumulation: int, ranks: int) -> dict[str, float]:
    """Seconds of each part of one optimizer step of one rank."""
    found: Counter[str] = Counter()
    for kernel, count in work:
        times = 1 / ranks if kernel.part == "optimizer" else accumulation
        found[kernel.part] += count * times * roofline.seconds(kernel)
    return dict(found)


def bounds_of(work: list[tuple[Kernel, int]], roofline: Roofline) -> dict[str, float]:
    """Share of a micro-batch's seconds that products, memory and launching decide."""
    found: Counter[str] = Counter()
    for kernel, count in work:
        if kernel.part != "optimizer":
            found[roofline.bound_by(kernel)] += count * roofline.seconds(kernel)
    whole = sum(found.values())
    return {name: found[name] / whole for name in ("products", "memory", "launch")}


def predict(found: Found, step: Any, gpu: Gpu, options: argparse.Namespace) -> dict[str, Any]:
    """One stage on one GPU of `options.ranks`."""
    floor = options.launch_us * 1e-6
    bound = Roofline.of(gpu, floor)
    expected = Roofline.of(gpu, floor, options.product_share, options.bandwidth_share)
    rest = found.work, step.setup.accumulation, options.ranks
    parts, likely = (parts_of(rest[0], each, *rest[1:]) for each in (bound, expected))
    machine = Machine(gpus=options.ranks, peak_flops=gpu.half_flops, link_bytes=gpu.link, memory_bytes=gpu.memory_bytes)
    planned = speed(step, machine)
    return {
        "bound_seconds": sum(parts.values()),
        "bound_parts": parts,
        "expected_seconds": sum(likely.values()),
        "expected_parts": likely,
        "decided_by": bounds_of(found.work, bound),
        "planner_compute_seconds": planned.compute_seconds,
        "planner_utilisation": machine.utilisation,
        "expected_over_planner": sum(likely.values()) / planned.compute_seconds,
        "zero3_seconds": planned.communication_seconds,
    }


def stage_result(config: RunConfig, models: Models, name: str, rows: Rows, options: argparse.Namespace) -> dict:
    """One stage of a config: what was launched, and the times."""
    found = run_stage(config, models, name, rows, GPUS[options.dry_gpu])
    if found.problem:
        raise SystemExit(f"{name} does not go through: {found.problem}")
    setup = dataclasses.replace(setup_of(config, name, options.ranks), window=1)
    step = step_of(models, name, setup, lambda shape: found.batches[shape.name])
    return {
        "stage": name,
        "micro_batch": config.stage_training(name).per_device_train_batch_size,
        "accumulation": setup.accumulation,
        "batches": {role: dataclasses.asdict(batch) for role, batch in step.batches.items()},
        "flops": found.flops,
        "planner_flops": found.planned_flops,
        "launches": found.operators,
        "moved_bytes": _summed(found.work, lambda kernel: kernel.moved),
        "largest": _largest(found.work, GPUS[options.gpus[0]], options.launch_us * 1e-6),
        "zero3_bytes": traffic(step),
        "gpus": {gpu: predict(found, step, GPUS[gpu], options) for gpu in options.gpus},
        "notes": found.notes,
    }


def _summed(work: list[tuple[Kernel, int]], of) -> dict[str, int]:
    found: Counter[str] = Counter()
    for kernel, count in work:
        found[kernel.part] += count * of(kernel)
    return dict(found)


def _largest(work: list[tuple[Kernel, int]], gpu: Gpu, floor: float, most: int = 12) -> list[dict[str, Any]]:
    """Operators that take most of a micro-batch on the first GPU."""
    roofline, found, launches = Roofline.of(gpu, floor), Counter(), Counter()
    for kernel, count in work:
        key = kernel.part, kernel.name, kernel.dtype
        found[key] += count * roofline.seconds(kernel)
        launches[key] += count
    names = "part", "operator", "dtype"
    return [
        dict(zip(names, key)) | {"seconds": seconds, "launches": launches[key]}
        for key, seconds in found.most_common(most)
    ]


def config_result(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All stages of a config."""
    config = load_config(path)
    models = Models(config)
    rows = rows_that_fit(rows_of(config, models), config)
    return {
        "config": path.stem,
        "rows": dataclasses.asdict(rows),
        "stages": [stage_result(config, models, name, rows, options) for name in config.stages],
    }


def tables(result: dict[str, Any], names: list[str]):
    """One table a stage of a config: parts down, GPUs across."""
    from rich.table import Table

    for stage in result["stages"]:
        title = f"{result['config']}, {stage['stage']}: seconds of a step, bound and expected; not measured"
        table = Table(f"{stage['accumulation']} micro-batches", *names, title=title)
        gpus = [stage["gpus"][name] for name in names]
        for part in gpus[0]["bound_parts"]:
            table.add_row(part, *(f"{g['bound_parts'][part]:.3g}, {g['expected_parts'][part]:.3g}" for g in gpus))
        table.add_row("all", *(f"{g['bound_seconds']:.3g}, {g['expected_seconds']:.3g}" for g in gpus))
        table.add_row("planner, 45% of the peak", *(f"{g['planner_compute_seconds']:.3g}" for g in gpus))
        shares = (" ".join(f"{share:.0%}" for share in g["decided_by"].values()) for g in gpus)
        table.add_row("bound by products, memory, launch", *shares)
        table.add_row("ZeRO-3, beside or behind it", *(f"{g['zero3_seconds']:.3g}" for g in gpus))
        yield table


def main() -> int:
    """Predict, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = [ROOT / "configs" / f"{name}.yaml" for name in CONFIGS]
    parser.add_argument("--config", nargs="+", type=Path, default=default, help="YAML files of runs")
    parser.add_argument("--gpus", nargs="+", choices=tuple(GPUS), default=list(NAMES), help="default: %(default)s")
    parser.add_argument("--dry-gpu", choices=tuple(GPUS), default="a100", help="that kernels are compiled for")
    parser.add_argument("--ranks", type=int, default=8, help="GPUs of one machine that share a step")
    parser.add_argument("--launch-us", type=float, default=4.0, help="least microseconds of a launch")
    parser.add_argument("--product-share", type=float, default=0.7, help="of a product's peak, as expected")
    parser.add_argument("--bandwidth-share", type=float, default=0.85, help="of the memory's bandwidth, as expected")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the JSON")
    options = parser.parse_args()
    from vlsi_fast.tabular import print_table

    parts = []
    for path in options.config:
        parts.append(config_result(path, options))
        for table in tables(parts[-1], options.gpus):
            print_table(table)
    arguments = {name: value for name, value in vars(options).items() if name not in ("out", "config")}
    result = {
        "benchmark": "model_step",
        "kind": "derived from launches, operations and bytes; nothing was measured",
        "arguments": arguments,
        "gpus": {name: dataclasses.asdict(GPUS[name]) for name in options.gpus},
        **origin(torch.device("cpu")),
        "parts": parts,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "model_step.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
