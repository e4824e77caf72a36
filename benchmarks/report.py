"""What a benchmark leaves behind: a table, a PNG, and JSON in a file and as the last line."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from harness import ERROR, OK, WRONG, Run

ROOT = Path(__file__).resolve().parent.parent
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16")
PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "liger-kernel", "cut-cross-entropy")


# ---- where the numbers come from ----


def origin(device: torch.device) -> dict[str, Any]:
    """Machine, versions and commit."""
    return {"machine": _machine(device), "versions": _versions(), **_commit()}


def _machine(device: torch.device) -> dict[str, Any]:
    found = {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    found |= {"instructions": [name for name in INSTRUCTIONS if name in _cpu_fact("flags").split()]}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
    return found


def _processor() -> str:
    return _cpu_fact("model name") or platform.processor()


def _cpu_fact(name: str) -> str:
    """Of the first core in Linux's list; empty where there is none."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.is_file() else []:
        if line.startswith(name):
            return line.split(":", 1)[1].strip()
    return ""


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _commit() -> dict[str, Any]:
    """Commit, and whether the tree differs from it (results apart). BENCH_COMMIT names it where git is missing."""
    try:
        commit, changes = (
            subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (
                ["rev-parse", "--short", "HEAD"],
                ["status", "--porcelain", "--", ".", ":!benchmarks/results"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return {"commit": os.environ.get("BENCH_COMMIT"), "dirty": None}
    return {"commit": commit, "dirty": bool(changes)}


# ---- writing ----


def document(run: Run, **content: Any) -> dict[str, Any]:
    """The head of every result."""
    return {
        "benchmark": run.name,
        "device": run.device.type,
        "dtype": str(run.dtype).removeprefix("torch."),
        "arguments": run.arguments,
        **origin(run.device),
        **content,
    }


def finish(run: Run, result: dict[str, Any], draw) -> int:
    """Writes JSON and PNG (`draw(figure)` fills it), prints the JSON, and returns the exit status of `failures`."""
    run.out.mkdir(parents=True, exist_ok=True)
    stem = run.out / f"{run.name}_{run.device.type}"
    result["png"] = _draw(stem.with_suffix(".png"), draw)
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    failed = failures(result)
    for line in failed:
        print(f"FAILED {line}", file=sys.stderr)
    print(json.dumps(result), flush=True)
    return 1 if failed else 0


def failures(result: dict[str, Any]) -> list[str]:
    """Our own rows that are wrong or broken. A peer may fail, and a bar that is missed is no failure of the script."""
    rows = [row for part in result.get("parts", []) for row in part["rows"]]
    return [f"{r['name']}: {r['reason']}" for r in rows if r["role"] == "ours" and r["status"] in (ERROR, WRONG)]


def _draw(path: Path, draw) -> str:
    """The picture's name, or why there is none."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return "matplotlib is not installed"
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    draw(figure)
    figure.savefig(path, dpi=110)
    return path.name


# ---- tables and pictures of cases ----


def print_rows(title: str, rows: list[dict[str, Any]], bars: list[dict[str, Any]]) -> None:
    """One line a case, then the bars."""
    from rich.console import Console
    from rich.table import Table

    names = sorted({name for row in rows for name in row["errors"]})
    head = ["case", "ms", "min..max", "TFLOP/s", "of roofline", "of unchunked", "extra memory"]
    table = Table(*head, *(f"{name} error" for name in names), "remark", title=title)
    for row in rows:
        table.add_row(*_cells(row), *(_error(row["errors"].get(name)) for name in names), _remark(row))
    console = Console(width=None if sys.stdout.isatty() else 170)
    console.print(table)
    for one in bars:
        limit = f">= {one['at_least']:g}" if one["at_least"] is not None else f"<= {one['at_most']:g}"
        value = "-" if one["value"] is None else f"{one['value']:.3g}"
        met = {True: "met", False: "MISSED", None: "not measured"}[one["met"]]
        console.print(f"{met:>12}  {one['name']}: {value} ({limit})", markup=False, highlight=False)


def _cells(row: dict[str, Any]) -> list[str]:
    """Name, times, speed and memory; no speed where the status is not ok."""
    times = ["-", "-"]
    if row["status"] == OK and row["seconds"] is not None:
        low, high = row["seconds_range"]
        times = [f"{row['seconds'] * 1e3:.2f}", f"{low * 1e3:.2f}..{high * 1e3:.2f}"]
    shares = [row["fraction_of_roofline"], row["fraction_of_unchunked"]]
    return [
        row["name"],
        *times,
        f"{row['tflops']:.3g}" if row["tflops"] else "-",
        *("-" if share is None else f"{share:.1%}" for share in shares),
        "-" if row["peak_extra_bytes"] is None else f"{row['peak_extra_bytes'] / 2**20:,.1f} MiB",
    ]


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _remark(row: dict[str, Any]) -> str:
    status = "" if row["status"] == OK else f"{row['status']}: {row['reason']}"
    extrapolated = f"one step of {row['calls']} timed" if row["calls"] > 1 else ""
    return "; ".join(part for part in (status, extrapolated, row["note"]) if part)


def draw_rows(figure, parts: list[dict[str, Any]]) -> None:
    """One panel a part: a bar a case that has a time, dashed lines at the rooflines."""
    figure.set_size_inches(9, max(2.5, sum(0.6 + 0.3 * len(part["rows"]) for part in parts)))
    colors = {"ours": "tab:blue", "peer": "tab:gray", "roofline": "tab:orange"}
    for axes, part in zip(figure.subplots(len(parts), 1, squeeze=False)[:, 0], parts):
        timed = [row for row in part["rows"] if row["seconds"] is not None][::-1]
        bars = axes.barh(
            [row["name"] for row in timed],
            [row["seconds"] * 1e3 for row in timed],
            color=[colors[row["role"]] for row in timed],
        )
        axes.bar_label(bars, fmt="{:,.2f}", padding=3, fontsize=8)
        for row in timed:
            if row["role"] == "roofline":
                axes.axvline(row["seconds"] * 1e3, color="tab:orange", linestyle="--", linewidth=1)
        axes.set_xlabel("ms")
        axes.set_title(part["title"], fontsize=9)
        axes.margins(x=0.12)
