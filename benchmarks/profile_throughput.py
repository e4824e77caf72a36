"""A training step of each stage: where the time goes, tokens per second, model FLOP utilisation.

    python benchmarks/profile_throughput.py [--stages interact] [--accumulation 4] [--trace]

The step is the trainer's own (`training_steps.py`): forward, backward and optimizer as `vlsi_fast.stages` makes them,
on models with random weights. "eager interact" is the same with KLs from materialized logits. GPU:
configs/qwen2vl_7b_to_2b.yaml at its real sizes; micro-batches of 8 rows of a 560 x 560 image (400 tokens), 66 further
tokens before the answer and 256 of answer. CPU: the same config with both models made small.

Utilisation = model operations / (time of a step x speed of one large matrix product measured in this run). Operations
are those that the run's own `tflops_per_rank` counts (`planner/speed.py`): what checkpointing computes again is not
among them.

Needs what the trainer needs: pydantic, accelerate, peft. Where one is missing the stages are left out, and told so.

Estimate on an H200: steps of 0.3 to 0.6 s, 12 of each stage, and as long again to make 8 billion random weights twice:
about a minute.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from harness import ABSENT, OK, Absent, Run, attempt, new_row, parse, ratio, seconds_of, tidy
from report import document, finish
from roofline import gemm_peak
from shapes import Backbone, Vision

if TYPE_CHECKING:
    from training_steps import Setting

STAGES = ("verbalize", "interact", "sft")
NEEDED = ("pydantic", "accelerate", "peft")
"""Packages of the trainer that a machine for the operators alone may lack."""
COLORS = [f"C{i}" for i in range(10)] + ["black", "tab:pink", "gold"]
SMALL = (
    Backbone(128, 256, 8, 2, 1, 4096, True, (2, 4, 6)),
    Backbone(256, 512, 8, 4, 2, 4160, False, (2, 4, 6)),
    Vision(64, 2, 2, 2, 8, 2),
)
"""Student, teacher and their vision towers on a CPU."""


def setting_for(device: torch.device) -> Setting:
    """Models and rows by device."""
    from training_steps import Setting

    if device.type == "cuda":
        return Setting("qwen2vl_7b_to_2b.yaml", rows=8, tokens=722, image_tokens=400, answer_tokens=256)
    return Setting("qwen2vl_7b_to_2b.yaml", rows=2, tokens=80, image_tokens=16, answer_tokens=32, small=SMALL)


def require_packages() -> None:
    """Raises Absent where the trainer cannot be imported."""
    missing = []
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            missing.append(name)
    if missing:
        raise Absent(f"the trainer's step needs {', '.join(missing)}: pip install {' '.join(missing)}")


# ---- measuring ----


def profile_stage(name: str, setting: Setting, run: Run) -> dict[str, Any]:
    """A row: median step and parts, tokens per second, operations. name: of the stage, "eager" before it or not."""
    from training_steps import WARM_UP, Clock, Parts, build, config_of, make_eager, models_of, watch

    stage_name, eager = name.removeprefix("eager "), name.startswith("eager ")

    trace = run.arguments["trace"]
    dtype = str(run.dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(setting, Path(folder), WARM_UP + run.rounds + trace, dtype)
        stage, trainer = build(stage_name, config, models_of(config, setting), setting)
        if eager:
            make_eager(trainer)
        parts, recording = Parts(run.device), _Recording(name.replace(" ", "_"), run)

        def finished(step: int) -> None:
            if step == WARM_UP and run.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(run.device)
            if step == WARM_UP + run.rounds and trace:
                recording.begin()

        clock = Clock(parts, finished)
        watch(trainer, parts)
        trainer.add_callback(clock)
        trainer.train()
        if trace:
            recording.end()
        records = [json.loads(line) for line in trainer.metrics_path.read_text().splitlines()]
    timed = slice(WARM_UP, WARM_UP + run.rounds)
    times, by_part, record = clock.seconds[timed], clock.by_part[timed], records[-1]
    seconds, rows = statistics.median(times), record["rows"]
    return {
        "seconds": seconds,
        "seconds_range": [min(times), max(times)],
        "samples": len(times),
        "parts": {name: statistics.median(p.get(name, 0.0) for p in by_part) for name in by_part[0]},
        "tokens_per_second": rows * setting.tokens / seconds,
        "answer_tokens_per_second": record["answer_tokens"] / seconds,
        "model_operations": record["tflops_per_rank"] * 1e12 * record["step_seconds"],
        "peak_bytes": torch.cuda.max_memory_allocated(run.device) if run.device.type == "cuda" else None,
        "attention": stage.attention,
        "padding_free": stage.padding_free,
        "liger": stage.liger,
        "losses": [one["loss"] for one in records],
        "parameters_trained": sum(p.numel() for p in trainer.module.parameters() if p.requires_grad),
    }


class _Recording:
    """One step as a Chrome trace, `trace_<name>.json.gz`."""

    def __init__(self, name: str, run: Run):
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (run.device.type == "cuda")
        self.profile, self.path = profile(activities=activities), run.out / f"trace_{name}.json.gz"

    def begin(self) -> None:
        self.profile.__enter__()

    def end(self) -> None:
        self.profile.__exit__(None, None, None)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.profile.export_chrome_trace(str(self.path))


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Parts of each stage's step, in ms and as shares."""
    from rich.console import Console
    from rich.table import Table

    names = list(dict.fromkeys(name for row in rows for name in row.get("parts", {})))
    table = Table("ms a step", *(row["name"] for row in rows), title="where a training step's time goes")
    for name in names:
        table.add_row(name, *(_cell(row, name) for row in rows))
    table.add_section()
    for name, unit, digits in (
        ("seconds", 1e3, 1),
        ("tokens_per_second", 1, 0),
        ("answer_tokens_per_second", 1, 0),
        ("utilisation", 1, 3),
    ):
        cells = [f"{row[name] * unit:,.{digits}f}" if row["status"] == OK else row["status"] for row in rows]
        table.add_row({"seconds": "all"}.get(name, name.replace("_", " ")), *cells)
    Console(width=110).print(table)


