"""Triton without a GPU: `kernel[grid](..)` specialises and compiles as it would on one, and is not run.

Rests on Triton's public `driver.set_active` and on what its `JITFunction.run` asks the active driver for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from vlsi_kernels._resources import SHARED_LIMIT_KIB, assemble
from vlsi_kernels._triton import interpreted, triton

from ...config import ConfigError
from .gpus import Gpu
from .tape import Tape

_NUMBERS = itertools.count(10_000)
THREADS = 1024
"""Of a block, at most, on every GPU."""


def _gate_up_flops(a: dict[str, Any]) -> int:
    layers = a["x_ptr"].shape[0]
    return 2 * 2 * layers * a["rows"] * a["hidden"] * a["width"]


PRODUCTS = {"_gate_up_kernel": _gate_up_flops}
"""Kernels that multiply matrices -> FLOPs, from their arguments by name."""


@dataclass
class Launches:
    """One specialisation of a kernel."""

    kernel: str
    signature: str
    """What distinguishes it: constants and types."""
    count: int = 0
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    threads: int = 0


class FakeDriver:
    """What Triton asks of a CUDA driver, answered for a GPU that is not there."""

    def __init__(self, gpu: Gpu, tape: Tape):
        self.gpu, self.tape, self.utils = gpu, tape, self
        self.device = next(_NUMBERS)
        self.launches: dict[str, Launches] = {}
        self.functions: dict[str, Any] = {}

    # ---- the driver ----

    def get_current_device(self) -> int:
        """Triton keeps compiled kernels, with the launcher that they got, by device: a number that none had before."""
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.gpu.target, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        limit = SHARED_LIMIT_KIB[self.gpu.target] * 1024
        return {
            "max_shared_mem": limit,
            "multiprocessor_count": self.gpu.multiprocessors,
            "warpSize": 32,
            "max_num_regs": 65536,
        }

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[None, None, int, int, int]:
        return object(), None, 0, 0, THREADS

    def launcher_cls(self, source, metadata):
        """The launcher of one compiled kernel, which notes its launches."""
        name = source.fn.__name__
        found = self.launches.setdefault(metadata.hash, Launches(name, _signature(source)))
        found.shared_bytes, found.threads = metadata.shared, 32 * metadata.num_warps
        self.functions[metadata.hash] = source.fn
        names = source.fn.arg_names

        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            found.count += 1
            flops = PRODUCTS[name](dict(zip(names, arguments))) if name in PRODUCTS else 0
            self.tape.launched(name, flops, list(arguments))

        return launch

    # ---- what is told of it ----

    def table(self) -> list[Launches]:
        """Kernels that were launched, with what the assembler says of them."""
        for key, function in self.functions.items():
            for kernel in function.device_caches[self.get_current_device()][0].values():
                if kernel.metadata.hash == key:
                    launches = self.launches[key]
                    launches.registers, launches.spill_bytes, _ = assemble(kernel.asm["ptx"])
        return sorted((each for each in self.launches.values() if each.count), key=lambda each: each.kernel)


def _signature(source) -> str:
    types = [kind for kind in source.signature.values() if kind != "constexpr"]
    pointers = ", ".join(sorted({kind for kind in types if kind.startswith("*")}))
    names = source.fn.arg_names
    constants = {names[path[0]]: value for path, value in source.constants.items() if len(path) == 1}
    given = ", ".join(f"{k}={v}" for k, v in constants.items() if k.isupper())
    absent = ", ".join(f"no {k.removesuffix('_ptr')}" for k, v in constants.items() if v is None)
    return "; ".join(part for part in (pointers, given, absent) if part)


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
    from triton.runtime import driver

    before, fake = getattr(driver, "_active", None), FakeDriver(gpu, tape)
    driver.set_active(fake)
    try:
        yield fake
    finally:
        driver.set_active(before)
