"""A training step of each stage: where the time goes, tokens per second, model FLOP utilisation.

    python benchmarks/profile_throughput.py [--stages interact] [--trace]

GPU: teacher Qwen2-VL-7B, student 2B, real widths, random weights; 8 rows of a 560 x 560 image (400 tokens), 62 tokens
of prompt and 256 of answer, all of one length, one micro-batch an optimizer step, gradient checkpointing on the student
where it is trained, trained weights in float32 under autocast. CPU: both models scaled down.

Utilisation = model operations / (time of a step x speed of one large matrix product measured in this run). With P
weights of a model's linear layers (no embedding, no head), T positions a row, B rows, N answer tokens, A = 2 B T^2
(heads x head width) a decoder layer for causal attention, A_v = 4 B p^2 width a vision layer for p patches:
    language model, forward     2 P B T + A                     vision, forward     2 P_v B p + A_v
    backward                    the same for inputs, and attention once more; again 2 P B T where weights are trained
    verbalizers (L layers)      6 N d^2 L; backward 8 (weights trained, inputs not), 6 (inputs alone) N d^2 L
    heads                       verbalize: 4 N V d a layer; interact: 2 N V (Dl + Ds) a teacher layer, 4 N V Ds a
                                student layer, the last ones included; sft: 6 N V Ds
What checkpointing computes again, LoRA's own products and the matching are not counted.

Estimate on an H200: steps of 0.3 to 0.6 s, 7 of each stage, and as long again to make 8 billion random weights twice:
under a minute.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import torch
from harness import OK, Run, attempt, clock, new_row, parse, tidy
from report import document, finish
from roofline import gemm_peak
from shapes import BACKBONES, VISION, Backbone, Vision
from training_steps import STEPS, Setting, Step

COLORS = [f"C{i}" for i in range(10)] + ["black", "tab:pink", "gold"]
SETTINGS = {
    "cuda": Setting(BACKBONES["7b"], BACKBONES["2b"], VISION, 8, 40, 62, 256),
    "cpu": Setting(
        Backbone(256, 512, 8, 4, 2, 4160, False, (2, 4, 6)),
        Backbone(128, 256, 8, 2, 1, 4096, True, (2, 4, 6)),
        Vision(64, 2, 2, 2, 8, 2),
        2,
        8,
        30,
        32,
    ),
}


# ---- model operations: the formula of the docstring ----


def language_operations(setting: Setting, backbone: Backbone) -> tuple[float, float]:
    """Linear layers and attention of one forward."""
    tokens = setting.rows * setting.positions
    key_width = backbone.width // backbone.heads * backbone.kv_heads
    weights = backbone.width * (2 * backbone.width + 2 * key_width + 3 * backbone.ffn) * backbone.depth
    attention = 2.0 * setting.rows * setting.positions**2 * backbone.width * backbone.depth
    return 2.0 * weights * tokens, attention


def vision_operations(setting: Setting, backbone: Backbone) -> float:
    """One forward of the tower and its projector."""
    v, patches = setting.vision, setting.side**2
    joined = v.width * v.merge**2
    weights = v.depth * (4 + 2 * v.mlp_ratio) * v.width**2 + 3 * 2 * v.patch**2 * v.width
    projector = joined * (joined + backbone.width)
    attention = 4.0 * patches**2 * v.width * v.depth
    return setting.rows * (2.0 * weights * patches + 2.0 * projector * setting.image_tokens + attention)


def model_operations(setting: Setting, stage: str) -> float:
    """Of one step."""
    s, t, n = setting.student, setting.teacher, setting.rows * setting.answer_tokens
    vocab = setting.vocab
    linear, attention = language_operations(setting, s)
    total = vision_operations(setting, s)
    if stage == "sft":
        return total + 3 * linear + 3 * attention + 6.0 * n * vocab * s.width
    total += vision_operations(setting, t) + sum(language_operations(setting, t)) + linear + attention
    speech = {role: 2.0 * n * b.width**2 * len(b.target_layers) for role, b in (("student", s), ("teacher", t))}
    if stage == "verbalize":
        heads = sum(4.0 * n * vocab * b.width * len(b.target_layers) for b in (s, t))
        return total + 7 * sum(speech.values()) + heads
    heads = 2.0 * n * vocab * (t.width + s.width) * (len(t.target_layers) + 1)
    heads += 4.0 * n * vocab * s.width * (len(s.target_layers) + 1)
    return total + linear + 2 * attention + 6 * speech["student"] + 3 * speech["teacher"] + heads


# ---- measuring ----


def profile_stage(stage: str, setting: Setting, run: Run, trace: bool) -> dict[str, Any]:
    """A row: median step and parts, tokens per second, operations."""
    step: Step = STEPS[stage](setting, run.device, run.dtype)
    for _ in range(2):
        step()
    step.parts.seconds()
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    times, parts = [], []
    for _ in range(run.rounds):
        times.append(clock(step, run.device))
        parts.append(step.parts.seconds())
    seconds = statistics.median(times)
    if trace:
        write_trace(stage, step, run)
    return {
        "seconds": seconds,
        "seconds_range": [min(times), max(times)],
        "parts": {name: statistics.median(p[name] for p in parts) for name in parts[0]},
        "tokens_per_second": setting.rows * setting.positions / seconds,
        "answer_tokens_per_second": setting.rows * setting.answer_tokens / seconds,
        "model_operations": model_operations(setting, stage),
        "peak_bytes": torch.cuda.max_memory_allocated(run.device) if run.device.type == "cuda" else None,
    }


def write_trace(stage: str, step: Step, run: Run) -> None:
    """One step as a Chrome trace, `trace_<stage>.json.gz`."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (run.device.type == "cuda")
    with profile(activities=activities) as recorded:
        step()
    run.out.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(run.out / f"trace_{stage}.json.gz"))


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
    parser.add_argument("--stages", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--trace", action="store_true", help="write a Chrome trace of one step of each stage")
    run = parse(__doc__, "profile_throughput", parser=parser, compared=False)
    setting = SETTINGS[run.device.type]
    peak, rows = gemm_peak(run.device, run.dtype), []
    for stage in run.arguments["stages"]:
        row = {**new_row(f"ours {stage}"), "name": stage}
        found = attempt(row, lambda stage=stage: profile_stage(stage, setting, run, run.arguments["trace"]))
        if found is not None:
            row |= {**found, "utilisation": found["model_operations"] / (found["seconds"] * peak)}
        rows.append(row)
        tidy(run.device)
    print_rows(rows)
    for row in rows:
        if row["status"] != OK:
            print(f"{row['name']}: {row['status']}: {row['reason']}")
    sizes = {"teacher": vars(setting.teacher), "student": vars(setting.student), "vision": vars(setting.vision)}
    sizes |= {name: getattr(setting, name) for name in ("rows", "positions", "image_tokens", "answer_tokens")}
    result = document(run, setting=sizes, gemm_peak_tflops=peak / 1e12, parts=[{"rows": rows}])
    return finish(run, result, lambda figure: draw(figure, rows))


if __name__ == "__main__":
    sys.exit(main())
