"""Time, memory and accuracy of several implementations of one task, side by side in one process.

A `Case` is one way to do the task. Cases are checked first, then measured for memory, then timed in rounds: every round
times each case once, in rotated order, so that a machine that changes its speed changes it for all, and no case finds
its own data in the caches. A case whose accuracy check fails is shown without a time.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from meter import peak_extra_bytes
from shapes import Shape, shape

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KL_BAR = 1e-4
"""Error of a loss, per token: absolute, or relative where the loss is above 1 nat; see kernels/README.md."""
GRADIENT_BAR = 5e-3
"""Relative error of a gradient."""

OK, ABSENT, NO_MEMORY, WRONG, ERROR = "ok", "absent", "out of memory", "accuracy failed", "error"


class Absent(Exception):
    """A case that cannot run here; the message says why."""


class NoMemory(Exception):
    """A case that would not fit; the message says what it needs."""


@dataclass
class Case:
    """One way to do the task. Its name says its role: it starts with "ours" or "roofline", or else it is a peer."""

    step: Callable[[], Any]
    """Does the task once, gradients included. Its result is dropped."""
    check: Callable[[], dict[str, float]] | None = None
    """Measured errors: name -> value; see `verdict`. None where nothing can be wrong (a roofline)."""
    flops: float | None = None
    """Floating-point operations of the task's matrix products; None: not counted."""
    calls: int = 1
    """Steps that the task takes: a step's time is multiplied by it, and the row is marked as extrapolated."""
    note: str = ""


@dataclass
class Run:
    """What the command line asks for."""

    name: str
    device: torch.device
    dtype: torch.dtype
    shapes: list[Shape]
    rounds: int
    budget_s: float
    compile: bool
    out: Path
    arguments: dict[str, Any]


def parse(
    doc: str,
    script: str,
    default_shapes: dict[str, list[str]] | None = None,
    parser: argparse.ArgumentParser | None = None,
    timed: bool = True,
    compared: bool = True,
) -> Run:
    """Reads the options that scripts share.

    Args:
        default_shapes: device type -> shape names; None: the script has no shapes to choose.
        parser: with the script's own options.
        timed: whether the script has rounds.
        compared: whether it times cases against one another.
    """
    parser = parser or argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="of inputs; default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON and PNG")
    parser.add_argument("--quick", action="store_true", help="first shape only, two rounds")
    if default_shapes:
        parser.add_argument("--shapes", nargs="+", metavar="NAME[:TOKENS]", help="see shapes.py")
    if timed:
        parser.add_argument("--rounds", type=int, help="timed rounds; default: 10 on a GPU, 5 on a CPU")
    if compared:
        parser.add_argument("--budget", type=float, help="seconds of timing after which a slow case sits out, a shape")
        parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compile peers; default: on a GPU")
    options = vars(parser.parse_args())
    device, quick = torch.device(options["device"]), options["quick"]
    gpu = device.type == "cuda"
    names = (options.get("shapes") or default_shapes[device.type]) if default_shapes else []
    return Run(
        name=script,
        device=device,
        dtype=DTYPES[options["dtype"] or ("bfloat16" if gpu else "float32")],
        shapes=[shape(name) for name in (names[:1] if quick else names)],
        rounds=options.get("rounds") or (2 if quick else 10 if gpu else 5),
        budget_s=options.get("budget") or (2.0 if gpu else 60.0),
        compile=gpu if options.get("compile") is None else options["compile"],
        out=options["out"],
        arguments={name: value for name, value in options.items() if name != "out"},
    )


def verdict(errors: dict[str, float]) -> bool:
    """Whether errors hold the bars. `kl`, `loss`: KL_BAR; `gradient`: GRADIENT_BAR; `over_eager`: twice eager's."""
    bars = {"kl": KL_BAR, "loss": KL_BAR, "gradient": GRADIENT_BAR, "over_eager": 2.0}
    return all(value <= bars[name] for name, value in errors.items())  # a NaN holds none


# ---- measuring ----


def measure(builders: dict[str, Callable[[], Case]], run: Run) -> list[dict[str, Any]]:
    """One row a case, in the builders' order: see `new_row`. A builder raises Absent where its case cannot run."""
    rows, cases = {}, {}
    for name, build in builders.items():
        rows[name] = new_row(name)
        case = attempt(rows[name], build, building=True)
        if case is not None:
            rows[name] |= {"note": case.note, "calls": case.calls}
            if attempt(rows[name], lambda case=case, row=rows[name]: _prepare(case, row, run)):
                cases[name] = case
        tidy(run.device)
    _time_rounds(cases, rows, run)
    _compare(rows.values())
    return list(rows.values())


def new_row(name: str) -> dict[str, Any]:
    """What is known of a case: nothing yet, but its name and so its role."""
    role = next((role for role in ("ours", "roofline") if name.startswith(role)), "peer")
    return {
        "name": name,
        "role": role,
        "status": OK,
        "reason": "",
        "note": "",
        "calls": 1,
        "errors": {},
        "peak_extra_bytes": None,
        "seconds": None,
        "seconds_range": None,
        "samples": 0,
        "tflops": None,
        "fraction_of_roofline": None,
        "fraction_of_unchunked": None,
    }


