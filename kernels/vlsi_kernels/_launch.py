"""How the feed-forward network's and the norm's kernels are launched."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ._common import launch_on


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
