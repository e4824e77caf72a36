"""Registers, spills, shared memory and tensor-core instructions of every Triton kernel. Compiles only: needs no GPU.

    python benchmarks/resources.py [--capabilities 80 86 90] [--only NAME] [--json PATH]

What is looked at is what the public operators launch (`launches.py`), compiled by the launch itself for each compute
capability; the last line is JSON. Exits with 1 where a build breaks a rule of `problems_of`, a call does not come
through, or a kernel of the package is launched by no call.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "0"  # interpreted kernels have nothing to compile

import argparse
import importlib
import json
import pkgutil
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import launches
import triton
from launches import Call
from rich.console import Console
from rich.table import Table
from triton.runtime.jit import JITFunction

import vlsi_kernels
from vlsi_kernels._resources import Build, assemble

CAPABILITIES = (80, 86, 90)
"""A100, the smaller GPUs of its kind with 99 KiB of shared memory, H100."""
WGMMA_ROWS = 64
"""wgmma takes tiles of 64 rows or more; below that Triton falls back to mma.sync on Hopper too."""
PRODUCT = re.compile(r"\btt\.dot\b.*: tensor<(\d+)x")
"""A product of tiles in Triton's IR, with its rows."""
WIDE = re.compile(
    r"\b(?:ld|st)\.global[\w.:]*\.(?:v4\.[bfsu]32|v2\.[bfsu]64)"
    r"|cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10"
)
"""16 bytes at once, in PTX."""


@dataclass(frozen=True)
class Resources:
    """What one build costs on one compute capability, as the assembler says."""

    kernel: str
    build: str
    """What tells it from the kernel's other builds."""
    call: str
    """The call that launched it first."""
    capability: int
    registers: int  # per thread
    spill_bytes: int  # stored to and loaded from local memory, per thread
    stack_bytes: int  # local memory kept for other reasons: arrays that are indexed at run time
    shared_bytes: int  # per block
    threads: int  # per block
    mma: int  # mma.sync instructions in the PTX
    wgmma: int  # wgmma.mma_async instructions in the PTX
    wide: int  # accesses of global memory of 16 bytes, in the PTX
    product_rows: int | None  # of the smallest product of tiles, where data are in half precision; None: it has none


def measure(build: Build, call: Call, capability: int) -> Resources:
    """What the build of a launch costs."""
    ptx, half = build.assembly("ptx"), any(kind in ("*bf16", "*fp16") for kind in build.types.values())
    registers, spills, stack = assemble(ptx)
    return Resources(
        kernel=build.kernel,
        build=build.signature,
        call=call.name,
        capability=capability,
        registers=registers,
        spill_bytes=spills,
        stack_bytes=stack,
        shared_bytes=build.metadata.shared,
        threads=32 * build.metadata.num_warps,
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        wgmma=len(re.findall(r"wgmma\.mma_async", ptx)),
        wide=len(WIDE.findall(ptx)),
        product_rows=min((int(rows) for rows in PRODUCT.findall(build.assembly("ttir")) if half), default=None),
    )


def problems_of(resources: Resources, wide: bool) -> list[str]:
    """The rules that a build breaks, in words; empty when all is well. Too much shared memory stops the launch."""
    found = []
    if resources.spill_bytes or resources.stack_bytes:
        found.append(f"spills {resources.spill_bytes} bytes, stack {resources.stack_bytes} bytes; use a smaller tile")
    if resources.product_rows is not None:
        hopper = resources.capability == 90 and resources.product_rows >= WGMMA_ROWS
        if not (resources.wgmma if hopper else resources.mma + resources.wgmma):
            found.append(
                f"no {'wgmma' if hopper else 'mma.sync'} instruction in a product of half-precision data; are operands "
                "widened before tl.dot?"
            )
    if wide and not resources.wide:
        found.append("no access of 16 bytes at once: a size or stride that 16 does not divide, or a mask that hides it")
    return found


