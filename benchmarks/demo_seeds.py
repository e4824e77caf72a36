"""By how much is distilling ahead of sft alone on the demo's task? The whole demo over seeds, all arms, paired by seed.

    python benchmarks/demo_seeds.py --seeds 5

A seed sets the order of rows, the verbalizers' start, the matching and the teacher's sampled answers; pictures, labels
and models are the same. Writes `benchmarks/results/demo_seeds.json` and prints it as the last line. Runs that have a
summary are not repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from seeds import interval, machine

ROOT = Path(__file__).resolve().parent.parent
BAR = 0.10
"""What VLsI should be ahead of the better of the two sft arms, with an interval that excludes 0."""
VLSI, SFT = "student_after", ("sft_best", "sft_only")
PAIRS = (
    (VLSI, "last_layer"),
    ("last_layer", None),
    ("unlabelled", None),
    ("unlabelled", VLSI),
    ("unlabelled", "unlabelled_vlsi"),
    (VLSI, "student_before"),
)
"""Gains told beside VLsI's over sft: of the first over the second, None being the better sft."""


def main() -> int:
    """Run, collect, print. Returns 1 where the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, choices=range(2, 11), help="number of seeds, from 0 (2 to 10)")
    parser.add_argument("--config", default="configs/demo.yaml", help="the demo (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="of each launch (default: %(default)s)")
    parser.add_argument("--work-dir", default="runs/demo_seeds", help="folder of the runs (default: %(default)s)")
    arguments = parser.parse_args()
    summaries = []
    for seed in range(arguments.seeds):
        output = Path(arguments.work_dir) / str(seed)
        if not _finished(output):
            command = [sys.executable, "-m", "vlsi_fast", "demo", "--fresh", "--all-arms", "--seed", str(seed)]
            command += ["--config", arguments.config, "--output-dir", str(output), "--ranks", str(arguments.ranks)]
            subprocess.run(command, cwd=ROOT, check=True)
        summaries.append(json.loads((output / "summary.json").read_text()))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    result = {"benchmark": "demo_seeds", "config": arguments.config, "seeds": arguments.seeds} | collect(summaries)
    result |= {"machine": machine(), "versions": summaries[0]["versions"], "commit": commit.strip()}
    target = ROOT / "benchmarks" / "results" / "demo_seeds.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")
    print_tables(result)
    print(json.dumps(result))
    return 0 if result["bar_met"] else 1


def _finished(output: Path) -> bool:
    """Whether a run reached its end: an interrupted one has no time of the whole."""
    file = output / "summary.json"
    return file.is_file() and "seconds" in json.loads(file.read_text())


def collect(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Means with 95% intervals over seeds, gains paired by seed, and whether the bar is met.

    Args:
        summaries: the demo's `summary.json` of each seed, of the same arms; two or more.
    """
    names = list(summaries[0]["scores"])
    values = {name: [s[f"{name}_accuracy"] for s in summaries] for name in names}
    best = max((name for name in SFT if name in names), key=lambda name: sum(values[name]))
    pairs = [(VLSI, best), *((a, b or best) for a, b in PAIRS if {a, b or best} <= set(names))]
    gains = [{"model": a, "over": b} | interval([x - y for x, y in zip(values[a], values[b])]) for a, b in pairs]
    ahead = gains[0]["mean"], gains[0]["mean"] - gains[0]["half_width_95"]
    return {
        "metrics": summaries[0]["metrics"],
        "questions": summaries[0]["questions"],
        "labels": {name: summaries[0]["scores"][name]["label"] for name in names},
        "optimizer_steps": {name: arm["optimizer_steps"] for name, arm in summaries[0]["arms"].items()},
        "accuracy": {name: interval(values[name]) for name in names},
        "f1": {name: interval([s["f1"][name] for s in summaries]) for name in names},
        "best_sft": best,
        "gains": gains,
        "bar": BAR,
        "bar_met": ahead[0] >= BAR and ahead[1] > 0,
        "seconds": interval([s["seconds"] for s in summaries]),
        "peak_rss_bytes": max(s["peak_rss_bytes"] for s in summaries),
    }


def print_tables(result: dict[str, Any]) -> None:
    """Scores of every model and the paired gains, in percent and points."""
    from rich.console import Console
    from rich.table import Table

    console, labels = Console(highlight=False), result["labels"]
    title = f"{result['questions']} drawings of the test split, {result['seeds']} seeds, 95% intervals"
    table = Table("model", "steps", "exact sets", "F1", title=title)
    for name, label in labels.items():
        steps = str(result["optimizer_steps"].get(name, ""))
        table.add_row(label, steps, _cell(result["accuracy"][name]), _cell(result["f1"][name]))
    console.print(table)
    for gain in result["gains"]:
        console.print(f"{labels[gain['model']]} less {labels[gain['over']]}: {_cell(gain)} points")
    met = "met" if result["bar_met"] else "MISSED"
    console.print(f"VLsI ahead of the better sft by {100 * result['bar']:.0f} points, interval excluding 0: {met}")


def _cell(value: dict[str, Any]) -> str:
    return f"{100 * value['mean']:.1f} ± {100 * value['half_width_95']:.1f}"


if __name__ == "__main__":
    sys.exit(main())
