"""Rows of a dataset -> one batch."""

from __future__ import annotations

import torch

from vlsi_fast.data.dataset import ROLES
from vlsi_fast.data.encoding import IGNORED


class Collator:
    """Makes a batch of `VlsiDataset` rows: per-token tensors padded on the right, vision tensors joined end to end.

    Args:
        processors: role -> that model's processor; its tokenizer's padding token is used.

    Raises:
        ValueError: a tokenizer has no padding token.
    """

    def __init__(self, processors: dict):
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
            `ids`: B row names. `skipped`: the rows' records of unusable rows, in order. Each role: `input_ids` [B, T]
            padded with the padding id, `labels` [B, T] with -100, `attention_mask` and every other per-token tensor
            [B, T] with 0; vision tensors joined along their first axis, absent where no row has an image. Where all
            rows share one encoding between the roles, both roles hold the same tensors.
        """
        batch = {"ids": [row["id"] for row in rows], "skipped": [record for row in rows for record in row["skipped"]]}
        roles = [role for role in ROLES if role in self._pad_ids]
        for role in roles:
            batch[role] = self._join([row[role] for row in rows], role)
            if role == roles[0] and len(roles) == 2 and all(row[roles[0]] is row[roles[1]] for row in rows):
                batch[roles[1]] = dict(batch[role])
                break
        return batch

    def _join(self, rows: list[dict[str, torch.Tensor]], role: str) -> dict[str, torch.Tensor]:
        vision = self._vision_names[role]
        names = dict.fromkeys(name for row in rows for name in row)
        padding = {"input_ids": self._pad_ids[role], "labels": IGNORED}
        return {
            name: torch.cat([row[name] for row in rows if name in row])
            if name in vision
            else _pad([_per_token(row, name) for row in rows], padding.get(name, 0))
            for name in names
        }


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


def _pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    """Rows [T_i] -> [B, max T_i], filled with `value` on the right."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
