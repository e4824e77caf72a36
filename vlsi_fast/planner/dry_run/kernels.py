"""Triton's kernels in a dry run: compiled as a step launches them, counted, and not run (`vlsi_kernels._resources`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vlsi_kernels._resources import Build, FakeDriver, assemble, recording
from vlsi_kernels._triton import interpreted, triton

from ...config import ConfigError
from .gpus import Gpu
from .tape import Tape


def _gate_up_flops(a: dict[str, Any]) -> int:
    layers = a["x_ptr"].shape[0]
    return 2 * 2 * layers * a["rows"] * a["hidden"] * a["width"]


PRODUCTS = {"_gate_up_kernel": _gate_up_flops}
"""Kernels that multiply matrices -> FLOPs, from their arguments by name."""


@dataclass(frozen=True)
class Launches:
    """One specialisation of a kernel, and what the assembler says of it."""

    kernel: str
    signature: str
    """What distinguishes it: types, constants, alignment."""
    count: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    threads: int


def table_of(driver: FakeDriver) -> list[Launches]:
    """What was launched, by kernel."""
    found = []
    for build in driver.builds:
        registers, spills, _ = assemble(build.assembly("ptx"))
        size, threads = build.metadata.shared, 32 * build.metadata.num_warps
        found.append(Launches(build.kernel, build.signature, driver.count(build), registers, spills, size, threads))
    return sorted(found, key=lambda each: each.kernel)


@contextmanager
def compiling_for(gpu: Gpu, tape: Tape) -> Iterator[FakeDriver | None]:
    """Inside, Triton compiles for the GPU. None where Triton is not installed, which `impl: auto` then does without.

    Raises:
        ConfigError: kernels are interpreted in this process, so that there is nothing to compile.
    """
    if triton is None:
        yield None
        return
    if interpreted():
        raise ConfigError("TRITON_INTERPRET is set, and interpreted kernels do not compile: unset it for --dry-run")

    def launched(build: Build, arguments: dict[str, Any]) -> None:
        flops = PRODUCTS[build.kernel](arguments) if build.kernel in PRODUCTS else 0
        tape.launched(build.kernel, flops, list(arguments.values()))

    with recording(gpu.target, launched) as driver:
        yield driver
