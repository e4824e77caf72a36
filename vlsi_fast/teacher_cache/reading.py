"""The teacher's rows as micro-batches that know what their rows are called in the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.collate import Collator
from ..data.packing import Packer
from ..data.sources import build_source
from ..ranks.sharding import world_size
from ..stages.batches import StageCollator
from .following import data_digest
from .rows import KeyedDataset, answers_digest, kept_of

if TYPE_CHECKING:
    from .speaking import TeacherStage


class _Rounds(torch.utils.data.Sampler):
    """This rank's micro-batches, as lists of (row number, position in the order)."""

    def __init__(self, rounds: list[list[tuple[int, int | None]]]):
        self.rounds = rounds

    def __len__(self) -> int:
        return len(self.rounds)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.rounds)


class _Placed(torch.utils.data.Dataset):
    """Rows by (number, position), which they keep."""

    def __init__(self, dataset: KeyedDataset):
        self.dataset = dataset

    def __getitem__(self, place: tuple[int, int]) -> dict:
        return self.dataset[place[0]] | {"place": place}


class _Collate:
    """`StageCollator`'s batch of the teacher alone, with what its rows are called in the cache."""

    def __init__(self, collator: Collator):
        self.collator = StageCollator(collator, ("teacher",))

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        labels = [row["teacher"]["labels"] for row in rows]
        whole = [row.get("whole") for row in rows]
        return self.collator(rows) | {
            "keys": [row["key"] for row in rows],
            "places": [row["place"] for row in rows],
            "answers": [answers_digest(each) for each in labels],
            "counts": [int((each[:, 1:] != -100).sum()) for each in labels],
            "kept": [None if w is None else kept_of(w, row["student"]["labels"]) for w, row in zip(whole, rows)],
            "refused": [line for row in rows for line in row["refused"]],
        }


class Reading:
    """The teacher's rows as micro-batches.

    Args:
        stage: of the teacher.
        split: train or eval.
        roles: models whose side of a row must be usable; both where the teacher speaks the student's tokens.
    """

    def __init__(self, stage: TeacherStage, split: str, roles: tuple[str, ...] = ("teacher",)):
        config = stage.config
        translated = config.verbalizer.translates
        roles = ("student", "teacher") if translated else roles
        self.sources = build_source(getattr(config.data, split), f"data.{split}")
        self.data = data_digest(config, split, self.sources)
        """Digest of what row numbers count in."""
        processors = {name: stage.roles[name].processor for name in roles}
        role = stage.roles["teacher"]
        packers = {"teacher": Packer(role.config)} if stage.packed("teacher") else {}
        collator = Collator({"teacher": role.processor}, always_image=world_size() > 1, packers=packers)
        dataset = KeyedDataset(self.sources, processors, config.data, translated=translated)
        self._dataset, self._collate = _Placed(dataset), _Collate(collator)
        self._workers = config.data.num_workers

    def loader(self, rounds: list[list[tuple[int, int | None]]]) -> DataLoader:
        """Batches of rows given as places, (number, position): the teacher's `batch`, and lists of `keys`, `places`,
        `answers`, `counts` of answer tokens; `kept`: which of the student's answer tokens those are, [N] int32, None
        where they are all; `refused`: key, cause and detail of rows passed over."""
        options = {"collate_fn": self._collate, "num_workers": self._workers}
        return DataLoader(self._dataset, batch_sampler=_Rounds(rounds), **options)


def rows_in(batch: dict[str, Any], stored: dict[str, Tensor]) -> Iterator[tuple[bytes, bytes, Any, dict[str, Tensor]]]:
    """Key, answers' digest, place and values of each row of a batch of `Reading`, for `ShardWriter.add`."""
    first = 0
    rows = zip(batch["keys"], batch["answers"], batch["places"], batch["counts"], batch["kept"])
    for key, answers, place, count, kept in rows:
        values = {name: value[first : first + count].clone() for name, value in stored.items()}
        yield key, answers, place, values | ({} if kept is None else {"kept": kept})
        first += count
