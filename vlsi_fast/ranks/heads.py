"""Frozen language heads, whole while the losses read them (`training.persist_heads`).

Under ZeRO-3 a head is gathered for each read, in every micro-batch, and the fused kernels convert it in each pass.
Kept, it is gathered by the first read of an optimizer step and stays whole, for all of the step's micro-batches and
losses, until `release`: DeepSpeed's own record of the parameter is as if it had been released at once, and only the
gathered tensor lives on. So does the float16 copy that the kernels multiply with (`vlsi_kernels.FrozenHead`), as long
as the whole head: without ZeRO-3 for the run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from vlsi_kernels import FrozenHead

from .sharding import gathered


class _Kept(NamedTuple):
    parameter: Tensor
    """The parameter, so that no other takes its place in memory."""
    shard: tuple[Tensor, int] | None
    """The rank's shard and its version, of which the whole was made; None: not sharded."""
    head: FrozenHead


class FrozenHeads:
    """The frozen heads of a stage.

    Args:
        keep: whether they stay whole between reads, until `release`. The same on every rank.
    """

    def __init__(self, keep: bool = False):
        self.keep = keep
        self._kept: dict[int, _Kept] = {}

    @contextlib.contextmanager
    def whole(self, weights: Sequence[Tensor]) -> Iterator[list[Tensor | FrozenHead]]:
        """Whole heads inside the block, [V, d] each, as the operators take them. Collective where they are sharded.

        Args:
            weights: parameters that are not trained, whole or shards.
        """
        distinct = {id(weight): weight for weight in weights}  # both models may speak through one head
        if not self.keep:
            with gathered(distinct.values()):
                yield [weight.detach() for weight in weights]
            return
        found = {number: self._at_hand(weight) for number, weight in distinct.items()}
        with gathered([weight for number, weight in distinct.items() if found[number] is None]):
            heads = {number: head or self._take(distinct[number]) for number, head in found.items()}
        yield [heads[id(weight)] for weight in weights]

    def release(self) -> None:
        """Give back what was gathered; heads that are whole by themselves keep their copies."""
        self._kept = {number: kept for number, kept in self._kept.items() if kept.shard is None}

    def _at_hand(self, weight: Tensor) -> FrozenHead | None:
        """The head, if it is kept and its shard is the one that was gathered: on all ranks alike, as changes are."""
        kept = self._kept.get(id(weight))
        return kept.head if kept is not None and _same(kept.shard, _shard_of(weight)) else None

    def _take(self, weight: Tensor) -> FrozenHead:
        """A head that is whole now. Of a sharded one the tensor is held, which DeepSpeed lets go of; of another the
        parameter, whatever tensor it comes to hold."""
        shard = _shard_of(weight)
        head = FrozenHead(weight if shard is None else weight.detach())
        self._kept[id(weight)] = _Kept(weight, shard, head)
        return head


def _shard_of(weight: Tensor) -> tuple[Tensor, int] | None:
    return (weight.ds_tensor, weight.ds_tensor._version) if hasattr(weight, "ds_id") else None


def _same(one: tuple[Tensor, int] | None, other: tuple[Tensor, int] | None) -> bool:
    if one is None or other is None:
        return one is other
    return one[0] is other[0] and one[1] == other[1]
