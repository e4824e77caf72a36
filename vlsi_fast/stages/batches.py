"""Micro-batches of a stage: with answer positions, and with what both roles share left out."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils.operations import recursively_apply

from ..hidden_states import answer_positions
from ..teacher_cache.recalling import join_rows


class StageCollator:
    """Batches with their answer positions, found here, on the CPU, where counting waits for no GPU.

    Returns `batch`: for each role `{"inputs", "index", "labels"}` as `StageModule.forward` takes them, and `facts`: row
    ids, rows skipped, the numbers of answer tokens and of tokens (of the first role), `answered`: how many rows and
    answer tokens a model wrote, `unaligned`: how many of the student's answer tokens the teacher has no state for, the
    number of `positions` (of all roles) and of those that are `padding` or a blank image, `role_tokens` and
    `pixel_values`: role -> how many tokens, padding and a blank image left out, and how many numbers its images are,
    `blank`: roles whose only image is a blank one, and `shared`: for each further role the names of inputs that are the
    first role's own tensors. Those are left out, so that they are pinned and copied to the device once, and put back by
    `restore_shared`. Rows of a cached teacher bring what it said, as `taught` in `batch`.
    """

    def __init__(self, collator, roles: tuple[str, ...]):
        self.collator, self.roles = collator, roles

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        joined = self.collator(rows)
        batch = {}
        for role in self.roles:
            inputs = dict(joined[role])
            index, labels = answer_positions(inputs.pop("labels"))
            batch[role] = {"inputs": inputs, "index": index, "labels": labels}
        first = batch[self.roles[0]]
        positions = sum(batch[role]["inputs"]["input_ids"].numel() for role in self.roles)
        facts = {
            "ids": joined["ids"],
            "skipped": joined["skipped"],
            "answer_tokens": first["index"].numel(),
            "answered": joined["answered"],
            "unaligned": joined["unaligned"],
            "tokens": joined["tokens"][self.roles[0]],
            "positions": positions,
            "padding": positions - sum(joined["tokens"][role] for role in self.roles),
            "role_tokens": joined["tokens"],
            "pixel_values": {r: joined[r]["pixel_values"].numel() for r in self.roles if "pixel_values" in joined[r]},
            "blank": joined["blank"],
            "shared": {},
        }
        for role in self.roles[1:]:
            inputs = batch[role]["inputs"]
            facts["shared"][role] = [name for name, value in inputs.items() if value is first["inputs"].get(name)]
            batch[role]["inputs"] = {n: value for n, value in inputs.items() if n not in facts["shared"][role]}
        if "taught" in rows[0]:
            counts = [answer_positions(row["student"]["labels"])[0].numel() for row in rows]
            batch["taught"] = join_rows([row["taught"] for row in rows], counts)
        return {"batch": batch, "facts": facts}


def restore_shared(batch: dict[str, dict], facts: dict[str, Any]) -> None:
    """Give further roles the first role's tensors that `StageCollator` left out, in place."""
    first = next(iter(batch.values()))["inputs"]
    for role, names in facts["shared"].items():
        batch[role]["inputs"] |= {name: first[name] for name in names}


def to_device(batch: Any, device: torch.device) -> Any:
    """A tensor, or the tensors of a batch, on the device, copied without waiting for what it has to do before."""
    if device.type == "cpu":
        return batch
    return recursively_apply(lambda t: t.pin_memory().to(device, non_blocking=True), batch)
