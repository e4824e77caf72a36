"""Triton, where it is installed, and how a kernel states the ways in which it is launched.

Kernel files import `triton`, `tl` and `jit` from here: without Triton (macOS, Windows) they still import, and only
asking for `impl="triton"` fails. With TRITON_INTERPRET=1 in the environment before the first import, kernels run on
the CPU, in NumPy: slow, and good for tests.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:
    triton = None

    class tl:  # what kernel signatures mention when they are defined
        constexpr = object

    def jit(function: Callable) -> Callable:
        return function


def constant(value: float) -> Any:
    """A module-level number that kernels may read."""
    return value if triton is None else tl.constexpr(value)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter on the CPU; Triton reads the variable when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@dataclass(frozen=True)
class Build:
    """One way in which a kernel is launched, complete enough to compile it with no GPU.

    Every operator file lists its own as BUILDS; the tests compile each for sm_80 and sm_90 and read off registers,
    spills, shared memory and tensor-core instructions, and `benchmarks/resources.py` prints them.
    """

    name: str
    kernel: Any  # triton.JITFunction
    signature: dict[str, str]  # run-time argument -> Triton type: "*bf16", "*fp32", "i32", "fp32"
    constants: dict[str, Any]  # constexpr argument -> value
    num_warps: int
    num_stages: int = 1
    tensor_cores: bool = False  # whether the PTX must hold mma / wgmma instructions
    targets: tuple[int, ...] = (80, 90)  # compute capabilities on which it is launched
    aligned: tuple[str, ...] = field(default=())  # arguments divisible by 16 (pointers, strides), as at run time
