"""Rows of a dry run, and the lengths that they can have."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ...backbones import family_of
from ...config import ConfigError, RunConfig
from ...data.collate import TILE_MASK
from ..report import Rows
from ..shapes import side_of


def rows_that_fit(rows: Rows, config: RunConfig) -> Rows:
    """The planner's rows with room for the answer behind the image, whose patches make a rectangle."""
    answers = max(1, min(rows.answers, rows.tokens // 4))
    image = max(1, min(rows.image_tokens, rows.tokens - answers - 3))
    while _sides(image)[1] > 2 * _sides(image)[0] and image > 4:
        image -= 1
    return dataclasses.replace(rows, answers=answers, image_tokens=image)


def _sides(count: int) -> tuple[int, int]:
    """The most nearly square rectangle of so many."""
    short = next(n for n in range(int(count**0.5), 0, -1) if count % n == 0)
    return short, count // short


def shorter(row: dict[str, Tensor]) -> dict[str, Tensor]:
    """A row with one token less."""
    tokens = row["input_ids"].shape
    cut = {name: value[:, :-1] if value.shape == tokens else value for name, value in row.items()}
    cut["labels"] = torch.where(row["labels"][:, 1:] != -100, cut["input_ids"], -100)
    return cut


def row_of(config, rows: Rows) -> dict[str, Tensor]:
    """A row as `data.encoding` would make it: an image, a question, an answer.

    Raises:
        ConfigError: no image of the family is as small as the row asks for.
    """
    marked = hasattr(config.vision_config, "spatial_merge_size")  # Qwen-VL, GLM; others cut images into tiles
    fixed = getattr(config, "mm_tokens_per_image", None)
    if fixed is not None:
        side = config.vision_config.image_size
        image, vision = fixed, {"pixel_values": torch.zeros(1, 3, side, side)}
    elif marked:
        image, vision = _patches(config.vision_config, rows.image_tokens)
    else:
        tiles = _tiles if hasattr(config, "image_grid_pinpoints") else _square_tiles
        image, vision = tiles(config, rows.image_tokens)
    if image + 2 + rows.answers > rows.tokens:
        raise ConfigError(
            f"the smallest image of {config.model_type} has {image} tokens, and rows of {rows.tokens} tokens have no "
            "room for it: raise data.max_length"
        )
    ids = torch.arange(rows.tokens)[None] % 100
    ids[:, 1 : 1 + image] = config.image_token_id
    labels = torch.full_like(ids, -100)
    labels[:, -rows.answers :] = ids[:, -rows.answers :]
    row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **vision}
    if fixed is not None:
        row["token_type_ids"] = (ids == config.image_token_id).long()
    elif marked:
        kind = "vision" if hasattr(config, "vision_start_token_id") else "image"  # GLM's
        ids[:, 0] = getattr(config, f"{kind}_start_token_id")
        ids[:, 1 + image] = getattr(config, f"{kind}_end_token_id")
        row["mm_token_type_ids"] = (ids == config.image_token_id).long()
    return row


def vision_inputs(config) -> list[str]:
    """What an image processor of the family names its tensors, as far as rows are collated by them."""
    names = ["pixel_values", "image_grid_thw", "image_sizes", "batch_num_images"]
    return [*names, TILE_MASK] if config.model_type == "smolvlm" else names


def _patches(vision, tokens: int) -> tuple[int, dict[str, Tensor]]:
    """Qwen-VL: an image of so many tokens, each of several patches."""
    down, across = (vision.spatial_merge_size * n for n in _sides(tokens))
    values = getattr(vision, "in_channels", 3) * vision.temporal_patch_size * vision.patch_size**2
    return tokens, {
        "pixel_values": torch.zeros(down * across, values),
        "image_grid_thw": torch.tensor([[1, down, across]]),
    }


def _tiles(config, tokens: int) -> tuple[int, dict[str, Tensor]]:
    """LLaVA-OneVision: the largest image of at most so many tokens, else the smallest. It is cut into tiles, and seen
    once more as a whole; a token ends each line of patches."""
    side = config.vision_config.image_size
    line = side // config.vision_config.patch_size
    found = {}
    for height, width in config.image_grid_pinpoints:
        down, across = height // side, width // side
        if down * across <= 9:  # more tiles are made smaller again ("anyres_max_9")
            found[line**2 + line * down * (line * across + 1)] = (height, width, down * across)
    count = max((n for n in found if n <= tokens), default=min(found))
    height, width, tiles = found[count]
    return count, {
        "pixel_values": torch.zeros(1, 1 + tiles, 3, side, side),
        "image_sizes": torch.tensor([[height, width]]),
        "batch_num_images": torch.tensor([1]),
    }


def _square_tiles(config, tokens: int) -> tuple[int, dict[str, Tensor]]:
    """InternVL, SmolVLM: as many tiles of equal size as give at most so many tokens, and at least one."""
    side, patch = (side_of(getattr(config.vision_config, name)) for name in ("image_size", "patch_size"))
    of_tile = (side // patch) ** 2 // family_of(config).merge(config)
    tiles = max(1, tokens // of_tile)
    shape = (1, tiles) if config.model_type == "smolvlm" else (tiles,)
    return tiles * of_tile, {"pixel_values": torch.zeros(*shape, 3, side, side)}
