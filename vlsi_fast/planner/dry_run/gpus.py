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
    bandwidth: float
    """Of its memory, bytes a second."""
    link: float
    """To the other GPUs of its machine (NVLink, else PCIe), one direction, bytes a second."""
    half_flops: float
    """Dense bfloat16 or float16 products with float32 sums, operations a second."""
    float_flops: float
    """Float32 products without TF32, operations a second."""
    double_flops: float
    """Float64 products, by tensor cores where it has such, operations a second."""

    @property
    def target(self) -> int:
        """Compute capability as Triton writes it."""
        return 10 * self.capability[0] + self.capability[1]


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 80 * 2**30, 2.039e12, 300e9, 312e12, 19.5e12, 19.5e12),
    "a6000": Gpu("NVIDIA RTX A6000", (8, 6), 84, 48 * 2**30, 0.768e12, 31.5e9, 154.8e12, 38.7e12, 0.6e12),
    "rtx4090": Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 24 * 2**30, 1.008e12, 31.5e9, 165.2e12, 82.6e12, 1.29e12),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 80 * 2**30, 3.35e12, 450e9, 989e12, 67e12, 67e12),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 141 * 10**9, 4.8e12, 450e9, 989e12, 67e12, 67e12),
    "b200": Gpu("NVIDIA B200", (10, 0), 148, 180 * 10**9, 8e12, 900e9, 2250e12, 75e12, 37e12),
    "rtx5090": Gpu("NVIDIA GeForce RTX 5090", (12, 0), 170, 32 * 2**30, 1.792e12, 63e9, 209.5e12, 104.8e12, 1.64e12),
}
"""By the name that `--gpu` takes. All numbers are the datasheets'."""
