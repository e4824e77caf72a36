"""The head that exponentials are multiplied with, in the float16 that the fused kernels write them in.

    copy[v] = 2^k head[v] in float16, v < vocab_size        k: the largest number is then between 2^9 and 2^10

A bfloat16 head has a wider range than float16, so it is scaled by a power of two, which is found on the device; what
underflows is below 2^-34 of the largest. Heads of other dtypes are multiplied as they are. Shapes: head [V, D].

An operator converts a head that it is given as a tensor in every pass, chunk by chunk. A head that is not trained is
the same in all passes: `FrozenHead` converts it once.
"""

import math

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ._common import spans

# Half-precision values are scaled by a power of two so that the largest is between 2^9 and 2^10.
VALUE_EXPONENT = 10
CHUNK = 16384
"""Rows that are converted at once: PyTorch may go through a tensor of the source's dtype."""


class FrozenHead:
    """A language head that is not trained, with the float16 copy that the Triton path multiplies with, made once.

    Operators take it in place of the student's head (`values` of `head_statistics`); results are the same to the last
    bit. The copy is made by the first pass that needs one and kept until `clear`, or as long as this object lives:
    2 V D bytes beyond the workspace (0.47 GB for a vocabulary of 151936 and width 1536, 1.09 GB for 3584). It is used
    for the very storage, version, shape and dtype of which it was made, and for the same `vocab_size`; after any
    change (an optimizer's step, `copy_`, another storage behind the same parameter) the head is converted again. Only
    writes through `.data`, of which PyTorch keeps no count, need a `clear`. Nothing is copied where nothing is
    converted: on the "torch" path, and of float16 and float32 heads.
    """

    def __init__(self, weight: Tensor):
        """`weight`: [V, D], held as it is, not copied; it may be whole only later (ZeRO-3), when it is used."""
        if not isinstance(weight, Tensor):
            raise TypeError(f"a FrozenHead is made of the head's weight, a torch.Tensor, got {type(weight).__name__}")
        self.weight = weight
        self._copy: tuple[Tensor, Tensor] | None = None
        self._made_of: tuple | None = None

    def clear(self) -> None:
        """Give the copy's memory back."""
        self._copy = self._made_of = None

    def scaled(self, vocab_size: int) -> tuple[Tensor, Tensor | None]:
        """The first `vocab_size` rows in the dtype that exponentials are multiplied in, and their scale, if any."""
        if not is_converted(self.weight):
            return self.weight, None
        found = None if self.weight.is_inference() else _fingerprint(self.weight, vocab_size)  # these have no version
        if found is None or self._made_of != found:
            self.clear()  # first: two copies need not be alive at once
            scale = scale_of(self.weight, vocab_size)
            self._copy = (_converted(self.weight, vocab_size, scale), scale)
            self._made_of = found
        return self._copy


def weight_of(head: Tensor | FrozenHead | None) -> Tensor | None:
    """A head's weight, however it is given. Raises ValueError: a `FrozenHead` of one that requires a gradient."""
    if not isinstance(head, FrozenHead):
        return head
    if head.weight.requires_grad:
        raise ValueError(
            "a FrozenHead holds a weight that requires a gradient, so it is trained; pass the weight itself"
        )
    return head.weight


def frozen_of(head: Tensor | FrozenHead) -> FrozenHead | None:
    """The head where it is given as a frozen one."""
    return head if isinstance(head, FrozenHead) else None


def tile_dtype(values: Tensor | None) -> torch.dtype:
    """In what the exponentials are stored and multiplied with `values`."""
    return torch.float32 if values is None or values.dtype == torch.float32 else torch.float16


def is_converted(values: Tensor) -> bool:
    """Whether values are multiplied in another dtype than theirs."""
    return values.dtype == torch.bfloat16


@torch.no_grad()
def scale_of(values: Tensor, vocab_size: int) -> Tensor:
    """The power of two, float32 on the device, that brings the largest of the rows that take part below 2^10."""
    largest = torch.linalg.vector_norm(values[:vocab_size], math.inf, dtype=torch.float32)
    return torch.ldexp(torch.ones_like(largest), VALUE_EXPONENT - torch.frexp(largest).exponent)


@torch.no_grad()
def _converted(values: Tensor, vocab_size: int, scale: Tensor) -> Tensor:
    copy = values.new_empty(vocab_size, values.shape[1], dtype=torch.float16)
    for rows in spans(vocab_size, CHUNK):
        torch.mul(values[rows], scale, out=copy[rows])
    return copy


def _fingerprint(weight: Tensor, vocab_size: int) -> tuple:
    """What a copy was made of. The weak reference keeps a freed storage's identity from being used again."""
    place = weight.data_ptr(), weight.storage_offset(), weight.shape, weight.stride(), weight.dtype
    return StorageWeakRef(weight.untyped_storage()), weight._version, vocab_size, *place


class TileValues:
    """Chunks of values [V, D] in the dtype that the exponentials are multiplied in."""

    def __init__(self, values: Tensor | FrozenHead, vocab_size: int, chunk: int):
        """`chunk`: rows of a chunk at most. Values that are no `FrozenHead` are converted chunk by chunk."""
        self.values, self.scale, self.buffer = weight_of(values), None, None
        if isinstance(values, FrozenHead):
            self.values, self.scale = values.scaled(vocab_size)
        elif is_converted(values):
            self.scale = scale_of(values, vocab_size)
            self.buffer = values.new_empty(chunk, values.shape[1], dtype=torch.float16)

    def __getitem__(self, chunk: slice) -> Tensor:
        if self.buffer is None:
            return self.values[chunk]
        return torch.mul(self.values[chunk], self.scale, out=self.buffer[: chunk.stop - chunk.start])

    def normalise(self, total: Tensor, rounded_total: Tensor) -> None:
        """Divides the accumulated product [R, D] by the exponentials' sum [R] and the scale, in place."""
        if self.scale is not None:
            rounded_total = rounded_total * self.scale
        total.mul_(rounded_total.reciprocal().float()[:, None])
