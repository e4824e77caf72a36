"""Rows of a dataset -> one batch."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from vlsi_fast.data.dataset import ROLES
from vlsi_fast.data.encoding import IGNORED
from vlsi_fast.data.packing import Packer, row_bounds


class Collator:
    """Makes a batch of `VlsiDataset` rows: per-token tensors padded on the right, vision tensors joined end to end.

    Roles with a packer have no padding: their per-token tensors are joined end to end as well.

    Args:
        processors: role -> that model's processor; its tokenizer's padding token is used.
        always_image: put a small masked image behind the first row of a batch that has none. Ranks that shard or reduce
            the vision tower's weights must all run it, whatever rows they got; the masked tokens change no other one.
            Packed, it is a row of its own.
        packers: role -> what packs that model's rows; roles without one are padded.

    Raises:
        ValueError: a tokenizer has no padding token.
    """

    def __init__(self, processors: dict, always_image: bool = False, packers: dict[str, Packer] | None = None):
        self._packers = packers or {}
        self._blank = {role: blank_image(p) for role, p in processors.items()} if always_image else {}
        self._pad_ids = {}
        self._vision_names = {}
        for role, processor in processors.items():
            if processor.tokenizer.pad_token_id is None:
                raise ValueError(f"the {role}'s tokenizer has no padding token; set its pad_token and save it again")
            self._pad_ids[role] = processor.tokenizer.pad_token_id
            self._vision_names[role] = set(getattr(processor.image_processor, "model_input_names", ()))

    def __call__(self, rows: list[dict]) -> dict:
        """Joins B rows.

        Returns:
            `ids`: B row names. `skipped`: the rows' records of unusable rows, in order. `answered`: how many rows, and
            tokens to predict, have answers that a model wrote. `unaligned`: how many of the student's answer tokens are
            left out, since the teacher has no state for them. `tokens`: role -> the rows' tokens. `blank`: roles that
            got a blank image, and have no other. Each role:
            `input_ids` [B, T] padded with the padding id, `labels` [B, T] with -100, `attention_mask` and every
            other per-token tensor [B, T] with 0; vision tensors joined along their first axis, absent where no row has
            an image, and padded with zeros along the second where images have different numbers of patches there
            (LLaVA-OneVision). Where all rows share one encoding between the roles, both roles
            hold the same tensors; where they share vision tensors alone, the same vision tensors.

            A packed role has the same with per-token tensors [1, S], S all rows' tokens and a blank image's, and
            instead of `attention_mask` has `position_ids` and what follows from image sizes (`Packer`), and `packed`
            (`row_bounds`). The sizes themselves are numpy arrays, since the stock model reads them on the host.
        """
        batch = {"ids": [row["id"] for row in rows], "skipped": [record for row in rows for record in row["skipped"]]}
        roles = [role for role in ROLES if role in self._pad_ids]
        answered = [row[roles[0]]["labels"] for row in rows if row.get("answered")]
        batch["answered"] = (len(answered), sum(int((labels[:, 1:] != IGNORED).sum()) for labels in answered))
        batch["unaligned"] = sum(row.get("unaligned", 0) for row in rows)
        joined: dict[tuple[int, ...], torch.Tensor] = {}  # vision tensors by the identities of their rows' tensors
        parts = {role: [row[role] for row in rows] for role in roles}
        batch["tokens"] = {role: sum(row["input_ids"].shape[1] for row in parts[role]) for role in roles}
        batch["blank"] = []
        alike = len({role in self._packers for role in roles}) == 1
        for role in roles:
            full = self._with_image(parts[role], role)
            if full is not parts[role]:
                batch["blank"].append(role)
            if role != roles[0] and alike and all(a is b for a, b in zip(parts[roles[0]], parts[role])):
                batch[role] = dict(batch[roles[0]])
            else:
                batch[role] = self._join(full, role, joined)
            if role in self._packers:
                batch[role]["position_ids"] = self._packers[role].position_ids(full)
                if "image_grid_thw" in batch[role]:
                    grid = torch.as_tensor(batch[role]["image_grid_thw"])
                    batch[role] |= self._packers[role].image_inputs(grid)
                batch[role] |= {name: np.asarray(batch[role][name]) for name in SIZES if name in batch[role]}
        return batch

    def token_and_names(self, role: str) -> tuple[int, set[str]]:
        """A role's padding token, and the names of its vision tensors, which are joined along their first axis."""
        return self._pad_ids[role], self._vision_names[role]

    def _with_image(self, rows: list[dict[str, torch.Tensor]], role: str) -> list[dict[str, torch.Tensor]]:
        """The rows, with the blank image where it is asked for and no row has one."""
        vision = self._vision_names[role]
        if role not in self._blank or any(name in row for row in rows for name in vision):
            return rows
        blank = self._blank[role]
        if role in self._packers:
            return [*rows, blank | {"labels": torch.full_like(blank["input_ids"], IGNORED)}]
        return [_append_masked(rows[0], blank, vision), *rows[1:]]

    def _join(self, rows: list[dict[str, torch.Tensor]], role: str, joined: dict) -> dict[str, torch.Tensor]:
        vision = self._vision_names[role]
        names = dict.fromkeys(name for row in rows for name in row)
        padding = {"input_ids": self._pad_ids[role], "labels": IGNORED}
        batch = {}
        for name in names:
            if name == TILE_MASK:  # tiles are never padded, so it says nothing, in two fifths of the bytes
                continue
            if name in vision:
                parts = [row[name] for row in rows if name in row]
                key = tuple(map(id, parts))
                if key not in joined:
                    joined[key] = join_vision(parts, vision)
                batch[name] = joined[key]
            elif role not in self._packers:
                batch[name] = _pad([_per_token(row, name) for row in rows], padding.get(name, 0))
            elif name != "attention_mask":
                batch[name] = torch.cat([_per_token(row, name) for row in rows])[None]
        if role in self._packers:
            batch["packed"] = row_bounds(rows)
            # no row predicts the first token of the next
            batch["labels"][0, batch["packed"]["cu_seq_lens_q"][:-1].long()] = IGNORED
        return batch


