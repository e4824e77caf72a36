"""Statistics of a language head's distribution: attention over the vocabulary, streamed.

    z[n, v]       = hidden[n] . weight[v] / temperature                 v < vocab_size
    logsumexp[n]  = log sum_v exp z[n, v]
    mean_logit[n] = sum_v softmax(z[n])[v] z[n, v]
    expectation[n] = sum_v softmax(z[n])[v] values[v]

Shapes: hidden [N, Dk], weight [V, Dk], values [V, Dv]; N tokens, V vocabulary, Dk / Dv widths of key and value.
Nothing of size N x V exists: the vocabulary is read in chunks with an online softmax, and parts of a vocabulary merge
exactly like split-KV attention. Cost: 2 N V (Dk + Dv) operations.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._common import (
    HeadOptions,
    accumulate,
    check_same_device,
    check_tensor,
    check_width,
    compute_dtype,
    exact_matmul,
    logits_chunk,
    make_options,
    plan_chunks,
    spans,
)

# Without a host sync to pay for (CPU), sums are rescaled only when some row's maximum has grown by more than this:
# exp(16) times a vocabulary is far from overflow, and the accuracy of floating-point sums does not depend on scale.
RESCALE_MARGIN = 16.0


class HeadStatistics(NamedTuple):
    """Statistics of N distributions; float32 (float64 for float64 inputs)."""

    logsumexp: Tensor  # [N], nats
    mean_logit: Tensor  # [N], nats
    expectation: Tensor | None  # [N, Dv], in the unit of values


# ---- reference ----


def reference_head_statistics(
    hidden: Tensor, weight: Tensor, values: Tensor | None = None, *, vocab_size: int | None = None,
    temperature: float = 1.0,
) -> HeadStatistics:
    """Dense float64 oracle, differentiable by autograd. Same shapes as `head_statistics`; all results float64."""
    z = hidden.double() @ weight[:vocab_size].double().T / temperature  # [N, V]
    p = z.softmax(-1)
    expectation = None if values is None else p @ values[:vocab_size].double()
    return HeadStatistics(z.logsumexp(-1), (p * z).sum(-1), expectation)


# ---- streaming implementation ----


def stream_head_statistics(
    hidden: Tensor,  # [N, Dk]
    weight: Tensor,  # [V, Dk]
    values: Tensor | None,  # [V, Dv]
    options: HeadOptions,
    *,
    with_mean: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """logsumexp [N], mean_logit [N] or None, expectation [N, Dv] or None: one vocabulary pass per row block.

    No checks and no autograd: the operators of this package build on it.
    """
    rows = hidden.shape[0]
    dtype = compute_dtype(hidden, weight, values)
    row_chunk, vocab_chunk = plan_chunks(rows, options, dtype, hidden.device)
    logsumexp = torch.empty(rows, dtype=dtype, device=hidden.device)
    mean = torch.empty_like(logsumexp) if with_mean else None
    expectation = None
    if values is not None:
        expectation = torch.empty(rows, values.shape[1], dtype=dtype, device=hidden.device)
    with exact_matmul(hidden.device):
        tile = row_chunk * vocab_chunk
        scratch = [torch.empty(tile, dtype=dtype, device=hidden.device) for _ in range(1 + with_mean)]
        for block in spans(rows, row_chunk):
            out = None if expectation is None else expectation[block]
            lse_block, mean_block = _stream_block(hidden[block], weight, values, options, vocab_chunk, scratch, out)
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
    scratch: list[Tensor],  # one buffer of R * vocab_chunk, or two where the mean logit is wanted too
    expectation: Tensor | None,  # [R, Dv], written
) -> tuple[Tensor, Tensor | None]:
    """Online softmax of one row block; returns logsumexp [R] and mean logit [R] in float64."""
    rows = hidden.shape[0]
    with_mean = len(scratch) == 2
    if not _stays_low(hidden):
        hidden = hidden.to(scratch[0].dtype)
    # [R] each: what is subtracted from logits; sum of exponentials; sum of exponential * (logit - shift)
    shift = total = moment = None
    for chunk in spans(options.vocab_size, vocab_chunk):
        columns = chunk.stop - chunk.start
        first = total is None
        key = weight[chunk] if _stays_low(hidden) else weight[chunk].to(scratch[0].dtype)
        tile = scratch[0][: rows * columns].view(rows, columns)
        z = logits_chunk(hidden, key, 1.0 / options.temperature, tile)
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
        p = torch.exp(z, out=scratch[1][: rows * columns].view(rows, columns) if with_mean else z)
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


# ---- public functions ----


@torch.no_grad()
def head_statistics(
    hidden: Tensor,
    weight: Tensor,
    values: Tensor | None = None,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
    workspace_bytes: int | None = None,
) -> HeadStatistics:
    """Log-sum-exp, mean logit and expected value of every token's vocabulary distribution. No gradient.

    The one primitive behind layer distillation (VLsI, section 3.2): a head is read once, in chunks, whatever is made
    of the distribution afterwards.

    Args:
        hidden: [N, Dk] float32, bfloat16, float16 or float64; N may be 0.
        weight: [V, Dk] head that gives the logits.
        values: [V', Dv] rows to average under the distribution, or None.
        vocab_size: rows of the heads that take part; None: as many as the shorter head has. Rows beyond are never read.
        temperature: logits are divided by it.
        impl: "auto" and "torch": streaming; "reference": dense float64.
        workspace_bytes: scratch memory; None: `DEFAULT_WORKSPACE_BYTES` of the device. At least 256 x 256 logits are
            held whatever it says.

    Returns: HeadStatistics(logsumexp [N], mean_logit [N], expectation [N, Dv] or None), float32 (float64 if any input
        is float64). Logits are never rounded to half precision.

    Raises:
        ValueError: shapes that do not fit, several devices, vocab_size outside 1..V, temperature <= 0, unknown impl.
        TypeError: dtypes other than the four. NotImplementedError: impl="triton".
    """
    check_tensor("hidden", hidden, ("N", "Dk"))
    check_tensor("weight", weight, ("V", "Dk"))
    check_width("hidden", hidden.shape[1], "weight", weight.shape[1])
    vocab_rows = weight.shape[0]
    if values is not None:
        check_tensor("values", values, ("V", "Dv"))
        vocab_rows = min(vocab_rows, values.shape[0])
    check_same_device(hidden=hidden, weight=weight, values=values)
    options = make_options(vocab_size, vocab_rows, temperature, impl, workspace_bytes, hidden.device)
    if options.impl == "reference":
        stats = reference_head_statistics(
            hidden, weight, values, vocab_size=options.vocab_size, temperature=options.temperature
        )
        dtype = compute_dtype(hidden, weight, values)
        return HeadStatistics(*(None if t is None else t.to(dtype) for t in stats))
    return HeadStatistics(*stream_head_statistics(hidden, weight, values, options))


@torch.no_grad()
def merge_head_statistics(parts: Sequence[HeadStatistics]) -> HeadStatistics:
    """Statistics of a whole vocabulary from those of its disjoint parts (e.g. tensor-parallel shards of a head).

    Args: parts: one HeadStatistics per part, for the same N tokens; all with an expectation, or none.

    Returns: HeadStatistics of the union, exact up to rounding: each part weighs exp(its logsumexp - the whole's).

    Raises: ValueError on an empty list, differing shapes, or an expectation in only some parts.
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
