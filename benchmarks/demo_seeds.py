"""Does VLsI beat plain sft on the demo's task? The whole demo over several seeds, with its control, paired by seed.

    python benchmarks/demo_seeds.py --seeds 3

Writes `benchmarks/results/demo_seeds.json` and prints it as the last line. Runs that have a summary are not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from seeds import interval, machine

ROOT = Path(__file__).resolve().parent.parent
MEASURES = ("teacher_accuracy", "student_before_accuracy", "student_after_accuracy", "sft_only_accuracy")


def main() -> None:
    """Run, collect, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 (2 to 10)")
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--work-dir", default="runs/demo_seeds")
    parser.add_argument("--work_dir", default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # its older spelling
    arguments = parser.parse_args()
    summaries = []
    for seed in range(arguments.seeds):
        output = Path(arguments.work_dir) / str(seed)
        if not (output / "summary.json").is_file():
            command = [str(Path(sys.executable).with_name("vlsi-fast")), "demo", "--fresh", "--seed", str(seed)]
            command += ["--config", arguments.config, "--output-dir", str(output)]
            subprocess.run(command, cwd=ROOT, check=True)
        summaries.append(json.loads((output / "summary.json").read_text()))
    gains = [s["student_after_accuracy"] - s["sft_only_accuracy"] for s in summaries]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    result = {
        "benchmark": "demo_seeds",
        "config": arguments.config,
        "seeds": arguments.seeds,
        **{name: interval([s[name] for s in summaries]) for name in MEASURES},
        "gain_over_control": interval(gains),
        "stages_seconds": interval([s["stages_seconds"] for s in summaries]),
        "optimizer_steps": {name: stage["optimizer_steps"] for name, stage in summaries[0]["stages"].items()},
        "peak_rss_bytes": max(s["peak_rss_bytes"] for s in summaries),
        "machine": machine(),
        "versions": summaries[0]["versions"],
        "commit": commit.strip(),
    }
    target = ROOT / "benchmarks" / "results" / "demo_seeds.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")
    print_table(result)
    print(json.dumps(result))


def print_table(result: dict) -> None:
    """Accuracies and the paired gain, in percent."""
    from rich.console import Console
    from rich.table import Table

    table = Table("measure", "mean", "± 95%", title=f"easy-VQA, {result['seeds']} seeds")
    for name in (*MEASURES, "gain_over_control"):
        value = result[name]
        table.add_row(name, f"{100 * value['mean']:.2f}", f"{100 * value['half_width_95']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
