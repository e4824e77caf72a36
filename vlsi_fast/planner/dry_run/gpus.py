"""GPUs that a dry run can stand in for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """What code asks a GPU for."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    memory_bytes: int

    @property
    def target(self) -> int:
        """Compute capability as Triton writes it."""
        return 10 * self.capability[0] + self.capability[1]


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 80 * 2**30),
    "a6000": Gpu("NVIDIA RTX A6000", (8, 6), 84, 48 * 2**30),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 24 * 2**30),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 80 * 2**30),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 141 * 10**9),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 180 * 10**9),
    "rtx5090": Gpu("NVIDIA GeForce RTX 5090", (12, 0), 170, 32 * 2**30),
}
"""By the name that `--gpu` takes. Multiprocessors and memory are the datasheets'."""