SIZES = ("image_grid_thw", "image_sizes", "batch_num_images")
"""Vision inputs that a stock model reads on the host."""
TILE_MASK = "pixel_attention_mask"
"""SmolVLM's and Idefics3's vision input that says which pixels of a row's tiles are padding."""
BLANK_SIZES = ((32, 32), (384, 16))
"""Width and height of white images, pixels. The flat one has fewer tokens where tiles of an image are cut to its shape
(LLaVA-OneVision)."""
CUTTING = ("do_image_splitting", "crop_to_patches")
"""Options of image processors that cut every image into tiles; a blank one need not be cut."""


def blank_image(processor) -> dict[str, torch.Tensor]:
    """A processor's tensors for one white image and nothing else: of `BLANK_SIZES`, the one with the fewest tokens.

    The run's lower bound on pixels does not hold for it: enlarged to that, nothing would cost hundreds of tokens.
    """
    turns = [{"role": "user", "content": [{"type": "image"}]}]
    text = processor.apply_chat_template(turns, tokenize=False)
    images = (Image.new("RGB", shape, "white") for shape in BLANK_SIZES)
    bounds = processor.image_processor.size
    try:
        if bounds and {"shortest_edge", "longest_edge"} <= dict(bounds).keys():
            processor.image_processor.size = {**dict(bounds), "shortest_edge": 1}
        whole = {name: False for name in CUTTING if hasattr(processor.image_processor, name)}
        rows = [dict(processor(text=[text], images=[image], return_tensors="pt", **whole)) for image in images]
    finally:
        processor.image_processor.size = bounds
    return min(rows, key=lambda row: row["input_ids"].shape[1])


def _append_masked(row: dict[str, torch.Tensor], blank: dict[str, torch.Tensor], vision: set[str]) -> dict:
    """Row [1, T] with the blank image's tokens behind it: never attended to, never an answer."""
    count = blank["input_ids"].shape[1]
    joined = {name: value for name, value in blank.items() if name in vision}
    for name, value in row.items():
        behind = blank[name] if name in blank else torch.zeros(1, count, dtype=value.dtype)
        if name == "attention_mask":
            behind = torch.zeros_like(behind)
        elif name == "labels":
            behind = torch.full_like(blank["input_ids"], IGNORED)
        joined[name] = torch.cat([value, behind], dim=1)
    return joined


def _per_token(row: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A row's tensor [T]; zeros where this row has none."""
    if name not in row:
        return torch.zeros_like(row["input_ids"][0])
    if row[name].shape != row["input_ids"].shape:
        raise ValueError(
            f"the processor returned {name} of shape {tuple(row[name].shape)}: neither one value per token "
            f"{tuple(row['input_ids'].shape)} nor named as an input in image_processor.model_input_names"
        )
    return row[name][0]


def join_vision(tensors: list[torch.Tensor], names: set[str] = frozenset()) -> torch.Tensor:
    """Joins rows' vision tensors [n_i, P_i, ..] along the first axis; zeros fill the second up to the largest P_i.

    SmolVLM's [1, P_i, ..] are joined along the second: its forward takes tiles as they come, whatever rows they are of.
    `generate` counts them by rows.

    Args:
        tensors: one a row.
        names: of all vision tensors of that processor; empty for `generate`.
    """
    if TILE_MASK in names:
        return torch.cat(tensors, dim=1)
    if tensors[0].dim() < 3:
        return torch.cat(tensors)
    most = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([_widen(tensor, most) for tensor in tensors])


def _widen(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """[n, P, ..] -> [n, size, ..]; the model knows how many of the patches are real."""
    if tensor.shape[1] == size:
        return tensor
    empty = tensor.new_zeros(tensor.shape[0], size - tensor.shape[1], *tensor.shape[2:])
    return torch.cat([tensor, empty], dim=1)


def _pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    """Rows [T_i] -> [B, max T_i], filled with `value` on the right."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
