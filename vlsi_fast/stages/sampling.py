"""Which rows each rank reads: the run's order, cut into optimizer steps, their rows dealt into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, cycle, islice

import numpy as np
import torch
from transformers import TrainerCallback

from ..config import RunConfig
from ..data.balancing import Load, deal
from ..data.mixing import EpochOrder
from ..data.row_sizes import COLUMNS
from ..data.sources import ConcatSource
from ..planner.rows import RowOperations


class ContinuingSampler(torch.utils.data.Sampler):
    """Rows in the run's one random order, from where the stage before ended.

    Epoch e of the run is a permutation drawn from (seed, e); a stage that starts `start` rows into the run takes the
    rows that follow, so that three stages read what one of their total length would.
    """

    def __init__(self, rows: int | EpochOrder, seed: int = 0, start: int = 0):
        """`rows`: how many there are, each once an epoch; or the order of a weighted mix, which has its own seed."""
        self.order = EpochOrder([rows], seed) if isinstance(rows, int) else rows
        self.start, self.epoch = start, 0

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self):
        return self.order.rows(self.start + self.epoch * len(self), len(self))


def data_order(config: RunConfig, sources: ConcatSource, start: int) -> ContinuingSampler:
    """The run's order, from row `start` of it on."""
    order = EpochOrder(sources.sizes, config.seed, sources.weights, config.data.stopping_strategy)
    return ContinuingSampler(order, start=start)


class TellSampler(TrainerCallback):
    """Tells the sampler the epoch; the Trainer's own way does not reach it through accelerate's loaders."""

    def __init__(self, sampler: ContinuingSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.epoch = int((state.epoch or 0) + 1e-6)


@dataclass(frozen=True)
class RowCosts:
    """What rows cost in a stage, by the planner's operations.

    Attributes:
        sizes: role -> [n, 4] int32, `row_sizes.COLUMNS` of all rows.
        operations: role -> FLOPs of a row.
        packed: role -> whether its micro-batches have no padding.
    """

    sizes: dict[str, np.ndarray]
    operations: dict[str, RowOperations]
    packed: dict[str, bool]

    def load(self, rows: list[int]) -> Load:
        """Of these rows, in FLOPs."""
        alone = np.zeros(len(rows))
        padded, lengths, filled = [], [], []
        for role, flops in self.operations.items():
            columns = self.sizes[role][rows].T.clip(min=0).astype(np.int64)
            tokens, answers, patches, pictures = (columns[COLUMNS.index(name)] for name in COLUMNS)
            text = flops.token * tokens + flops.token_pair * tokens**2
            alone += flops.answer * answers + flops.patch * patches
            alone += flops.patch_pair * patches**2 / pictures.clip(min=1)
            filled += [patches, answers]
            if self.packed[role]:
                alone += text
                filled.append(tokens)
            else:
                padded.append(text)
                lengths.append(tokens)
        return Load(_whole(alone), *(_whole(part).reshape(-1, len(rows)) for part in (padded, lengths, filled)))


def _whole(values) -> np.ndarray:
    return np.rint(values).astype(np.int64)


class Placed(int):
    """A row number with the rows of the order that its optimizer step begins and ends at (`first`, `end`)."""

    def __new__(cls, number: int, first: int, end: int) -> Placed:
        placed = super().__new__(cls, number)
        placed.first, placed.end = first, end
        return placed

    def __reduce__(self):
        return Placed, (int(self), self.first, self.end)


class StepBatches(torch.utils.data.Sampler):
    """One rank's micro-batches of an epoch, as lists of row numbers, optimizer step after optimizer step.

    A step takes `rows` x `accumulation` x `ranks` rows of the order. They are dealt by cost (`data.balancing`), or,
    without costs, by place: `rows` to each micro-batch. Micro-batch k of a step is that of rank k % ranks in round
    k // ranks. On several ranks, rows from the epoch's start fill its last round.

    Args:
        order: the rows.
        rows: rows of a micro-batch; its mean, where rows are dealt by cost.
        accumulation: micro-batches of a step on each rank.
        ranks, rank: how many there are, and this one.
        costs: of the rows, where they are dealt by cost.
        drop_last: leave out the last round where it is not full.
    """

    def __init__(
        self,
        order: ContinuingSampler,
        rows: int,
        accumulation: int,
        ranks: int = 1,
        rank: int = 0,
        costs: RowCosts | None = None,
        drop_last: bool = False,
    ):
        self.order, self.rows, self.accumulation, self.costs = order, rows, accumulation, costs
        self.ranks, self.rank, self.drop_last = ranks, rank, drop_last
        self.placed = False
        """Whether row numbers are `Placed`."""

    def __len__(self) -> int:
        """Micro-batches of this rank in an epoch."""
        of_round = self.rows * self.ranks
        return len(self.order) // of_round if self.drop_last else -(-len(self.order) // of_round)

    def position(self, steps: int) -> int:
        """Rows of the order that so many optimizer steps have used, counted from its start; an epoch's are all used at
        its end."""
        epoch, inside = divmod(steps, -(-len(self) // self.accumulation))
        return epoch * len(self.order) + self._used(inside)

    def _used(self, steps: int) -> int:
        return min(len(self.order), steps * self.accumulation * self.rows * self.ranks)

    @property
    def again(self) -> int:
        """Rows from an epoch's start that come again at its end, where its last round would not be full."""
        rest = len(self.order) % (self.rows * self.ranks)
        return self.rows * self.ranks - rest if rest and self.ranks > 1 and not self.drop_last else 0

    def __iter__(self) -> Iterator[list[int]]:
        rounds, of_round = len(self), self.rows * self.ranks
        rows = chain(self.order, cycle(islice(self.order, of_round)) if self.ranks > 1 else ())
        for first in range(0, rounds, self.accumulation):
            taken = min(self.accumulation, rounds - first)
            numbers = list(islice(rows, taken * of_round))
            if self.placed:
                begun, step = self.order.epoch * len(self.order), first // self.accumulation
                numbers = [Placed(n, begun + self._used(step), begun + self._used(step + 1)) for n in numbers]
            yield from self._dealt(numbers, taken * self.ranks)[self.rank :: self.ranks]

    def _dealt(self, rows: list[int], count: int) -> list[list[int]]:
        if self.costs is None:
            return [rows[i : i + self.rows] for i in range(0, len(rows), self.rows)]
        return [[rows[i] for i in part] for part in deal(self.costs.load(rows), count)]
