"""Triton, where it is installed.

Kernel files import `triton`, `tl` and `jit` from here: without Triton (macOS, Windows) they still import, and only
asking for `impl="triton"` fails. With TRITON_INTERPRET=1 in the environment before the first import, kernels run on
the CPU, in NumPy: slow, and good for tests.
"""

import os
from collections.abc import Callable
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