def check(capability: int, found: Callable[[], Iterator[Call]] = launches.calls, only: str = "") -> dict[str, Any]:
    """Records the calls and looks at their builds.

    Returns:
        rows: a build each, the fields of Resources and `problems`; stopped: call -> what stopped it; escaped: kernels
        of the package that nothing launched.
    """
    recorded = launches.record(capability, found, only)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the assembler is a process of its own
        measured = list(pool.map(lambda item: measure(*item, capability), recorded.builds.items()))
    rows = [
        {**asdict(resources), "problems": problems_of(resources, call.wide)}
        for resources, call in zip(measured, recorded.builds.values())
    ]
    rows.sort(key=lambda row: (row["kernel"], row["build"]))
    escaped = escaped_kernels(operator_modules(), [build.function for build in recorded.builds])
    return {"rows": rows, "stopped": recorded.stopped, "escaped": escaped}


# ---- kernels that nothing launches ----


def operator_modules() -> list[ModuleType]:
    """Every module of the package. By import_module: the package's attribute of that name may be a function."""
    names = sorted(m.name for m in pkgutil.iter_modules(vlsi_kernels.__path__))
    return [importlib.import_module(f"vlsi_kernels.{name}") for name in names]


def escaped_kernels(modules: Iterable[ModuleType], launched: Iterable[JITFunction]) -> list[str]:
    """Kernels that the modules define and nothing launched, neither by itself nor as a helper of one that was."""
    waiting, seen = list(launched), set()
    while waiting:
        function = waiting.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        called = (function.fn.__globals__.get(name) for name in function.fn.__code__.co_names)
        waiting += [f for f in map(_function, called) if f is not None]
    return [
        f"{module.__name__.rpartition('.')[2]}.{name}"
        for module in modules
        for name, function in kernel_functions(module).items()
        if id(function) not in seen
    ]


def kernel_functions(module: ModuleType) -> dict[str, JITFunction]:
    """Functions under @jit that the module itself defines, by name."""
    found = {name: _function(value) for name, value in vars(module).items()}
    return {name: f for name, f in found.items() if f is not None and f.__module__ == module.__name__}


def _function(value: object) -> JITFunction | None:
    """The JITFunction in `value`, under autotune and heuristics wrappers; None where there is none."""
    while not isinstance(value, JITFunction):
        if not isinstance(value, triton.runtime.KernelInterface) or not hasattr(value, "fn"):
            return None
        value = value.fn
    return value


# ---- the command ----


def print_table(rows: list[dict]) -> None:
    """One line a build and capability."""
    numbers = ("registers", "spill_bytes", "shared_bytes", "threads", "mma", "wgmma", "wide")
    table = Table("kernel, build", "sm", "registers", "spill B", "shared B", "threads", "mma", "wgmma", "16 B")
    for r in rows:
        table.add_row(f"{r['kernel']}\n  {r['build']}", str(r["capability"]), *(str(r[n]) for n in numbers))
    Console(width=160).print(table)


def main() -> None:
    """Record, compile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--capabilities", type=int, nargs="+", default=CAPABILITIES, help="default: 80 86 90")
    parser.add_argument("--only", default="", help="make calls alone whose name contains this")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(min(len(arguments.capabilities), os.cpu_count() or 1), get_context("spawn")) as pool:
        found = list(pool.map(partial(check, only=arguments.only), arguments.capabilities))
    result = {
        "benchmark": "resources",
        "triton": triton.__version__,
        "python": platform.python_version(),
        "escaped_kernels": [] if arguments.only else sorted({name for one in found for name in one["escaped"]}),
        "stopped": {
            f"{c}: {n}": why for c, one in zip(arguments.capabilities, found) for n, why in one["stopped"].items()
        },
        "rows": [row for one in found for row in one["rows"]],
    }
    print_table(result["rows"])
    for row in result["rows"]:
        for problem in row["problems"]:
            print(f"{row['kernel']} ({row['build']}; {row['call']}) for sm_{row['capability']}: {problem}")
    for call, why in result["stopped"].items():
        print(f"sm_{call} stopped: {why}")
    for name in result["escaped_kernels"]:
        print(f"{name} is launched by no call, so nothing checks it: add one to benchmarks/launches.py")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    broken = result["stopped"] or result["escaped_kernels"] or any(row["problems"] for row in result["rows"])
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
