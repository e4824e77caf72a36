"""Registers, spills, shared memory and tensor-core instructions of every Triton kernel. Compiles only: needs no GPU.

    python benchmarks/resources.py [--only NAME] [--json PATH]

Kernels state how they are launched in their modules' BUILDS. Each build is compiled for its compute capabilities;
the last line is JSON. Exits with 1 where a build breaks a rule of `problems_of`.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import vlsi_kernels
from vlsi_kernels._resources import SHARED_LIMIT_KIB, assemble
from vlsi_kernels._triton import Build

WGMMA_ROWS = 64
"""wgmma takes tiles of 64 rows or more; below that Triton falls back to mma.sync on Hopper too."""


@dataclass(frozen=True)
class Resources:
    """What one build costs on one compute capability, as the assembler says."""

    module: str
    build: str
    capability: int
    registers: int  # per thread
    spill_bytes: int  # stored to and loaded from local memory, per thread
    stack_bytes: int  # local memory kept for other reasons: arrays that are indexed at run time
    shared_bytes: int  # per block
    threads: int  # per block
    mma: int  # mma.sync instructions in the PTX
    wgmma: int  # wgmma.mma_async instructions in the PTX


def operator_modules() -> list[ModuleType]:
    """Every module of the package. By import_module: the package's attribute of that name may be a function."""
    names = sorted(m.name for m in pkgutil.iter_modules(vlsi_kernels.__path__))
    return [importlib.import_module(f"vlsi_kernels.{name}") for name in names]


def builds_of(module: ModuleType) -> list[Build]:
    """The module's BUILDS; empty where it has none."""
    return list(getattr(module, "BUILDS", []))


def kernel_functions(module: ModuleType) -> dict[str, JITFunction]:
    """Functions under @jit that the module itself defines, by name."""
    found = {name: _function(value) for name, value in vars(module).items()}
    return {name: f for name, f in found.items() if f is not None and f.__module__ == module.__name__}


def escaped_kernels(modules: list[ModuleType]) -> list[str]:
    """Kernels that no build compiles, neither by itself nor as a helper of a kernel that is built."""
    waiting = [_function(build.kernel) for module in modules for build in builds_of(module)]
    seen: set[int] = set()
    while waiting:
        function = waiting.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        called = (function.fn.__globals__.get(name) for name in function.fn.__code__.co_names)
        waiting += [f for f in map(_function, called) if f is not None]
    return [
        f"{_short(module)}.{name}"
        for module in modules
        for name, function in kernel_functions(module).items()
        if id(function) not in seen
    ]


def _function(value: object) -> JITFunction | None:
    """The JITFunction in `value`, under autotune and heuristics wrappers; None where there is none."""
    while not isinstance(value, JITFunction):
        if not isinstance(value, triton.runtime.KernelInterface) or not hasattr(value, "fn"):
            return None
        value = value.fn
    return value


def _short(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def measure(build: Build, capability: int, module: str = "") -> Resources:
    """Compiles one build for one compute capability."""
    kernel = _function(build.kernel)
    unknown = (set(build.signature) | set(build.constants)) ^ set(kernel.arg_names)
    if unknown or set(build.signature) & set(build.constants):
        raise ValueError(
            f"build {module}.{build.name}: signature and constants must name each argument of the kernel once; "
            f"look at {sorted(unknown) or sorted(set(build.signature) & set(build.constants))}"
        )
    source = ASTSource(
        kernel,
        {name: build.signature.get(name, "constexpr") for name in kernel.arg_names},
        constexprs=dict(build.constants),
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in build.aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": build.num_warps, "num_stages": build.num_stages},
    )
    ptx = compiled.asm["ptx"]
    registers, spills, stack = assemble(ptx)
    return Resources(
        module=module,
        build=build.name,
        capability=capability,
        registers=registers,
        spill_bytes=spills,
        stack_bytes=stack,
        shared_bytes=compiled.metadata.shared,
        threads=32 * build.num_warps,
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        wgmma=len(re.findall(r"wgmma\.mma_async", ptx)),
    )


def problems_of(build: Build, resources: Resources) -> list[str]:
    """The rules that this build breaks, in words; empty when all is well."""
    found = []
    if resources.spill_bytes or resources.stack_bytes:
        found.append(f"spills {resources.spill_bytes} bytes, stack {resources.stack_bytes} bytes; use a smaller tile")
    limit = 1024 * SHARED_LIMIT_KIB.get(resources.capability, 0)
    if not limit:
        found.append(f"sm_{resources.capability} is unknown here; add its shared memory to SHARED_LIMIT_KIB")
    elif resources.shared_bytes > limit:
        found.append(f"shared memory of {resources.shared_bytes} bytes, limit {limit}; use fewer stages")
    if build.tensor_cores:
        # a tile of few rows may use mma.sync on Hopper; BLOCK_M is the project's name for a tile's rows
        hopper = resources.capability == 90 and build.constants.get("BLOCK_M", WGMMA_ROWS) >= WGMMA_ROWS
        if not (resources.wgmma if hopper else resources.mma + resources.wgmma):
            found.append(f"no {'wgmma' if hopper else 'mma.sync'} instruction, and tensor_cores is stated")
    return found


def check(module: str, builds: list[Build]) -> list[dict]:
    """Compiles `builds` for all their capabilities; one row each: the fields of Resources, and `problems`."""
    rows = []
    for build in builds:
        for capability in build.targets:
            try:
                resources = measure(build, capability, module)
            except Exception as error:  # whatever the compiler raises: the other builds are still worth a look
                text = f"does not compile: {type(error).__name__}: {error}"
                rows.append({"module": module, "build": build.name, "capability": capability, "problems": [text]})
            else:
                rows.append({**asdict(resources), "problems": problems_of(build, resources)})
    return rows


def print_table(rows: list[dict]) -> None:
    """One line a build and capability."""
    table = Table("module", "build", "sm", "registers", "spill B", "shared B", "threads", "mma", "wgmma")
    for r in rows:
        numbers = ("capability", "registers", "spill_bytes", "shared_bytes", "threads", "mma", "wgmma")
        table.add_row(r["module"], r["build"], *(str(r.get(n, "-")) for n in numbers))
    Console(width=120).print(table)
    for r in rows:
        for problem in r["problems"]:
            print(f"{r['module']}.{r['build']} for sm_{r['capability']}: {problem}")


def main() -> None:
    """Compile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="compile builds whose module.name contains this")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    modules = operator_modules()
    rows = []
    for module in modules:
        chosen = [b for b in builds_of(module) if arguments.only in f"{_short(module)}.{b.name}"]
        rows += check(_short(module), chosen)
    escaped = escaped_kernels(modules)
    print_table(rows)
    for name in escaped:
        print(f"{name} is in no BUILDS, so nothing checks it: add a Build")
    result = {
        "benchmark": "resources",
        "triton": triton.__version__,
        "python": platform.python_version(),
        "escaped_kernels": escaped,
        "rows": rows,
    }
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    sys.exit(1 if escaped or any(r["problems"] for r in rows) else 0)


if __name__ == "__main__":
    main()
