"""The order of a run's rows: which row stands at which position, for every epoch.

Rows are numbered through all sources, in the order of the config. An epoch's order is one tensor of row numbers that
follows from the seed and the epoch alone, so every rank and every worker has the same one, ranks take turns in it, and
a run resumes at any position without reading what lies before it. It costs 8 bytes a row of the epoch: 23 MB for 2.9
million rows.

Without weights an epoch is every row once. With weights an epoch has a fixed number of rows of each source, in
proportion to the weights (exact, not drawn: an epoch's shares have no sampling noise):

    all_exhausted     as many that every row of every source comes at least once; a source that is too small for its
                      share starts again, in another order
    first_exhausted   as many that no row comes twice; a source that is too large for its share gives a part of its rows

Both rules are named as in `datasets.interleave_datasets`. In the next epoch every source goes on where it stopped, so
over the epochs all of its rows come equally often.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from fractions import Fraction

import torch
from torch import Tensor


class EpochOrder:
    """Row numbers of each epoch.

    Args:
        sizes: rows of each source.
        seed: the run's seed.
        weights: share of each source, in any unit; None: every row once.
        stopping_strategy: all_exhausted or first_exhausted; see above.
    """

    def __init__(
        self,
        sizes: list[int],
        seed: int,
        weights: list[float] | None = None,
        stopping_strategy: str = "all_exhausted",
    ):
        self.sizes, self.seed = sizes, seed
        self.quotas = sizes if weights is None else quotas(sizes, weights, stopping_strategy)
        self._weighted = weights is not None
        self._kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        """Rows of one epoch."""
        return sum(self.quotas)

    def epoch(self, number: int) -> Tensor:
        """Row numbers of epoch `number`, [rows of the epoch] int64."""
        order = _permutation(len(self), self.seed * 1_000_003 + number)
        return self._rows(number)[order] if self._weighted else order

    def rows(self, first: int, count: int) -> Iterator[int]:
        """Row numbers at positions `first` to `first + count` of the run, epochs following each other."""
        end = first + count
        while first < end:
            number, at = divmod(first, len(self))
            if number not in self._kept:
                self._kept = {number: self.epoch(number)}  # one at a time
            part = self._kept[number][at : at + min(end - first, 4096)].tolist()
            yield from part
            first += len(part)

    def _rows(self, number: int) -> Tensor:
        """The rows that epoch `number` takes from each source, sources one after another."""
        pieces, offset = [], 0
        for source, (size, quota) in enumerate(zip(self.sizes, self.quotas, strict=True)):
            at, end = number * quota, (number + 1) * quota  # of the endless row of passes over this source
            while at < end:
                turn, inside = divmod(at, size)
                take = min(end - at, size - inside)
                name = f"{self.seed}/{source}/{turn}".encode()
                seed = int.from_bytes(hashlib.sha256(name).digest()[:7])
                pieces.append(_permutation(size, seed)[inside : inside + take] + offset)
                at += take
            offset += size
        return torch.cat(pieces)


def quotas(sizes: list[int], weights: list[float], stopping_strategy: str) -> list[int]:
    """Rows of each source in one epoch.

    Raises:
        ValueError: a share so small that an epoch has no row of that source.
    """
    exact = [Fraction(weight).limit_denominator(10**9) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    ends = [size / share for size, share in zip(sizes, shares, strict=True)]
    total = math.ceil(max(ends)) if stopping_strategy == "all_exhausted" else math.floor(min(ends))
    counts = [math.floor(share * total) for share in shares]
    by_rest = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i] * total, i))
    for i in by_rest[: total - sum(counts)]:
        counts[i] += 1
    if min(counts) == 0:
        i = counts.index(0)
        raise ValueError(
            f"source {i} has a share of {float(shares[i]):.2g} of an epoch of {total} rows, which is no row; raise its "
            "weight, remove the source, or use stopping_strategy all_exhausted"
        )
    return counts


def _permutation(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))
