"""A teacher on disk: what its formats cost in bytes and in accuracy, and what a run saves by it. Needs no GPU.

    python benchmarks/teacher_cache.py [--shape 72b-to-2b:48] [--steps 40]

    rounding  targets at a real model's widths and vocabulary, stored and read back, in three regimes (layers far apart;
              near, KL about 0.01; near with logits up to 50): error of each token's KL in nats (relative where KL is
              above 1) and of its gradient, against float64. `exact` are the operator's own float32 targets.
    demo      stage interact of the demo in one process and a data worker, with the teacher in the job and from caches,
              in turns: answer tokens a second, waits for data, peak memory, bytes and seconds of the build

Writes `teacher_cache.json` and prints it as the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import GRADIENT_BAR
from inputs import LayerProblem, relative_error
from report import origin
from rich.console import Console
from rich.table import Table
from shapes import shape

from vlsi_fast.config import load_config
from vlsi_fast.demo.inputs import draw_data, make_student
from vlsi_fast.teacher_cache.forms import NUMBERS, bytes_a_token_and_layer, pack_targets, unpack_targets
from vlsi_kernels import layer_kl_matrix, teacher_targets

ROOT = Path(__file__).resolve().parent.parent
REGIMES = ("near", "near, large logits", "far")
TOP_K = 100
"""Of the top-k logits that peers keep: 2 bytes a logit and 4 a token id."""


# ---- rounding ----


def rounding(name: str) -> dict[str, Any]:
    """Errors by regime and numbers, and bytes a token and layer."""
    sizes = replace(shape(name), student_layers=3, teacher_layers=3)
    problem = LayerProblem(sizes, torch.device("cpu"), torch.bfloat16)
    matched = [(i, i) for i in range(3)]
    options = {"vocab_size": problem.vocab}
    exact = teacher_targets(problem.teacher, problem.teacher_weight, problem.student_weight, **options)
    found: dict[str, Any] = {}
    for numbers in ("exact", *NUMBERS):
        stored = exact if numbers == "exact" else unpack_targets(pack_targets(exact, numbers), problem.vocab, 1.0)
        found[numbers] = {regime: _errors(problem, stored, pair) for regime, pair in zip(REGIMES, matched)}
    width, teacher = sizes.student_width, sizes.teacher_width
    held = {numbers: bytes_a_token_and_layer("targets", numbers, width) for numbers in NUMBERS}
    held |= {
        "hidden, bfloat16": bytes_a_token_and_layer("hidden", "bfloat16", teacher),
        "full logits, bfloat16": 2 * problem.vocab,
        f"top {TOP_K} logits (biased)": 6 * TOP_K,
    }
    wrong = [n for n in ("exact", "float32", "float16") for e in found[n].values() if e["gradient"] > GRADIENT_BAR]
    return {"shape": name, "tokens": sizes.tokens, "errors": found, "bytes": held, "beyond_the_bar": wrong}


def _errors(problem: LayerProblem, targets, pair: tuple[int, int]) -> dict[str, float]:
    """Largest error of a token's KL, and the gradient's, of one pair of layers."""
    i, j = pair
    truth = problem.truth()[i, j]  # [K]
    student = problem.student.clone().requires_grad_()
    one = targets._replace(neg_entropy=targets.neg_entropy[j : j + 1], expectation=targets.expectation[j : j + 1])
    errors = []
    for token, wanted in zip(problem.checked.tolist(), truth.tolist()):
        kl = layer_kl_matrix(
            student[i : i + 1, token : token + 1],
            problem.student_weight,
            one._replace(
                neg_entropy=one.neg_entropy[:, token : token + 1], expectation=one.expectation[:, token : token + 1]
            ),
            vocab_size=problem.vocab,
        )
        kl.sum().backward()
        errors.append(abs(kl.item() - wanted) / max(1.0, abs(wanted)))
    gradient = student.grad[i, problem.checked]
    return {"kl": max(errors), "gradient": relative_error(gradient, problem.true_gradients([pair])[pair])}


# ---- the demo ----


def demo(steps: int, rounds: int) -> dict[str, Any]:
    """Stage interact with the teacher in the job and from caches."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config = load_config(ROOT / "configs/demo.yaml", {"student.path": str(folder / "student")})
        draw_data(folder / "data")
        make_student(config)
        common = {
            "student.path": str(folder / "student"),
            "data.root": str(folder / "data"),
            "training.report_to": "[]",
            "training.deepspeed": "null",
            "data.num_workers": "1",
            "interact.training.max_steps": str(steps),
        }
        _train("verbalize", common | {"output_dir": str(folder / "verbalized"), "verbalize.training.max_steps": "20"})
        for role in ("student", "teacher"):
            common[f"{role}.verbalizers"] = str(folder / "verbalized" / "verbalize" / role)
        caches, found = {}, {"live": []}
        for numbers in ("float32", "float16", "int8"):
            cache, began = folder / numbers, time.perf_counter()
            options = ["--out", str(cache), "--numbers", numbers, "--json"]
            built = json.loads(_run(["teacher", "build", *options], common | {"output_dir": str(folder / "b")}))
            seconds = time.perf_counter() - began
            caches[numbers] = built["counts"] | {"errors": built["errors"], "seconds_with_start": seconds}
            found[numbers] = []
        for turn in range(rounds):
            for name in found:
                output = folder / f"{name}{turn}"
                options = {} if name == "live" else {"teacher.mode": "cached", "teacher.cache": str(folder / name)}
                _train("interact", common | options | {"output_dir": str(output)})
                found[name].append(_numbers(output))
    return {
        "steps": steps,
        "caches": caches,
        "runs": {
            name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()
        },
    }


