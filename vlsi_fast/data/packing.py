"""Rows of one model end to end in one row, without padding: what a stock model needs to keep them apart.

Nothing but what transformers has for packed sequences: position ids that start again at every row, from which sdpa,
eager and flex attention get a block-diagonal mask, and the cumulative lengths that flash-attention takes instead.
All of it is made here, on the CPU, in the workers.

    B  rows        T_i  tokens of row i        S  sum of T_i
"""

from __future__ import annotations

import inspect
from itertools import accumulate

import torch
from torch import Tensor

from vlsi_fast.backbones import family_of


class Packer:
    """Position ids of packed rows and their images, for one model.

    Where the stock model has positions of its own for images (`get_rope_index`: the Qwen-VL families) they are asked of
    it, a row at a time; other models count tokens.

    Args:
        config: the model's transformers config. Only the outermost module is kept, which has no weights here.
    """

    def __init__(self, config):
        from vlsi_fast.ranks.shard_loading import empty_model

        backbone = family_of(config).backbone(empty_model(config))
        self._stock = self._visual = None
        if hasattr(backbone, "get_rope_index"):
            self._stock, self._visual = backbone, backbone.visual
            for module in (self._stock, self._visual):
                module._modules.clear()
            self._known = inspect.signature(backbone.get_rope_index).parameters.keys() - {"attention_mask", "kwargs"}

    def position_ids(self, rows: list[dict[str, Tensor]]) -> Tensor:
        """Positions of B rows, each of which starts at 0.

        Args:
            rows: the processor's tensors of one row each, without padding; `input_ids` [1, T_i].

        Returns:
            [1, S]; or [4, 1, S] where the model has its own positions for images: first the tokens' numbers, by which
            it tells the rows apart, then time, height and width.
        """
        numbers = torch.cat([torch.arange(row["input_ids"].shape[1]) for row in rows])[None]
        if self._stock is None:
            return numbers
        return torch.cat([numbers[None], torch.cat([self._planes(row) for row in rows], dim=2)])

    def image_inputs(self, grid: Tensor) -> dict[str, Tensor | int]:
        """What the stock vision tower would work out from its images' sizes, waiting for the device at every step.

        Under the names by which the stock model takes it (transformers' `accepts_precomputed_kwargs`).

        Args:
            grid: [images, 3] `image_grid_thw`: frames, and patches down and across.

        Returns:
            Of n patches in all: `image_position_ids` [n, 2], `image_cu_seqlens` [frames + 1] int32 and
            `image_max_seqlen`. With window attention also `image_window_index` [n / merged], `image_cu_window_seqlens`
            [windows + 1] int32 and `image_max_window_seqlen`; with learned positions `image_interp_indices` and
            `image_interp_weights` [n, 4]. Empty for models without positions of their own for images.
        """
        from transformers import vision_utils

        visual = self._visual
        if visual is None:
            return {}
        bounds = vision_utils.get_vision_cu_seqlens(grid)
        positions = vision_utils.get_vision_position_ids(grid, visual.spatial_merge_size)
        made = {"position_ids": positions, "cu_seqlens": bounds, "max_seqlen": _longest(bounds)}
        if hasattr(visual, "window_size"):
            index, bounds = vision_utils.get_vision_window_index(
                grid, visual.spatial_merge_size, visual.window_size, visual.patch_size
            )
            made |= {"window_index": index, "cu_window_seqlens": bounds, "max_window_seqlen": _longest(bounds)}
        if hasattr(visual, "num_grid_per_side"):
            made["interp_indices"], made["interp_weights"] = vision_utils.get_vision_interpolation_indices_and_weights(
                grid,
                visual.num_grid_per_side,
                visual.interpolation_mode,
                visual.interpolation_align_corners,
                visual.spatial_merge_size,
            )
        return {f"image_{name}": value for name, value in made.items()}

    def _planes(self, row: dict[str, Tensor]) -> Tensor:
        """[3, 1, T] time, height and width of one row."""
        inputs = {name: value for name, value in row.items() if name in self._known}
        if "mm_token_type_ids" in self._known:
            inputs.setdefault("mm_token_type_ids", torch.zeros_like(row["input_ids"]))
        return self._stock.get_rope_index(**inputs)[0]


def join_image_inputs(parts: list[dict[str, Tensor | int]]) -> dict[str, Tensor | int]:
    """`Packer.image_inputs` of several batches' images end to end, from those of each."""
    joined: dict[str, Tensor | int] = {}
    for name in parts[0] if parts else ():
        values = [part[name] for part in parts]
        if "max" in name:
            joined[name] = max(values)
        elif "cu_" in name:
            ends = accumulate((value[-1] for value in values[:-1]), initial=0)
            joined[name] = torch.cat([value[i > 0 :] + end for i, (value, end) in enumerate(zip(values, ends))])
        elif name == "image_window_index":
            first = accumulate((len(value) for value in values[:-1]), initial=0)
            joined[name] = torch.cat([value + start for value, start in zip(values, first)])
        else:
            joined[name] = torch.cat(values)
    return joined


def _longest(bounds: Tensor) -> int:
    return int(bounds.diff().max())


def row_bounds(rows: list[dict[str, Tensor]]) -> dict[str, Tensor | int]:
    """transformers' `FlashAttentionKwargs` of packed rows: cumulative lengths [B + 1] int32, and the longest T_i.

    With them flash-attention need not look for the rows in the position ids, which would wait for the GPU.
    """
    lengths = [row["input_ids"].shape[1] for row in rows]
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    longest = max(lengths)
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
