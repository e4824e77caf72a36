"""Peak memory of one call beyond what was alive before it, outputs included.

CUDA: the allocator's own statistics. CPU: torch keeps none, so the profiler's record of every allocation and release
is added up; it sees temporaries inside operators too, which a dispatch mode does not. Scratch that the matrix library
takes behind torch's back is in neither.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_extra_bytes(step: Callable[[], object], device: torch.device) -> int:
    """Highest number of bytes alive at once during `step()`, less those alive before."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    gc.disable()  # older garbage released meanwhile would count as the step's own
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
            step()
    finally:
        gc.enable()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()  # negative for a release
        highest = max(highest, alive)
    return highest


def tensor_bytes(*tensors: torch.Tensor | None) -> int:
    """Bytes that the tensors hold."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
