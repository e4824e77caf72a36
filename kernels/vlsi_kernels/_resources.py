"""Kernels as Triton compiles them for a launch, on a GPU that is not there, and what they cost as NVIDIA's assembler
says. Needs Triton, which brings the assembler, and no GPU.

Inside `recording`, `kernel[grid](..)` specialises and compiles as it would on a GPU of that compute capability, and is
not run. Rests on Triton's public `driver.set_active` and on what its `JITFunction.run` asks the active driver for.
Tensors may be anything that has a dtype and a data_ptr.
"""

import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._triton import interpreted, triton

SHARED_LIMIT_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory that one block may ask for, by compute capability (CUDA programming guide, compute capabilities)."""
THREADS = 1024
"""Of a block, at most, on every GPU."""
_NUMBERS = itertools.count(10_000)


@dataclass(frozen=True, eq=False)
class Build:
    """One specialisation of a kernel, made by a launch: types, which arguments 16 divides or are 1, constants."""

    function: Any  # triton.JITFunction
    source: Any  # triton's ASTSource
    metadata: Any  # triton's, of the compiled kernel: num_warps, shared, ..
    device: int

    @property
    def kernel(self) -> str:
        """The kernel's name."""
        return self.function.__name__

    @property
    def constants(self) -> dict[str, Any]:
        """Argument -> value, of constexpr arguments, those left out (None) and whole numbers that were 1."""
        names = self.function.arg_names
        return {names[path[0]]: value for path, value in self.source.constants.items() if len(path) == 1}

    @property
    def types(self) -> dict[str, str]:
        """Run-time argument -> Triton's type: "*bf16", "i32", "fp32"."""
        return {n: kind for n, kind in self.source.signature.items() if kind != "constexpr" and n not in self.constants}

    @property
    def unaligned(self) -> list[str]:
        """Pointers and whole numbers that 16 does not divide: what they address is not read 16 bytes at once."""
        attributes = {path[0]: value for path, value in self.source.attrs.items() if len(path) == 1}
        index = {name: i for i, name in enumerate(self.function.arg_names)}
        wide = {n for n in self.types if ["tt.divisibility", 16] in attributes.get(index[n], [])}
        return [n for n, kind in self.types.items() if kind[0] in "*iu" and n not in wide]

    @property
    def signature(self) -> str:
        """What tells it from other builds of the kernel, in one line."""
        runs = itertools.groupby(kind for kind in self.types.values() if kind.startswith("*"))  # in their order
        pointers = " ".join(f"{kind} x{n}" if n > 1 else kind for kind, n in ((k, len([*g])) for k, g in runs))
        long = [f"{n} {kind}" for n, kind in self.types.items() if kind[0] in "iu" and kind != "i32"]
        given = [f"{n}={value}" for n, value in self.constants.items() if value is not None]
        absent = [f"no {n.removesuffix('_ptr')}" for n, value in self.constants.items() if value is None]
        unaligned = f"unaligned {' '.join(self.unaligned)}" if self.unaligned else ""
        options = f"{self.metadata.num_warps} warps, {self.metadata.num_stages} stages"
        parts = (pointers, ", ".join((*long, *given, *absent)), unaligned, options)
        return "; ".join(part for part in parts if part)

    def assembly(self, kind: str) -> str:
        """What Triton made of it: "ttir", "ptx", .."""
        kernels = self.function.device_caches[self.device][0].values()
        return next(k for k in kernels if k.metadata.hash == self.metadata.hash).asm[kind]


class FakeDriver:
    """What Triton asks of a CUDA driver, answered for a GPU that is not there.

    Args:
        capability: of the GPU, as Triton writes it: 80, 90.
        launched: called at every launch with its build and its arguments by name.
    """

    def __init__(self, capability: int, launched: Callable[[Build, dict[str, Any]], None] | None = None):
        self.capability, self.launched, self.utils = capability, launched, self
        self.device = next(_NUMBERS)
        self.counts: dict[str, int] = {}
        self._builds: dict[str, Build] = {}

    @property
    def builds(self) -> list[Build]:
        """What was launched, in the order of first launches."""
        return [self._builds[key] for key in self.counts]

    def count(self, build: Build) -> int:
        """How often it was launched."""
        return self.counts[build.metadata.hash]

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

        return GPUTarget("cuda", self.capability, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        limit = SHARED_LIMIT_KIB[self.capability] * 1024
        return {"max_shared_mem": limit, "warpSize": 32, "max_num_regs": 65536}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[object, None, int, int, int]:
        return object(), None, 0, 0, THREADS

    def launcher_cls(self, source, metadata):
        """The launcher of one compiled kernel, which notes its launches."""
        build = self._builds[metadata.hash] = Build(source.fn, source, metadata, self.device)
        names = source.fn.arg_names

        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            self.counts[metadata.hash] = self.counts.get(metadata.hash, 0) + 1
            if self.launched is not None:
                self.launched(build, dict(zip(names, arguments)))

        return launch


@contextmanager
def recording(capability: int, launched: Callable[[Build, dict[str, Any]], None] | None = None) -> Iterator[FakeDriver]:
    """Inside, Triton compiles what is launched for a GPU of that capability; the driver lists the builds.

    Raises:
        ImportError: Triton is not installed.
        ValueError: a capability that SHARED_LIMIT_KIB does not know.
        RuntimeError: kernels are interpreted in this process, so that there is nothing to compile.
    """
    if triton is None:
        raise ImportError("recording launches needs Triton: pip install triton (Linux)")
    if capability not in SHARED_LIMIT_KIB:
        known = ", ".join(map(str, SHARED_LIMIT_KIB))
        raise ValueError(f"compute capability {capability} is unknown here; choose of {known}, or add it to them")
    if interpreted():
        raise RuntimeError("TRITON_INTERPRET is set, and interpreted kernels do not compile: unset it")
    from triton.runtime import driver

    before, fake = getattr(driver, "_active", None), FakeDriver(capability, launched)
    driver.set_active(fake)
    try:
        yield fake
    finally:
        driver.set_active(before)


def assemble(ptx: str) -> tuple[int, int, int]:
    """Registers per thread, bytes spilled (stores and loads) and bytes of stack, per thread, from ptxas -v."""
    from triton.backends.nvidia.compiler import get_ptxas

    architecture = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE).group(1)
    ptxas = get_ptxas(int(re.search(r"\d+", architecture).group()))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [ptxas.path, "-v", "--gpu-name", architecture, str(source), "-o", f"{folder}/kernel.cubin"]
        log = subprocess.run(command, capture_output=True, text=True, check=True)
    text = log.stdout + log.stderr
    stack, stores, loads = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text
    ).groups()
    registers = re.search(r"Used (\d+) registers", text).group(1)
    return int(registers), int(stores) + int(loads), int(stack)
