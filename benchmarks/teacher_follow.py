"""A teacher in a job of its own, one core each, against both models in one job on the same two cores. Needs no GPU.

    python benchmarks/teacher_follow.py [--steps 40] [--rounds 2] [--ahead 64]

Stage interact of the demo's models (a teacher of 8 decoder layers, a student of 4 of them) on the demo's pictures:

    one job       teacher and student in one process with two threads
    one core      the same with one thread on one core
    two jobs      `teacher build --follow` on one core, the run that follows it on the other
    whole cache   the run alone on its core, from a cache that is there: what the student could do
    teacher       `teacher build` alone on its core: what the teacher could do

Rows a second come from `step_seconds` of metrics.jsonl, the first `WARM` steps left out; the teacher's from the times
at which its shards were written. The slower of the last two is what two jobs could reach at best; what is missing from
it is the price of following: waiting, polling and small shards. Models as small as these gain nothing from a second
thread, so both ways with one job are there. Rounds are interleaved, and the best of each counts.
Targets are float16 throughout. Writes `teacher_follow.json` and prints it as the last line; exits with 1 where the
losses of the two jobs are not those of the whole cache.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from report import origin
from rich.console import Console
from rich.table import Table

from vlsi_fast.demo import pictures
from vlsi_fast.demo.inputs import KEPT_LAYERS
from vlsi_fast.shrinking import shrink

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "vlsi_fast" / "demo" / "models" / "teacher"
WARM, BATCH = 8, 8
CORES = sorted(os.sched_getaffinity(0))[:2] if hasattr(os, "sched_getaffinity") else [0, 1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ahead", type=int, default=64)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    if len(CORES) < 2:
        parser.error("two cores are needed")
    with tempfile.TemporaryDirectory() as name:
        result = measure(Path(name), options)
    result = {"benchmark": "teacher_follow", "arguments": {n: str(v) for n, v in vars(options).items()}} | result
    result |= {"cores_used": CORES, **origin(torch.device("cpu"))}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "teacher_follow.json").write_text(json.dumps(result, indent=1) + "\n")
    print_table(result)
    print(json.dumps(result))
    return 0 if result["same_losses"] else 1


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All ways, round by round."""
    prepare(folder, options.steps * BATCH)
    rates: dict[str, list[float]] = {}
    waits, losses, facts = [], {}, {}
    for number in range(options.rounds):
        whole = folder / f"whole{number}.cache"
        config = config_of(folder, f"whole{number}", options.steps, cache=whole)
        run([*build(config), "--shard-size", "64KiB"], CORES[:1])
        rates.setdefault("teacher", []).append(written_rate(whole))
        losses["whole"] = train(config, CORES[1:], rates, "whole cache")
        config = config_of(folder, f"one{number}", options.steps)
        train(config, CORES, rates, "one job")
        train(config_of(folder, f"core{number}", options.steps), CORES[1:], rates, "one core")
        config = config_of(folder, f"two{number}", options.steps, cache=folder / f"two{number}.cache", follow=True)
        teacher = start([*build(config), "--follow", "--ahead", str(options.ahead)], CORES[:1])
        losses["two"] = train(config, CORES[1:], rates, "two jobs")
        if teacher.wait():
            raise RuntimeError("the teacher that ran ahead has failed")
        waits.append(statistics.mean(r["data_wait_share"] for r in records(config)[WARM:]))
        facts = json.loads((folder / f"two{number}.cache" / "builder.json").read_text())
        shutil.rmtree(whole)
    best = {name: max(values) for name, values in rates.items()}
    ideal = min(best["teacher"], best["whole cache"])
    return {
        "rows_per_second": best,
        "all_rounds": rates,
        "two_jobs_over_one": best["two jobs"] / max(best["one job"], best["one core"]),
        "two_jobs_over_ideal": best["two jobs"] / ideal,
        "data_wait_share": min(waits),
        "most_rows_ahead": facts["most_ahead"],
        "most_shard_bytes": facts["most_bytes"],
        "same_losses": losses["two"] == losses["whole"],
        "rows_a_step": BATCH,
    }


