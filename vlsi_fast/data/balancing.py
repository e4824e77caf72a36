"""The rows of one optimizer step, dealt into micro-batches of equal cost.

Ranks wait for each other in every micro-batch, so a step takes as long as the sum, over its rounds, of the costliest
micro-batch of each round. Rows are dealt over all micro-batches of the step, those of all ranks, and the micro-batches
are put in order of their cost, so that those of one round cost nearly the same:

    packed    the costliest row first, each into the micro-batch that has the least so far (longest processing time
              first; Graham, SIAM J. Appl. Math. 17, 1969)
    padded    rows in order of their length, cut into stretches of nearly equal cost; a row costs as much as the
              longest beside it. Also where one model packs and the other pads

Micro-batches have any number of rows. Let `most` be the rows that each would have if all had the same number: no
micro-batch has more tokens or image patches than the `most` largest rows of the step, nor, padded, more positions than
`most` times the longest. So none needs more memory than dealing by place could have needed.

What is dealt follows from the rows, their costs and the number of micro-batches alone. All arithmetic is in whole
numbers, so that every rank comes to the same result.

    n  rows of the step      m  models that pad      k  quantities that fill memory
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import numpy as np


@dataclass(frozen=True)
class Load:
    """What the rows of a step cost, in any unit, and what they fill.

    Attributes:
        alone: [n] int64, a row's cost whatever stands beside it.
        padded: [m, n] int64, a row's further cost where nothing longer stands beside it; rows of a micro-batch have
            the largest of theirs each.
        lengths: [m, n] int64, a row's tokens in the same models.
        sizes: [k, n] int64, what adds up over the rows of a micro-batch: tokens of a packed model, image patches.
    """

    alone: np.ndarray
    padded: np.ndarray
    lengths: np.ndarray
    sizes: np.ndarray


def deal(load: Load, count: int) -> list[list[int]]:
    """Deal n rows into `count` micro-batches, the costliest first.

    Args:
        load: of the rows.
        count: micro-batches of all ranks, at most n. Micro-batch k is that of rank k % ranks in round k // ranks.

    Returns:
        Row numbers below n of each micro-batch, rising; every row once, every micro-batch one or more.

    Raises:
        ValueError: more micro-batches than rows.
    """
    rows = len(load.alone)
    if not 0 < count <= rows:
        raise ValueError(f"{rows} rows cannot be dealt into {count} micro-batches of one row or more")
    most = -(-rows // count)
    parts = _cut(load, count, most) if len(load.padded) else _packed(load, count, most)
    parts = [sorted(part) for part in parts]
    return sorted(parts, key=lambda part: (-cost_of(load, part), part[0]))


def cost_of(load: Load, part: list[int]) -> int:
    """Cost of a micro-batch of these rows."""
    own = sum(load.alone[part].tolist())
    return own + len(part) * sum(load.padded[:, part].max(axis=1, initial=0).tolist())


def _packed(load: Load, count: int, most: int) -> list[list[int]]:
    """Each row, the costliest first, to the micro-batch that costs least and has room for it.

    There always is one: while rows are left, some micro-batch has fewer than `most`, and with one more it is no larger
    than the `most` largest.
    """
    limits = _largest_sums(load.sizes, most)
    order = np.argsort(-load.alone, kind="stable").tolist()
    costs, sizes = load.alone.tolist(), load.sizes.T.tolist()
    parts: list[list[int]] = [[] for _ in range(count)]
    filled = [[0] * len(limits) for _ in range(count)]
    heap = [(0, 0, k) for k in range(count)]  # cost, rows, number
    for row in order:
        full = []
        while True:
            cost, held, k = heapq.heappop(heap)
            after = [a + b for a, b in zip(filled[k], sizes[row])]
            if all(a <= limit for a, limit in zip(after, limits)):
                break
            full.append((cost, held, k))
        parts[k].append(row)
        filled[k] = after
        heapq.heappush(heap, (cost + costs[row], held + 1, k))
        for each in full:
            heapq.heappush(heap, each)
    return parts


def _cut(load: Load, count: int, most: int) -> list[list[int]]:
    """Rows by length, cut into `count` stretches whose largest cost is as small as it can be, to a two-hundredth."""
    order = np.lexsort((-load.alone, -load.padded.sum(axis=0)))
    cutter = _Cutter(load, order, most)
    rows = order.tolist()
    # stretches of `most` rows each always do
    high = max(cutter.bound(at, min(at + most, len(rows))) for at in range(0, len(rows), most))
    low, best = (sum(load.alone.tolist()) + sum(load.padded.ravel().tolist())) // count, cutter.ends(high)
    while high - low > high // 200:
        middle = (low + high) // 2
        ends = cutter.ends(middle)
        if len(ends) <= count:
            high, best = middle, ends
        else:
            low = middle
    best = [rows[at:end] for at, end in zip([0, *best], best)]
    parts = [(-cost_of(load, part), part[0], part) for part in best]
    single, heap = ([each for each in parts if (len(each[2]) > 1) is several] for several in (False, True))
    heapq.heapify(heap)
    while len(single) + len(heap) < count:  # micro-batches are left over: halve the costliest
        part = heapq.heappop(heap)[2]
        for half in (part[: len(part) // 2], part[len(part) // 2 :]):
            each = (-cost_of(load, half), half[0], half)
            if len(half) > 1:
                heapq.heappush(heap, each)
            else:
                single.append(each)
    return [part for _, _, part in (*single, *heap)]


class _Cutter:
    """Cuts rows in a given order into as few stretches as a bound on their cost allows.

    In a stretch, a row is taken to be as long as the longest from the stretch's start to the end of the order: where
    one model pads that is its first row.
    """

    def __init__(self, load: Load, order: np.ndarray, most: int):
        def longest_from(values: np.ndarray) -> np.ndarray:
            return np.maximum.accumulate(values[:, order][:, ::-1], axis=1)[:, ::-1]

        self.alone = [0, *accumulate(load.alone[order].tolist())]
        self.tops = longest_from(load.padded).sum(axis=0).tolist()
        longest = longest_from(load.lengths)
        self.rows = ((most * longest[:, :1]) // longest.clip(min=1)).min(axis=0).clip(min=most).tolist()
        limits = _largest_sums(load.sizes, most)
        self.sizes = [([0, *accumulate(row)], limit) for row, limit in zip(load.sizes[:, order].tolist(), limits)]

    def bound(self, at: int, end: int) -> int:
        """Cost of the stretch from `at` to `end`, at most."""
        return self.alone[end] - self.alone[at] + (end - at) * self.tops[at]

    def ends(self, bound: int) -> list[int]:
        """Where the stretches end. One row may cost more than `bound`; none fill more than they may."""
        ends, at, rows = [], 0, len(self.tops)
        while at < rows:
            most = min(rows, at + self.rows[at])
            for filled, limit in self.sizes:
                most = min(most, bisect_right(filled, filled[at] + limit, at) - 1)
            end = at + 1
            while end < most and self.bound(at, end + 1) <= bound:
                end += 1
            ends.append(end)
            at = end
        return ends


def _largest_sums(sizes: np.ndarray, most: int) -> list[int]:
    """Sum of the `most` largest of each quantity [k, n]."""
    return [sum(sorted(row, reverse=True)[:most]) for row in sizes.tolist()]
