"""Statistics of a language head's distribution: attention over the vocabulary, streamed.

    z[n, v]       = hidden[n] . weight[v] / temperature                 v < vocab_size
    logsumexp[n]  = log sum_v exp z[n, v]
    mean_logit[n] = sum_v softmax(z[n])[v] z[n, v]
    expectation[n] = sum_v softmax(z[n])[v] values[v]

Shapes: hidden [N, Dk], weight [V, Dk], values [V, Dv]; N tokens, V vocabulary, Dk / Dv widths of key and value.
Nothing of size N x V exists: the vocabulary is read in chunks with an online softmax, and parts of a vocabulary merge
exactly like split-KV attention. Cost: 2 N V (Dk + Dv) operations.

On GPUs one fused kernel sits between two library matrix products: it turns a tile of logits into exponentials, keeps
the running sums, and rescales what the exponentials were multiplied into when a row's maximum has outgrown its scale.
Half-precision values are multiplied by float16 exponentials (11 bits, where bfloat16 has 8), scaled per row to use
float16's range; the sums that normalise expectation and mean are those of the *rounded* exponentials.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ._common import (
    HeadOptions,
    VocabularyShard,
    accumulate,
    check_same_device,
    check_tensor,
    check_width,
    compute_dtype,
    exact_matmul,
    logits_chunk,
    make_options,
    makes_logits,
    plan_chunks,
    plan_tiles,
    product,
    spans,
)
from ._triton import constant, jit, tl
from ._waves import multiprocessors
from .frozen_head import FrozenHead, TileValues, tile_dtype, weight_of

# Without a host sync to pay for (CPU), sums are rescaled only when some row's maximum has grown by more than this:
# exp(16) times a vocabulary is far from overflow, and the accuracy of floating-point sums does not depend on scale.
RESCALE_MARGIN = 16.0
# Powers of two around which a tile's exponentials are kept: a row's largest is set to 2^8 and may grow to 2^15.9 before
# the row is rescaled (float16 ends at 2^16). Below 2^-14 float16 loses digits, 2^-22 of the largest and less.
LOG2_TOP = constant(8.0)
LOG2_LIMIT = constant(15.9)
BLOCK_WIDTH = 1024


class HeadStatistics(NamedTuple):
    """Statistics of N distributions; float32 (float64 for float64 inputs)."""

    logsumexp: Tensor  # [N], nats
    mean_logit: Tensor  # [N], nats
    expectation: Tensor | None  # [N, Dv], in the unit of values


# ---- reference ----


def reference_head_statistics(
    hidden: Tensor,
    weight: Tensor,
    values: Tensor | None = None,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
) -> HeadStatistics:
    """Dense float64 oracle, differentiable by autograd. Same shapes as `head_statistics`; all results float64."""
    z = hidden.double() @ weight[:vocab_size].double().T / temperature  # [N, V]
    p = z.softmax(-1)
    expectation = None if values is None else p @ values[:vocab_size].double()
    return HeadStatistics(z.logsumexp(-1), (p * z).sum(-1), expectation)


# ---- Triton kernels ----


@jit
def softmax_tile_kernel(
    logits_ptr,  # [R, C] f32, before temperature
    exp_ptr,  # [R, C] f16 or f32, written where WRITE
    state_ptr,  # [4, R] f64: shift (base 2), sum of exponentials, sum of rounded ones, of rounded ones * (y - shift)
    sum_ptr,  # [R, width] f32, what the exponentials of earlier tiles were multiplied into; touched where WRITE
    logits_stride, exp_stride, sum_stride, rows, columns, width,
    to_base2,  # log2(e) / temperature
    FIRST: tl.constexpr,  # no tile came before: state and sum hold nothing
    WRITE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax; one program a row, the tile's row in registers."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    y = tl.load(logits_ptr + row * logits_stride + column, mask=inside, other=float("-inf")) * to_base2
    top = tl.max(y, 0)
    shift = top - LOG2_TOP
    if not FIRST:
        old = tl.load(state_ptr + row).to(tl.float32)
        shift = tl.where(top > old + LOG2_LIMIT, shift, old)
    distance = y - shift
    p = tl.exp2(distance)
    rounded = p
    if WRITE:
        low = p.to(exp_ptr.dtype.element_ty)
        tl.store(exp_ptr + row * exp_stride + column, low, mask=inside)
        rounded = low.to(tl.float32)
    total = tl.sum(p, 0).to(tl.float64)
    total_rounded = tl.sum(rounded, 0).to(tl.float64)
    moment = tl.sum(rounded * tl.where(inside, distance, 0.0), 0).to(tl.float64)
    if not FIRST:
        factor = tl.exp2(old - shift)  # exactly 1 unless the row was rescaled
        before = tl.load(state_ptr + rows * 2 + row)
        total += tl.load(state_ptr + rows + row) * factor
        moment += (tl.load(state_ptr + rows * 3 + row) + before * (old - shift)) * factor
        total_rounded += before * factor
        if WRITE:
            if factor != 1.0:
                for start in range(0, width, BLOCK_WIDTH):
                    d = start + tl.arange(0, BLOCK_WIDTH)
                    pointer = sum_ptr + row * sum_stride + d
                    tl.store(pointer, tl.load(pointer, mask=d < width) * factor, mask=d < width)
    tl.store(state_ptr + row, shift.to(tl.float64))
    tl.store(state_ptr + rows + row, total)
    tl.store(state_ptr + rows * 2 + row, total_rounded)
    tl.store(state_ptr + rows * 3 + row, moment)


SOFTMAX_WARPS = 8  # 8192 columns in 32 registers a thread, and two such arrays live


def block_of(columns: int) -> int:
    """Smallest power of two that holds a tile's columns."""
    return 1 << max(4, (columns - 1).bit_length())