def attempt(row: dict[str, Any], action: Callable[[], Any], building: bool = False) -> Any:
    """The action's result; None, and the row's status, where it fails."""
    try:
        return action()
    except Absent as error:
        row["status"], row["reason"] = ABSENT, str(error)
    except (NoMemory, MemoryError, torch.OutOfMemoryError) as error:
        row["status"], row["reason"] = NO_MEMORY, str(error).split("\n")[0]
    except Exception as error:
        missing = building and isinstance(error, (ImportError, NotImplementedError))
        row["status"] = ABSENT if missing else NO_MEMORY if "can't allocate memory" in str(error) else ERROR
        row["reason"] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
    return None


def _prepare(case: Case, row: dict[str, Any], run: Run) -> bool:
    """Warm-up, accuracy and memory. False where the case must not be timed."""
    row["_flops"] = case.flops
    if case.check is None:
        case.step()
    else:
        row["errors"] = case.check()
        if not verdict(row["errors"]):
            row["status"], row["reason"] = WRONG, "over the bar"
    row["peak_extra_bytes"] = peak_extra_bytes(case.step, run.device)
    return row["status"] == OK


def _time_rounds(cases: dict[str, Case], rows: dict[str, dict], run: Run) -> None:
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for name, case in cases.items():  # fill the allocator's cache with what each case takes from it
        attempt(rows[name], lambda case=case: clock(case.step, run.device))
    for turn in range(run.rounds):
        order = list(cases)
        order = order[turn % len(order) :] + order[: turn % len(order)] if order else []
        for name in order:
            if rows[name]["status"] != OK or sum(samples[name]) > run.budget_s:
                continue
            seconds = attempt(rows[name], lambda name=name: clock(cases[name].step, run.device))
            samples[name] += [] if seconds is None else [seconds]
    for name, case in cases.items():
        if rows[name]["status"] == OK:
            _add_times(rows[name], [s * case.calls for s in samples[name]])


def _add_times(row: dict[str, Any], times: list[float]) -> None:
    row["seconds"] = statistics.median(times)
    row["seconds_range"] = [min(times), max(times)]
    row["samples"] = len(times)
    if row["_flops"]:
        row["tflops"] = row["_flops"] / row["seconds"] / 1e12


def clock(step: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one step: between two events on a GPU, wall clock on a CPU."""
    if device.type != "cuda":
        began = time.perf_counter()
        step()
        return time.perf_counter() - began
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize(device)
    events[0].record()
    step()
    events[1].record()
    torch.cuda.synchronize(device)
    return events[0].elapsed_time(events[1]) / 1e3


def _compare(rows: Iterable[dict[str, Any]]) -> None:
    """Fractions of the rooflines timed in the same rounds."""
    rows = list(rows)
    for key, name in (("fraction_of_roofline", "roofline"), ("fraction_of_unchunked", "roofline, unchunked")):
        best = next((r["seconds"] for r in rows if r["name"] == name), None)
        for row in rows:
            row.pop("_flops", None)
            if best and row["seconds"] and row["role"] != "roofline":
                row[key] = best / row["seconds"]


def tidy(device: torch.device) -> None:
    """Gives memory that dropped cases held back to the GPU, so that the next one meets no fragments of it."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


# ---- what scripts share ----


def need_impl(impl: str, device: torch.device) -> str:
    """A remark on our implementation `impl`; raises Absent where it cannot run."""
    if impl != "triton" or device.type == "cuda":
        return ""
    if os.environ.get("TRITON_INTERPRET", "0") != "1":
        raise Absent("Triton kernels need a GPU")
    return "interpreted on the CPU: its time means nothing"


def require_memory(device: torch.device, needed: float) -> None:
    """Raises NoMemory where `needed` bytes are more than is free: a CPU process would be killed, not told."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        info = Path("/proc/meminfo")
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines()) if info.is_file() else {}
        free = int(lines["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in lines else float("inf")
    if needed > free:
        raise NoMemory(f"needs about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free")


def seconds_of(rows: list[dict[str, Any]], name: str) -> float | None:
    """Time of a row; None where it has none."""
    return next((row["seconds"] for row in rows if row["name"] == name), None)


def bar(name: str, value: float | None, *, at_least: float | None = None, at_most: float | None = None) -> dict:
    """One promise and whether this run keeps it; `met` is None where a row that it needs has no number."""
    met = None
    if value is not None:
        met = value >= at_least if at_least is not None else value <= at_most
    return {"name": name, "value": value, "at_least": at_least, "at_most": at_most, "met": met}


def ratio(one: float | None, other: float | None) -> float | None:
    """one / other, None where a number is missing."""
    return None if one is None or not other else one / other