def prepare(folder: Path, rows: int) -> None:
    """Pictures with descriptions, the student, and verbalizers of both models."""
    lines = []
    for split, number, cells, image in pictures.scenes({"train": rows + 2 * BATCH}):
        name = f"images/{number:05}.png"
        (folder / name).parent.mkdir(exist_ok=True)
        image.save(folder / name)
        words = pictures.describe(cells, random.Random(f"0 words {split} {number}"))
        lines.append(pictures.row(name, pictures.QUESTION, words))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    shrink(TEACHER, folder / "student", keep_layers=KEPT_LAYERS)
    run(command(config_of(folder, "start", 2), "verbalize"), CORES)


def config_of(folder: Path, name: str, steps: int, cache: Path | None = None, follow: bool = False) -> Path:
    """A run's config; its verbalizers are those of `start`."""
    tree = {
        "output_dir": str(folder / name),
        "dtype": "float32",
        "teacher": {"path": str(TEACHER), "layers": list(range(1, 8))},
        "student": {"path": str(folder / "student"), "layers": [1, 2, 3]},
        "verbalizer": {"norm": True, "residual": True},
        "data": {"root": str(folder), "train": [{"reader": "messages", "path": "rows.jsonl"}], "max_length": 160},
        "training": {
            "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
            "learning_rate": 1e-3,
            "max_steps": steps,
            "save_steps": 10,
            "save_total_limit": 1,
            "report_to": [],
        },
    }
    if cache is not None:
        tree["teacher"] |= {"mode": "cached", "cache": str(cache), "cache_follow": follow}
    if name != "start":
        shutil.copytree(folder / "start" / "verbalize", folder / name / "verbalize")
    path = folder / f"{name}.json"
    path.write_text(json.dumps(tree))
    return path


def command(config: Path, stage: str) -> list[str]:
    return [sys.executable, str(ROOT / "vlsi_fast" / "train.py"), "--stage", stage, "--config", str(config)]


def build(config: Path) -> list[str]:
    return [sys.executable, "-m", "vlsi_fast", "teacher", "build", "--config", str(config), "--numbers", "float16"]


def start(words: list[str], cores: list[int]) -> subprocess.Popen:
    """A job on these cores, with as many threads."""
    pinned = lambda: os.sched_setaffinity(0, cores)  # noqa: E731
    environment = os.environ | {"OMP_NUM_THREADS": str(len(cores)), "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(words, cwd=ROOT, env=environment, preexec_fn=pinned, stdout=subprocess.DEVNULL)


def run(words: list[str], cores: list[int]) -> None:
    if start(words, cores).wait():
        raise RuntimeError(f"failed: {' '.join(words)}")


def train(config: Path, cores: list[int], rates: dict[str, list[float]], way: str) -> list[float]:
    """Run stage interact, and note its rows a second. Returns its losses."""
    run(command(config, "interact"), cores)
    found = records(config)
    warm = found[WARM:]
    rates.setdefault(way, []).append(sum(r["rows"] for r in warm) / sum(r["step_seconds"] for r in warm))
    return [r["loss"] for r in found]


def records(config: Path) -> list[dict[str, Any]]:
    """Of the steps."""
    path = Path(json.loads(config.read_text())["output_dir"]) / "interact" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def written_rate(cache: Path) -> float:
    """Rows a second by the times at which a cache's shards were written, the first few left out."""
    (catalogue,) = (cache / "shards").glob("*.jsonl")
    lines = [json.loads(line) for line in catalogue.read_text().splitlines()]
    times = [(cache / "shards" / line["file"]).stat().st_mtime for line in lines]
    first = len(lines) // 5
    return sum(line["rows"] for line in lines[first + 1 :]) / (times[-1] - times[first])


def print_table(result: dict[str, Any]) -> None:
    """A row a way."""
    table = Table("", "rows a second", "of one job")
    for way, rate in result["rows_per_second"].items():
        table.add_row(way, f"{rate:.1f}", f"{rate / result['rows_per_second']['one job']:.2f}")
    console = Console()
    console.print(table)
    console.print(
        f"two jobs: {result['two_jobs_over_one']:.2f} times the better way with one, and "
        f"{result['two_jobs_over_ideal']:.0%} of the slower of teacher and whole cache; the student waited "
        f"{result['data_wait_share']:.0%} of its time"
    )


if __name__ == "__main__":
    raise SystemExit(main())
