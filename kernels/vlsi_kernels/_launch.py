"""How the feed-forward network's and the norm's kernels are launched, and the builds that follow from it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._common import launch_on
from ._triton import Build


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched: its constexpr arguments and options."""

    constants: dict[str, int]
    num_warps: int
    num_stages: int = 1


def launch_kernel(kernel, grid: tuple[int, ...], arguments: tuple, launch: Launch, device: torch.device) -> None:
    """An empty grid is nothing to do."""
    if math.prod(grid):
        with launch_on(device):
            kernel[grid](*arguments, **launch.constants, num_warps=launch.num_warps, num_stages=launch.num_stages)


def unit_stride(t: Tensor) -> Tensor:
    """`t`, copied only where its last dimension is not contiguous, or rows are too far apart for int32 in a tile."""
    near = t.dim() == 1 or t.stride(-2) < 2**24
    return t if near and (t.stride(-1) == 1 or t.shape[-1] == 1) else t.contiguous()


def layered(t: Tensor) -> Tensor:
    """[K, ..] of a stack, or of one layer."""
    return t if t.dim() == 3 else t[None]


def build_of(
    name: str, kernel, launch: Launch, element: str, absent: tuple[str, ...] = (), even: bool = True, **more
) -> Build:
    """A build in which `absent` arguments are None; the types follow from the arguments' names.

    even: sizes and strides are multiples of 16, as those of real models are; only counts of rows are not.
    """
    types = {}
    for argument in kernel.arg_names:
        if argument in ("rstd_ptr", "partial_ptr"):
            types[argument] = "*fp32"
        elif argument.endswith("_ptr"):
            types[argument] = f"*{element}"
        else:
            types[argument] = "fp32" if argument in ("inverse_width", "eps") else "i32"
    constants = dict.fromkeys(absent) | launch.constants
    types = {argument: kind for argument, kind in types.items() if argument not in constants}
    aligned = tuple(
        n for n, kind in types.items() if kind[0] == "*" or even and kind == "i32" and n not in ("rows", "size")
    )
    return Build(name, kernel, types, constants, launch.num_warps, launch.num_stages, aligned=aligned, **more)