def _cell(row: dict[str, Any], part: str) -> str:
    if part not in row.get("parts", {}):
        return "-"
    return f"{row['parts'][part] * 1e3:.2f} ({row['parts'][part] / row['seconds']:.1%})"


def draw(figure, rows: list[dict[str, Any]]) -> None:
    """A stacked bar a stage."""
    figure.set_size_inches(10, 3.2)
    axes = figure.subplots()
    done = [row for row in rows if row["status"] == OK]
    left = [0.0] * len(done)
    for i, name in enumerate(dict.fromkeys(name for row in done for name in row["parts"])):
        values = [row["parts"].get(name, 0.0) * 1e3 for row in done]
        axes.barh([row["name"] for row in done], values, left=left, label=name, color=COLORS[i])
        left = [a + b for a, b in zip(left, values)]
    axes.set_xlabel("ms a step")
    if done:
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def main() -> int:
    """Profile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of an optimizer step")
    parser.add_argument("--trace", action="store_true", help="write a Chrome trace of one step of each stage")
    run = parse(__doc__, "profile_throughput", parser=parser, compared=False)
    rows = [{**new_row(f"ours {stage}"), "name": stage} for stage in run.arguments["stages"]]
    rows += [new_row("eager interact")] * ("interact" in run.arguments["stages"])
    if attempt(rows[0], lambda: require_packages() or True) is None:
        rows = [row | {"status": ABSENT, "reason": rows[0]["reason"]} for row in rows]
        print(f"left out: {rows[0]['reason']}")
        return finish(run, document(run, parts=[{"rows": rows}]), lambda figure: draw(figure, rows))
    if run.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # where there is a GPU, the trainer would take it
    setting = replace(setting_for(run.device), accumulation=run.arguments["accumulation"])
    peak = gemm_peak(run.device, run.dtype)
    for row in rows:
        found = attempt(row, lambda name=row["name"]: profile_stage(name, setting, run))
        if found is not None:
            row |= {**found, "utilisation": found["model_operations"] / (found["seconds"] * peak)}
        tidy(run.device)
    print_rows(rows)
    for row in rows:
        if row["status"] != OK:
            print(f"{row['name']}: {row['status']}: {row['reason']}")
    sizes = {name: value for name, value in vars(setting).items() if name != "small"}
    if setting.small is not None:
        sizes |= dict(zip(("student", "teacher", "vision"), map(vars, setting.small)))
    over = ratio(seconds_of(rows, "eager interact"), seconds_of(rows, "interact"))
    result = document(run, setting=sizes, gemm_peak_tflops=peak / 1e12, eager_over_ours=over, parts=[{"rows": rows}])
    return finish(run, result, lambda figure: draw(figure, rows))


if __name__ == "__main__":
    sys.exit(main())