class RowState:
    """Running softmax of R rows: shift, sums and moment, float64 [4, R]; see `softmax_tile_kernel`."""

    def __init__(self, rows: int, device: torch.device):
        self.numbers = torch.empty(4, rows, dtype=torch.float64, device=device)
        self.first = True

    def update(self, logits: Tensor, exp: Tensor | None, total: Tensor | None, options: HeadOptions, chunk: int):
        """Takes in a tile of logits [R, C] f32; writes its exponentials to exp [R, C]; rescales total [R, D] f32."""
        rows, columns = logits.shape
        write = exp is not None
        softmax_tile_kernel[(rows,)](
            logits,
            exp if write else logits,
            self.numbers,
            total if write else logits,
            logits.stride(0),
            exp.stride(0) if write else 0,
            total.stride(0) if write else 0,
            rows,
            columns,
            total.shape[1] if write else 0,
            math.log2(math.e) / options.temperature,
            FIRST=self.first,
            WRITE=write,
            BLOCK=block_of(chunk),
            BLOCK_WIDTH=BLOCK_WIDTH,
            num_warps=SOFTMAX_WARPS,
        )
        self.first = False

    def logsumexp(self) -> Tensor:
        """[R] float64, nats; of the exact exponentials."""
        return (self.numbers[0] + self.numbers[1].log2()) * math.log(2)

    def mean(self) -> Tensor:
        """[R] float64, nats; under the rounded exponentials, as the expectation is."""
        return (self.numbers[0] + self.numbers[3] / self.numbers[2]) * math.log(2)

    def rounded_total(self) -> Tensor:
        """[R] float64, the sum that normalises a product with the exponentials."""
        return self.numbers[2]


# ---- streaming implementation ----


