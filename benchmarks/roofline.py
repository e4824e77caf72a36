"""Rooflines: a task's matrix products alone, with nothing between them, in the same process as the task.

A vocabulary pass is logits [R, Dk] x [Dk, C] in float32, and exponentials [R, C] x [C, Dv] added up in float32, for
each chunk of C vocabulary rows. "roofline" takes the chunks that our implementation takes; "roofline, unchunked" as
many rows at once as fit, each against the whole vocabulary. On GPUs with half-precision inputs the exponentials and
their values are float16, as ours are. Operands are random: on zeros a GPU draws less power and runs faster.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from harness import clock
from meter import tensor_bytes
from torch import Tensor

from vlsi_kernels import _common
from vlsi_kernels._waves import multiprocessors, pass_waves
from vlsi_kernels.frozen_head import tile_dtype

UNCHUNKED_BYTES = {"cuda": 16 * 2**30, "cpu": 512 * 2**20}
"""Scratch of the unchunked products: whole vocabularies for as many rows as this holds."""


def our_chunks(rows: int, vocab: int, weight: Tensor, values: Tensor | None) -> tuple[int, int]:
    """Row and vocabulary chunk of one of our passes on weight's device, as "auto" plans them."""
    options = _common.make_options(vocab, (weight,), 1.0, "auto", None, ())
    if options.impl == "triton":
        width, sms = 0 if values is None else values.shape[1], multiprocessors(weight.device)
        return _common.plan_tiles(rows, width, tile_dtype(values), options, key=weight.shape[1], sms=sms)
    return _common.plan_chunks(rows, options, _common.compute_dtype(weight), weight.device)


def waves_note(needed: Sequence[tuple[Tensor, Tensor, Tensor | None]], vocab: int) -> str:
    """Of each pass the rows of a block, waves of both products, and the share of whole waves that does work; nothing on
    the CPU. See `vlsi_kernels._waves` for the tiles that it assumes."""
    told = []
    for hidden, weight, values in needed:
        if not hidden.is_cuda:
            continue
        sms, width = multiprocessors(hidden.device), 0 if values is None else values.shape[1]
        block, columns = our_chunks(len(hidden), vocab, weight, values)
        found = pass_waves(len(hidden), block, weight.shape[1], width, columns, sms)
        waves = f"{found.logits} + {found.expectation} waves of {sms} SMs, {found.efficiency:.0%} full"
        told.append(f"{len(hidden)} rows in blocks of {block}: {waves}")
    return "; ".join(told)


def whole_vocabulary(rows: int, vocab: int, device: torch.device) -> tuple[int, int]:
    """Row and vocabulary chunk of the unchunked products."""
    fitting = UNCHUNKED_BYTES[device.type] // (8 * vocab)
    return max(1, min(rows, fitting)), vocab


class VocabularyPass:
    """The two products of one pass over the vocabulary; without values, the first alone."""

    def __init__(self, hidden: Tensor, weight: Tensor, values: Tensor | None, vocab: int, chunks: tuple[int, int]):
        self.device, self.vocab, self.chunks = hidden.device, vocab, chunks
        low = hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16)
        self.hidden = hidden if low else hidden.float()  # [R, Dk]
        self.weight = weight if low else weight.float()  # [V, Dk]
        self.values = None  # [V, Dv]
        size = chunks[0] * chunks[1]
        self.logits = torch.empty(size, dtype=torch.float32, device=self.device)
        if values is not None:
            self.values = values[:vocab].half() if low else values[:vocab].float()
            self.exponentials = torch.rand(size, dtype=self.values.dtype, device=self.device)
            self.total = torch.empty(len(hidden), values.shape[1], dtype=torch.float32, device=self.device)

    def __call__(self) -> None:
        row_chunk, vocab_chunk = self.chunks
        with _common.exact_matmul(self.device):
            for rows in _common.spans(len(self.hidden), row_chunk):
                for chunk in _common.spans(self.vocab, vocab_chunk):
                    size = rows.stop - rows.start, chunk.stop - chunk.start
                    count = size[0] * size[1]
                    logits = self.logits[:count].view(size)
                    hidden, key, first = self.hidden[rows], self.weight[chunk], chunk.start == 0
                    if hidden.is_cuda:
                        _common.product(hidden, key.t(), logits)
                    else:  # by the library that ours takes
                        _common.logits_chunk(hidden, key, 1.0, logits, torch.float32)
                    if self.values is not None:
                        exponentials = self.exponentials[:count].view(size)
                        if hidden.is_cuda:
                            _common.product(exponentials, self.values[chunk], self.total[rows], accumulate=not first)
                        else:
                            _common.accumulate(self.total[rows], exponentials, self.values[chunk], first)


def passes(needed: Sequence[tuple[Tensor, Tensor, Tensor | None]], vocab: int, unchunked: bool) -> Callable[[], None]:
    """One step: a pass for each (hidden [R, Dk], weight [V, Dk], values [V, Dv] or None)."""
    made = []
    for hidden, weight, values in needed:
        if unchunked:
            chunks = whole_vocabulary(len(hidden), vocab, hidden.device)
        else:
            chunks = our_chunks(len(hidden), vocab, weight, values)
        made.append(VocabularyPass(hidden, weight, values, vocab, chunks))

    def step() -> None:
        for one in made:
            one()

    return step


def pass_flops(rows: int, vocab: int, *widths: int) -> float:
    """Operations of a pass: 2 R V a product and unit of its width."""
    return 2.0 * rows * vocab * sum(widths)


def work(flops: float, *inputs: Tensor) -> dict[str, float]:
    """What a task asks of the machine at least: operations of its products, and bytes of its inputs read once."""
    needed = tensor_bytes(*inputs)
    return {"flops": flops, "input_bytes": needed, "flops_per_byte": flops / needed}


def gemm_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of one large square product, random operands: what "the machine's peak" means here."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    for _ in range(3):
        left @ right
    return 2.0 * size**3 / statistics.median(clock(lambda: left @ right, device) for _ in range(10))
