"""The teacher's forward for several micro-batches of an optimizer step at once (`teacher.window`).

Under ZeRO-3 a teacher's weights are gathered once a forward, whatever its rows. So its forward for a window of
micro-batches is made before the first of them, from batches that are collated already, and each micro-batch then takes
its own share of the result. Which rows a micro-batch has, its draws and its numbers stay what they are.

    B_i, T_i  rows, positions of micro-batch i        T  the longest T_i        N_i  its answer tokens
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..data.collate import Collator, join_vision
from ..data.packing import join_image_inputs
from .module import StageModule


class TeacherWindow:
    """What the teacher says to the micro-batches of one optimizer step, made window by window.

    Args:
        module: with `window` above 1 and `teach`.
        collator: that made the rows' batches.
        prepare: moves a micro-batch to the device, with what its roles share.
    """

    def __init__(self, module: StageModule, collator: Collator, prepare: Callable[[dict], dict]):
        self.module, self.collator, self.prepare = module, collator, prepare
        self._coming: list[dict] = []
        self._taught: list[Any] = []

    def begin(self, batches: list[dict]) -> None:
        """Take the micro-batches of the next optimizer step, on the device."""
        self._coming, self._taught = list(batches), []

    @property
    def waiting(self) -> bool:
        """Whether micro-batches of a step are still to come."""
        return bool(self._coming or self._taught)

    def next(self) -> Any:
        """`taught` of the next micro-batch, as the module's forward takes it. Collective."""
        if not self._taught:
            count = self.module.window
            window, self._coming = self._coming[:count], self._coming[count:]
            window = [self.prepare(batch) for batch in window]
            blank = ["teacher" in batch["facts"]["blank"] for batch in window]
            parts = [batch["batch"]["teacher"] for batch in window]
            inputs, index = join(parts, blank, *self.collator.token_and_names("teacher"))
            self._taught = self.module.teach(inputs, index, [part["index"].numel() for part in parts])
        return self._taught.pop(0)


def join(parts: list[dict[str, Any]], blank: list[bool], padding: int, vision: set[str]) -> tuple[dict, Tensor]:
    """Micro-batches of one model as one.

    Args:
        parts: `{"inputs", "index"}` each, as `StageCollator` makes them: all padded, or all packed.
        blank: which of them have the collator's blank image alone.
        padding: token id.
        vision: names of inputs that are joined along their first axis.

    Returns:
        inputs: [sum of B_i, T] tensors, or [1, sum of T_i] where they are packed; vision tensors end to end.
        index: [sum of N_i] answer positions in them, flattened.
    """
    if len(parts) == 1:
        return parts[0]["inputs"], parts[0]["index"]
    inputs, indices = [part["inputs"] for part in parts], [part["index"] for part in parts]
    if "packed" in inputs[0]:
        return _join_packed(inputs, indices, vision)
    # The masked image of a micro-batch without one must go: models count rows' images by the tokens that they see.
    gone = [False, *blank[1:]] if all(blank) else blank
    inputs = [_without_blank(part, padding, vision) if drop else part for part, drop in zip(inputs, gone)]
    rows, lengths = zip(*(part["input_ids"].shape for part in inputs))
    longest, first = max(lengths), list(accumulate(rows, initial=0))
    index = [(old // length + row) * longest + old % length for old, length, row in zip(indices, lengths, first)]
    joined = _vision(inputs, vision)
    for name in dict.fromkeys(name for part in inputs for name in part if name not in vision):
        fill = padding if name == "input_ids" else 0
        full = [part[name] if name in part else torch.zeros_like(part["input_ids"]) for part in inputs]
        joined[name] = torch.cat([pad(t, (0, longest - t.shape[1]), value=fill) for t in full])
    return joined, torch.cat(index)


def _without_blank(inputs: dict[str, Tensor], padding: int, vision: set[str]) -> dict[str, Tensor]:
    """A padded micro-batch without images: its blank one's tokens, which are masked, become padding."""
    masked = inputs["attention_mask"] == 0
    tokens = {name: value for name, value in inputs.items() if name not in vision}
    return {name: t.masked_fill(masked, padding if name == "input_ids" else 0) for name, t in tokens.items()}


def _join_packed(inputs: list[dict[str, Any]], indices: list[Tensor], vision: set[str]) -> tuple[dict, Tensor]:
    """Packed micro-batches end to end; a blank image is a row of its own there, and stays."""
    first = list(accumulate((part["input_ids"].shape[1] for part in inputs), initial=0))
    joined = _vision(inputs, vision)
    images = [{n: value for n, value in part.items() if n.startswith("image_") and n not in vision} for part in inputs]
    joined |= join_image_inputs([part for part in images if part])
    for name in inputs[0].keys() - vision - images[0].keys() - {"packed"}:
        joined[name] = torch.cat([part[name] for part in inputs], dim=-1)
    bounds = [part["packed"] for part in inputs]
    starts = [each["cu_seq_lens_q"][bool(i) :] + first[i] for i, each in enumerate(bounds)]
    starts, longest = torch.cat(starts), max(each["max_length_q"] for each in bounds)
    joined["packed"] = {
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    return joined, torch.cat([index + start for index, start in zip(indices, first)])


def _vision(inputs: list[dict[str, Any]], vision: set[str]) -> dict[str, Tensor]:
    """Vision tensors of all micro-batches, in the order of their rows."""
    names = dict.fromkeys(name for part in inputs for name in part if name in vision)
    values = {name: [part[name] for part in inputs if name in part] for name in names}
    arrays = (n for n, v in values.items() if isinstance(v[0], np.ndarray))
    joined = {n: np.concatenate(values[n]) for n in arrays}
    return {n: joined[n] if n in joined else join_vision(v, vision) for n, v in values.items()}