def stream_head_statistics(
    hidden: Tensor,  # [N, Dk]
    weight: Tensor,  # [V, Dk]
    values: Tensor | FrozenHead | None,  # [V, Dv]
    options: HeadOptions,
    *,
    with_mean: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """logsumexp [N], mean_logit [N] or None, expectation [N, Dv] or None: one vocabulary pass per row block.

    No checks and no autograd: the operators of this package build on it.
    """
    if options.vocab_size == 0:  # a shard of nothing but padding
        plain = weight_of(values)
        dtype = compute_dtype(hidden, weight, plain)
        empty = hidden.new_zeros(hidden.shape[0], dtype=dtype)
        expectation = None if plain is None else hidden.new_zeros(hidden.shape[0], plain.shape[1], dtype=dtype)
        result = (empty - math.inf, empty if with_mean else None, expectation)
    elif options.impl == "triton":
        result = _stream_triton(hidden, weight, values, options, with_mean)
    else:
        result = _stream_torch(hidden, weight, weight_of(values), options, with_mean)
    return result if options.shard is None else _merge_over_group(*result, options.shard)


def _stream_triton(
    hidden: Tensor, weight: Tensor, values: Tensor | FrozenHead | None, options: HeadOptions, with_mean: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    rows, width = hidden.shape[0], 0 if values is None else weight_of(values).shape[1]
    low = tile_dtype(weight_of(values))
    key, sms = hidden.shape[1], multiprocessors(hidden.device)
    row_chunk, vocab_chunk = plan_tiles(rows, width, low, options, key=key, sms=sms)
    logsumexp = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    mean = torch.empty_like(logsumexp) if with_mean else None
    expectation = None if values is None else torch.empty(rows, width, dtype=torch.float32, device=hidden.device)
    if rows == 0:
        return logsumexp, mean, expectation
    logits = torch.empty(row_chunk, vocab_chunk, dtype=torch.float32, device=hidden.device)
    exp = None if values is None else torch.empty_like(logits, dtype=low)
    with exact_matmul(hidden.device):
        tile_values = None if values is None else TileValues(values, options.vocab_size, vocab_chunk)
        for block in spans(rows, row_chunk):
            state = RowState(block.stop - block.start, hidden.device)
            total = None if expectation is None else expectation[block]
            for chunk in spans(options.vocab_size, vocab_chunk):
                size = block.stop - block.start, chunk.stop - chunk.start
                first = state.first
                z = product(hidden[block], weight[chunk].t(), logits[: size[0], : size[1]])
                p = None if exp is None else exp[: size[0], : size[1]]
                state.update(z, p, total, options, vocab_chunk)
                if p is not None:
                    product(p, tile_values[chunk], total, accumulate=not first)
            if total is not None:
                tile_values.normalise(total, state.rounded_total())
            logsumexp[block] = state.logsumexp()
            if mean is not None:
                mean[block] = state.mean()
    return logsumexp, mean, expectation


def _stream_torch(
    hidden: Tensor, weight: Tensor, values: Tensor | None, options: HeadOptions, with_mean: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    rows = hidden.shape[0]
    dtype = compute_dtype(hidden, weight, values)
    row_chunk, vocab_chunk = plan_chunks(rows, options, dtype, hidden.device, 0 if values is None else values.shape[1])
    logsumexp = torch.empty(rows, dtype=dtype, device=hidden.device)
    mean = torch.empty_like(logsumexp) if with_mean else None
    expectation = None
    if values is not None:
        expectation = torch.empty(rows, values.shape[1], dtype=dtype, device=hidden.device)
    with exact_matmul(hidden.device):
        # a mean that is the product of hidden and expectation needs no pass over the tile
        summed = with_mean and values is not weight
        kept = [not makes_logits(hidden, weight, dtype), summed]
        size = row_chunk * vocab_chunk
        scratch = [torch.empty(size, dtype=dtype, device=hidden.device) if keep else None for keep in kept]
        for block in spans(rows, row_chunk):
            out = None if expectation is None else expectation[block]
            lse_block, mean_block = _stream_block(hidden[block], weight, values, options, vocab_chunk, scratch, out)
            if with_mean and not summed:
                mean_block = (hidden[block] * out).sum(1, dtype=torch.float64) / options.temperature
            logsumexp[block] = lse_block
            if mean is not None:
                mean[block] = mean_block
    return logsumexp, mean, expectation


def _stream_block(
    hidden: Tensor,  # [R, Dk]
    weight: Tensor,  # [V, Dk]
    values: Tensor | None,  # [V, Dv]
    options: HeadOptions,
    vocab_chunk: int,
    scratch: list[Tensor | None],  # R * vocab_chunk: logits, where they need a buffer; exponentials, for the mean logit
    expectation: Tensor | None,  # [R, Dv], written
) -> tuple[Tensor, Tensor | None]:
    """Online softmax of one row block; returns logsumexp [R] and mean logit [R] in float64."""
    rows = hidden.shape[0]
    dtype = compute_dtype(hidden, weight, values)
    tile, exponentials = scratch
    with_mean = exponentials is not None
    if not _stays_low(hidden):
        hidden = hidden.to(dtype)
    # [R] each: what is subtracted from logits; sum of exponentials; sum of exponential * (logit - shift)
    shift = total = moment = None
    for chunk in spans(options.vocab_size, vocab_chunk):
        columns = chunk.stop - chunk.start
        first = total is None
        key = weight[chunk] if _stays_low(hidden) else weight[chunk].to(dtype)
        place = None if tile is None else tile[: rows * columns].view(rows, columns)
        z = logits_chunk(hidden, key, 1.0 / options.temperature, place, dtype)
        highest = z.amax(1)
        if first:
            shift = highest
        elif _must_rescale(highest, shift):
            raised = torch.maximum(shift, highest)
            factor = (shift - raised).double().exp()
            if with_mean:  # exp(z - s) (z - s) summed, moved to the new shift
                moment = (moment + total * (shift - raised).double()) * factor
            total = total * factor
            if expectation is not None:
                expectation.mul_(factor.to(expectation.dtype)[:, None])
            shift = raised
        z.sub_(shift[:, None])
        p = torch.exp(z, out=exponentials[: rows * columns].view(rows, columns) if with_mean else z)
        chunk_total = p.sum(1).double()
        total = chunk_total if first else total + chunk_total
        if expectation is not None:
            accumulate(expectation, p, key if values is weight else values[chunk], first)
        if with_mean:
            chunk_moment = z.mul_(p).sum(1).double()
            moment = chunk_moment if first else moment + chunk_moment
    if expectation is not None:
        expectation.div_(total.to(expectation.dtype)[:, None])
    logsumexp = shift.double() + total.log()
    return logsumexp, shift.double() + moment / total if with_mean else None


def _must_rescale(highest: Tensor, shift: Tensor) -> bool:
    """On CPU only when a row has outgrown the margin; elsewhere always, as asking would wait for the device."""
    return highest.device.type != "cpu" or bool((highest > shift + RESCALE_MARGIN).any())


def _stays_low(hidden: Tensor) -> bool:
    """bfloat16 on CUDA is multiplied as it is (products exact, float32 sums); everything else is converted once."""
    return hidden.is_cuda and hidden.dtype == torch.bfloat16


def _merge_over_group(
    logsumexp: Tensor, mean: Tensor | None, expectation: Tensor | None, shard: VocabularyShard
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The same statistics over the shards of all ranks, equal on all of them: `merge_head_statistics` by all-reduce."""
    top = logsumexp.double()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=shard.group)
    share = (logsumexp.double() - top).exp()
    sums = torch.stack([share] if mean is None else [share, share * mean.double()])
    dist.all_reduce(sums, group=shard.group)
    if expectation is not None:
        expectation.mul_((share / sums[0]).to(expectation.dtype)[:, None])
        dist.all_reduce(expectation, group=shard.group)
    whole = (top + sums[0].log()).to(logsumexp.dtype)
    return whole, None if mean is None else (sums[1] / sums[0]).to(mean.dtype), expectation


# ---- public functions ----


@torch.compiler.disable
@torch.no_grad()
def head_statistics(
    hidden: Tensor,
    weight: Tensor,
    values: Tensor | FrozenHead | None = None,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
    workspace_bytes: int | None = None,
    shard: VocabularyShard | None = None,
) -> HeadStatistics:
    """Log-sum-exp, mean logit and expected value of every token's vocabulary distribution. No gradient.

    The one primitive behind layer distillation (VLsI, section 3.2): a head is read once, in chunks, whatever is made
    of the distribution afterwards.

    Args:
        hidden: [N, Dk] float32, bfloat16, float16 or float64; N may be 0.
        weight: [V, Dk] head that gives the logits.
        values: [V', Dv] rows to average under the distribution, or None. As a `FrozenHead` they are converted for the
            fused kernels once and not in every call.
        vocab_size: rows of the heads that take part; None: as many as the shorter head has. Rows beyond are never read.
        temperature: logits are divided by it.
        impl: "triton": fused kernels on CUDA; "torch": streaming in plain PyTorch; "reference": dense float64; "auto":
            "triton" on CUDA where Triton is installed and no input is float64, else "torch".
        workspace_bytes: scratch memory; None: `DEFAULT_WORKSPACE_BYTES` of the device. At least 256 x 256 logits are
            held whatever it says.
        shard: where weight and values are this rank's rows of a head divided over ranks, and vocab_size counts the
            whole head's rows; None: they are the whole head.

    Returns:
        HeadStatistics(logsumexp [N], mean_logit [N], expectation [N, Dv] or None), float32 (float64 if any input
        is float64). Logits are never rounded to half precision. With impl="triton" and half-precision values, mean and
        expectation are those of exponentials rounded to float16, both of the same ones, so that what is made of the
        two together (a KL) keeps its accuracy: alone, each may be off by some 1e-4 of its spread.

    Raises:
        ValueError: shapes that do not fit, several devices, vocab_size outside 1..V, temperature <= 0, unknown impl.
            impl="triton" on another device. TypeError: dtypes other than the four; float64 for impl="triton".
        ImportError: impl="triton" where Triton is not installed.
    """
    check_tensor("hidden", hidden, ("N", "Dk"))
    check_tensor("weight", weight, ("V", "Dk"))
    check_width("hidden", hidden.shape[1], "weight", weight.shape[1])
    heads, plain = (weight,), weight_of(values)
    if plain is not None:
        check_tensor("values", plain, ("V", "Dv"))
        heads = (weight, plain)
    check_same_device(hidden=hidden, weight=weight, values=plain)
    options = make_options(vocab_size, heads, temperature, impl, workspace_bytes, (hidden,), shard)
    if options.impl == "reference":
        stats = reference_head_statistics(
            hidden, weight, plain, vocab_size=options.vocab_size, temperature=options.temperature
        )
        dtype = compute_dtype(hidden, weight, plain)
        return HeadStatistics(*(None if t is None else t.to(dtype) for t in stats))
    return HeadStatistics(*stream_head_statistics(hidden, weight, values, options))


@torch.no_grad()
def merge_head_statistics(parts: Sequence[HeadStatistics]) -> HeadStatistics:
    """Statistics of a whole vocabulary from those of its disjoint parts (e.g. tensor-parallel shards of a head).

    Args:
        parts: one HeadStatistics per part, for the same N tokens; all with an expectation, or none.

    Returns:
        HeadStatistics of the union, exact up to rounding. Each part weighs exp(its logsumexp - the whole's).

    Raises:
        ValueError: an empty list, differing shapes, or an expectation in only some parts.
    """
    parts = list(parts)
    if not parts:
        raise ValueError("merge_head_statistics needs at least one part, got an empty list")
    with_expectation = parts[0].expectation is not None
    if any((part.expectation is not None) != with_expectation for part in parts):
        raise ValueError("some parts have an expectation and some have none; compute all with values, or all without")
    for part in parts[1:]:
        if part.logsumexp.shape != parts[0].logsumexp.shape or (
            with_expectation and part.expectation.shape != parts[0].expectation.shape
        ):
            raise ValueError("parts differ in shape; every part must hold the same N tokens and the same values' width")
    lse = torch.stack([part.logsumexp.double() for part in parts])  # [parts, N]
    whole = lse.logsumexp(0)
    share = (lse - whole).exp()
    mean = sum(s * part.mean_logit.double() for s, part in zip(share, parts, strict=True))
    dtype = parts[0].logsumexp.dtype
    expectation = None
    if with_expectation:
        expectation = torch.zeros_like(parts[0].expectation)
        for s, part in zip(share, parts, strict=True):
            expectation.addcmul_(part.expectation, s.to(expectation.dtype)[:, None])
    return HeadStatistics(whole.to(dtype), mean.to(dtype), expectation)
