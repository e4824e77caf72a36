"""How well a step used its devices: model FLOPs a second of each rank, and their share of the device's peak (MFU).

Model FLOPs are the planner's (`planner.speed.operations`) for the tokens, images and answers that the step read.
What is computed only since a choice was made (padding, the recomputation of gradient checkpointing) does not count, so
a figure is comparable between settings (PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ..config import RunConfig
from ..planner.build import Models, setup_of, step_of
from ..planner.memory import Batch
from ..planner.speed import operations
from .records import PER_ROLE

PEAK_FLOPS = {
    "A100": 312e12,
    "A800": 312e12,
    "A10": 125e12,
    "A40": 150e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "H20": 148e12,
    "B200": 2250e12,
    "B300": 2250e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
    "RTX 5090": 209e12,
}
"""A part of a GPU's name -> its dense bfloat16 products with float32 sums, FLOPs a second (NVIDIA's datasheets)."""


def peak_flops(name: str) -> float | None:
    """Of a GPU by the name that the driver gives it, e.g. "NVIDIA H100 80GB HBM3"; None: not known."""
    words = f" {name.replace('-', ' ')} "
    found = [known for known in PEAK_FLOPS if f" {known} " in words and "Laptop" not in words]
    return PEAK_FLOPS[max(found, key=len)] if found else None


class Throughput:
    """FLOPs a second of one stage.

    Args:
        config: of the run.
        stage: its name.
        configs: role -> transformers config of its model.
        ranks: their number.
        device: that each runs on.
    """

    def __init__(self, config: RunConfig, stage: str, configs: dict, ranks: int, device: torch.device):
        models = Models(config, configs=configs)
        # of the batch, only what `of` sets is read
        self._step = step_of(models, stage, setup_of(config, stage, ranks), lambda shape: Batch(1, 1, 1, 0))
        self._ranks = ranks
        known = device.type == "cuda" and config.dtype != "float32"
        self.peak = peak_flops(torch.cuda.get_device_name(device)) if known else None

    def of(self, seconds: float, rows: int, answers: int, tokens: list[int], pixels: list[int]) -> dict[str, float]:
        """Of an optimizer step.

        Args:
            seconds: that it took.
            rows: of all ranks; `answers` their answer tokens.
            tokens: of them for each of `PER_ROLE`, without padding.
            pixels: numbers that all images are, for each of `PER_ROLE`.

        Returns:
            `tflops_per_rank`, TFLOPs a second, and `mfu`, a share, where the device's peak is known.
        """
        batches = {}
        for role, length, values in zip(PER_ROLE, tokens, pixels):
            if role in self._step.roles:
                patches = values // self._step.roles[role].shape.patch_values
                batches[role] = Batch(rows, length / max(rows, 1), answers, patches)
        parts = operations(replace(self._step, batches=batches))
        flops = sum(value for name, value in parts.items() if not name.endswith("recomputation"))
        each = flops / seconds / self._ranks
        return {"tflops_per_rank": each / 1e12} | ({"mfu": each / self.peak} if self.peak else {})