def _numbers(output: Path) -> dict[str, float]:
    """Of a run, without its first quarter."""
    records = [json.loads(line) for line in (output / "interact/metrics.jsonl").read_text().splitlines()]
    records = records[len(records) // 4 :]
    seconds = sum(record["step_seconds"] for record in records)
    return {
        "answer_tokens_per_second": sum(record["answer_tokens"] for record in records) / seconds,
        "data_wait_share": (waited := sum(r["data_wait_share"] * r["step_seconds"] for r in records)) / seconds,
        "milliseconds_waited_a_step": 1000 * waited / len(records),
        "peak_rss_bytes": float(records[-1]["peak_rss_bytes"][0]),
        "last_loss": records[-1]["loss"],
    }


def _run(command: list[str], options: dict[str, str]) -> str:
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    words = [sys.executable, "-m", "vlsi_fast", *command, "--config", str(ROOT / "configs/demo.yaml"), *words]
    done = subprocess.run(words, cwd=ROOT, text=True, capture_output=True, env=os.environ)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return done.stdout


def _train(stage: str, options: dict[str, str]) -> None:
    _run(["train", "--stage", stage], options)


# ---- what is printed ----


def show(result: dict[str, Any]) -> None:
    console = Console()
    table = Table("targets", *(f"{regime}: KL, gradient" for regime in REGIMES), title="error against float64")
    for numbers, regimes in result["rounding"]["errors"].items():
        table.add_row(numbers, *(f"{regimes[r]['kl']:.1e}, {regimes[r]['gradient']:.1e}" for r in REGIMES))
    console.print(table)
    table = Table("kept", "bytes a token and layer")
    for name, size in result["rounding"]["bytes"].items():
        table.add_row(name, f"{size:,}")
    console.print(table)
    if "demo" in result:
        table = Table("demo, interact", "answer tokens/s", "of live", "waits for data", "a step", "peak RSS")
        live = result["demo"]["runs"]["live"]["answer_tokens_per_second"]
        for name, run in result["demo"]["runs"].items():
            speed = run["answer_tokens_per_second"]
            rss = f"{run['peak_rss_bytes'] / 2**20:.0f} MiB"
            waits = (f"{run['data_wait_share']:.1%}", f"{run['milliseconds_waited_a_step']:.1f} ms")
            table.add_row(name, f"{speed:.0f}", f"{speed / live:.2f}", *waits, rss)
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="72b-to-2b:48", help="of the rounding part (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="of each run of the demo; 0: leave it out")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each kind of run (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    # the demo first: a child's peak memory counts from what its parent has held
    result: dict[str, Any] = {"demo": demo(arguments.steps, arguments.rounds)} if arguments.steps else {}
    result["rounding"] = rounding(arguments.shape)
    result |= origin(torch.device("cpu"))
    show(result)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "teacher_cache.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
