"""Micro-batches of a stage: with answer positions, with what both roles share left out, and grouped by length."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from accelerate.utils.operations import recursively_apply

from ..hidden_states import answer_positions


class StageCollator:
    """Batches with their answer positions, found here, on the CPU, where counting waits for no GPU.

    Returns `batch`: for each role `{"inputs", "index", "labels"}` as `StageModule.forward` takes them, and `facts`: row
    ids, rows skipped, the numbers of answer tokens and of tokens (of the first role), `answered`: how many rows and
    answer tokens a model wrote, the number of `positions` (of all roles) and of those that are `padding` or a blank
    image, `role_tokens` and `pixel_values`: role -> how many tokens, padding and a blank image left out, and how many
    numbers its images are, `blank`: roles whose only image is a blank one, and `shared`: for each further role the
    names of inputs that are the first role's own tensors. Those are left out, so that they are pinned and copied to the
    device once, and put back by `restore_shared`.
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
        return {"batch": batch, "facts": facts}


def restore_shared(batch: dict[str, dict], facts: dict[str, Any]) -> None:
    """Give further roles the first role's tensors that `StageCollator` left out, in place."""
    first = next(iter(batch.values()))["inputs"]
    for role, names in facts["shared"].items():
        batch[role]["inputs"] |= {name: first[name] for name in names}


class UncollatedRows:
    """Rows on their way from a worker, as bytes: one shared-memory file a micro-batch instead of one a tensor, of which
    a process may hold a limited number. What pins batches and copies them to the device leaves it alone."""

    def __init__(self, rows: list[dict]):
        self.bytes = torch.frombuffer(bytearray(pickle.dumps(rows)), dtype=torch.uint8)

    def rows(self) -> list[dict]:
        """The rows, with tensors that were one still one."""
        return pickle.loads(self.bytes.numpy())


class LengthGroups:
    """The rows of one optimizer step on one rank, put into its micro-batches by length.

    The longest come first, so that a step that does not fit in memory fails at its start. Rows of equal length keep
    their order. Which rows a step has, how many micro-batches, and how many rows each, stays.

    Args:
        collate: rows -> micro-batch.
        roles: whose tokens count.
    """

    def __init__(self, collate: Callable[[list[dict]], dict], roles: tuple[str, ...]):
        self.collate, self.roles = collate, roles

    def __call__(self, parts: Iterator[UncollatedRows], count: int, device: torch.device) -> Iterator[dict]:
        """Take `count` micro-batches' rows, give as many micro-batches, on the device."""
        taken = [part.rows() for part in islice(parts, count)]
        rows = sorted((row for part in taken for row in part), key=self._length, reverse=True)
        rows = iter(rows)
        for part in taken:
            yield to_device(self.collate(list(islice(rows, len(part)))), device)

    def _length(self, row: dict) -> int:
        return sum(row[role]["input_ids"].shape[1] for role in self.roles)


def to_device(batch: Any, device: torch.device) -> Any:
    """A tensor, or the tensors of a batch, on the device, copied without waiting for what it has to do before."""
    if device.type == "cpu":
        return batch
    return recursively_apply(lambda t: t.pin_memory().to(device, non_blocking=True), batch)
