"""Block influence (ShortGPT, arXiv:2403.03853): how much each decoder layer changes what passes through it.

It is

    1 - mean over tokens of cos(x, y)        x, y [T, d]  the layer's input and output, T tokens of a row, d width
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones import family_of
from ..config_data import DataConfig
from ..config_files import ConfigError
from ..data.encoding import configure_image_bounds, encode
from ..data.images import load_image
from ..data.processors import load_processor
from ..data.skipped import UnusableRow
from ..data.sources import build_source
from ..loading import load_backbone


@dataclass
class Influence:
    """What was measured, on which rows."""

    values: list[float]
    """Of each decoder layer, shallow to deep: 0 where it turns no state, 1 where it turns them by 90 degrees."""
    rows: int
    tokens: int
    skipped: dict[str, int] = field(default_factory=dict)
    """Rows that could not be used, by cause."""


def measure(
    folder: Path, data: DataConfig, limit: int, device: str | None = None, dtype: str | None = None
) -> Influence:
    """Block influence of every decoder layer of a checkpoint.

    Args:
        folder: checkpoint with its processor.
        data: its `train` sources, image bounds and `max_length`.
        limit: rows, taken evenly from all parts of the data.
        device: default: the GPU where there is one, else the CPU; "auto": spread by accelerate over what there is.
        dtype: of the model; default: bfloat16 on a GPU, float32 elsewhere.

    Raises:
        ConfigError: no row can be used.
    """
    cuda = torch.cuda.is_available()
    device = device or ("cuda" if cuda else "cpu")
    on_cpu = not cuda if device == "auto" else torch.device(device).type == "cpu"
    dtype = dtype or ("float32" if on_cpu else "bfloat16")
    skipped: Counter[str] = Counter()
    rows = encoded_rows(folder, data, limit, skipped)
    options = {"device_map": "auto"} if device == "auto" else {}
    model = load_backbone(folder, dtype, **options)
    if device != "auto":
        model = model.to(device)
    values, count, tokens = layer_influence(model, rows)
    if not count:
        causes = ", ".join(f"{cause} {n}" for cause, n in skipped.items())
        raise ConfigError(f"influence: no row can be used ({causes}); docs/data.md tells the causes")
    return Influence(values, count, tokens, dict(skipped))


def encoded_rows(folder: Path, data: DataConfig, limit: int, skipped: Counter) -> Iterator[dict[str, Tensor]]:
    """Model inputs of `limit` rows, whole conversations, one row at a time so that none is padded."""
    from tqdm.auto import tqdm

    source = build_source(data.train)  # at once, not with the first row: bad paths are told before weights are read
    processor = load_processor(folder)
    configure_image_bounds(processor, data.min_pixels, data.max_pixels)
    load = partial(load_image, max_image_pixels=data.max_image_pixels)
    wanted = [i * len(source) // limit for i in range(limit)] if len(source) > limit else range(len(source))

    def rows() -> Iterator[dict[str, Tensor]]:
        for index in tqdm(wanted, desc="influence", leave=False):
            try:
                row = encode(source[index], processor, data, load)
            except UnusableRow as error:
                skipped[error.cause] += 1
                continue
            row.pop("labels")
            yield row

    return rows()


@torch.inference_mode()
def layer_influence(model: nn.Module, rows: Iterable[dict[str, Any]]) -> tuple[list[float], int, int]:
    """Block influence of every decoder layer, over all tokens of all rows alike, image tokens too.

    Args:
        model: stock `..ForConditionalGeneration`; its head is not run.
        rows: model inputs, each row [1, T] without padding.

    Returns:
        Influence of each layer, rows, tokens.

    Raises:
        ConfigError: a layer whose output is not finite.
    """
    family = family_of(model.config)
    layers, run = family.decoder_layers(model), family.backbone(model)
    sums, count, tokens = [0.0] * len(layers), 0, 0

    def add(module, arguments, output, at: int) -> None:
        x, y = arguments[0], output[0] if isinstance(output, tuple) else output
        sums[at] += nn.functional.cosine_similarity(x.float(), y.float(), dim=-1).sum().double()

    with contextlib.ExitStack() as stack:
        for i, layer in enumerate(layers):
            stack.callback(layer.register_forward_hook(partial(add, at=i)).remove)
        for row in rows:
            inputs = {k: v.to(model.device, model.dtype if v.is_floating_point() else None) for k, v in row.items()}
            run(**inputs, use_cache=False)
            count, tokens = count + 1, tokens + row["input_ids"].numel()
    cosines = [float(total) / max(1, tokens) for total in sums]
    if not all(map(math.isfinite, cosines)):
        first = next(i for i, cosine in enumerate(cosines) if not math.isfinite(cosine))
        raise ConfigError(f"decoder layer {first + 1} gives no finite numbers; use --dtype float32 or other weights")
    return [max(0.0, 1 - cosine) for cosine in cosines], count, tokens
