"""Cross-entropy of a language head without its logits.

    z[n, v] = hidden[n] . weight[v] / temperature                       v < vocab_size
    lse[n]  = log sum_v exp z[n, v]             loss[n] = lse[n] - z[n, labels[n]]
    d loss[n] / d hidden[n]  = (e[n] - weight[labels[n]]) / temperature   with e[n] = sum_v softmax(z[n])[v] weight[v]
    d loss[n] / d weight[v]  = (softmax(z[n])[v] - [v = labels[n]]) hidden[n] / temperature

Shapes: hidden [N, D], weight [V, D], labels [N]; N tokens, V vocabulary, D width.
A frozen head costs one pass in all: e comes out of the forward pass, and backward touches neither the head nor the
vocabulary. A trained head costs a second pass in backward, again in chunks.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._common import (
    HeadOptions,
    VocabularyShard,
    accumulate,
    check_labels,
    check_reduction,
    check_same_device,
    check_tensor,
    check_width,
    compute_dtype,
    exact_matmul,
    launch_on,
    logits_chunk,
    make_options,
    makes_logits,
    plan_chunks,
    plan_tiles,
    product,
    reduce_tokens,
    spans,
)
from ._triton import jit, tl
from ._waves import multiprocessors
from .frozen_head import FrozenHead, frozen_of, weight_of
from .head_statistics import block_of, stream_head_statistics

# ---- reference ----


def reference_linear_logsumexp(
    hidden: Tensor, weight: Tensor, *, vocab_size: int | None = None, temperature: float = 1.0
) -> Tensor:
    """Dense float64 oracle of `linear_logsumexp`: [N] float64, differentiable by autograd."""
    return (hidden.double() @ weight[:vocab_size].double().T / temperature).logsumexp(-1)


def reference_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Dense float64 oracle of the per-token loss: [N] float64, 0 at ignored tokens, differentiable by autograd."""
    log_q = (hidden.double() @ weight[:vocab_size].double().T / temperature).log_softmax(-1)
    kept = labels != ignore_index
    picked = log_q.gather(1, torch.where(kept, labels, 0).long()[:, None])[:, 0]
    return torch.where(kept, -picked, 0.0)


# ---- Triton kernels ----


@jit
def subtract_label_kernel(
    hidden_ptr,  # [R, D]
    weight_ptr,  # [V, D]
    label_ptr,  # [R] i64, -1: no label among the head's rows
    expectation_ptr,  # [R, D] f32, read where GRAD
    direction_ptr,  # [R, D], written where GRAD: expectation - weight[label], subtracted in float32, rounded once
    logit_ptr,  # [R] f32, written: hidden . weight[label]
    hidden_stride, weight_stride, expectation_stride, direction_stride, width,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The label's part of loss and gradient; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(label_ptr + row)
    logit = tl.zeros((), tl.float64)
    for start in range(0, width, BLOCK):
        d = start + tl.arange(0, BLOCK)
        inside = d < width
        w = tl.load(weight_ptr + label * weight_stride + d, mask=inside & (label >= 0), other=0.0).to(tl.float32)
        h = tl.load(hidden_ptr + row * hidden_stride + d, mask=inside, other=0.0).to(tl.float32)
        logit += tl.sum(h * w, 0).to(tl.float64)
        if GRAD:
            e = tl.load(expectation_ptr + row * expectation_stride + d, mask=inside)
            result = (e - w).to(direction_ptr.dtype.element_ty)
            tl.store(direction_ptr + row * direction_stride + d, result, mask=inside)
    tl.store(logit_ptr + row, logit.to(tl.float32))


@jit
def label_gradient_tile_kernel(
    logits_ptr,  # [R, C] f32, before temperature
    out_ptr,  # [R, C] in the hidden states' dtype, written: (softmax - [column = label]) * weight
    logsumexp_ptr,  # [R] f32
    label_ptr,  # [R] i64 columns of the whole head, read where LABELS
    scale_ptr,  # [R] f32: what the row is multiplied by
    logits_stride, out_stride, columns, first_column,
    to_logit,  # 1 / temperature
    LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of the loss with respect to a tile of logits; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    z = tl.load(logits_ptr + row * logits_stride + column, mask=inside, other=float("-inf")) * to_logit
    p = tl.exp(z - tl.load(logsumexp_ptr + row))
    if LABELS:
        p -= tl.where(column == tl.load(label_ptr + row) - first_column, 1.0, 0.0)
    p *= tl.load(scale_ptr + row)
    tl.store(out_ptr + row * out_stride + column, p.to(out_ptr.dtype.element_ty), mask=inside)


LABEL_BLOCK = 1024
LABEL_WARPS = 4
TILE_WARPS = 8  # as for the softmax tile: a row of up to 8192 columns in registers


# ---- streaming implementation ----


def _subtract_label(
    hidden: Tensor,  # [R, D]
    weight: Tensor,  # [V, D]
    label_columns: Tensor,  # [R] int64 among weight's rows that take part; -1: the label is another rank's
    expectation: Tensor | None,  # [R, D]
    options: HeadOptions,
) -> tuple[Tensor, Tensor | None]:
    """The label's logit [R], and temperature times the loss's gradient in hidden's dtype [R, D] or None."""
    if options.impl == "triton" and options.shard is None:
        rows, width = hidden.shape
        logit = torch.empty(rows, dtype=torch.float32, device=hidden.device)
        grad = expectation is not None
        direction = torch.empty(rows, width, dtype=hidden.dtype, device=hidden.device) if grad else None
        hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        weight = weight if weight.stride(1) == 1 else weight.contiguous()
        with launch_on(hidden.device):
            subtract_label_kernel[(rows,)](
                hidden,
                weight,
                label_columns,
                expectation if grad else logit,
                direction if grad else logit,
                logit,
                hidden.stride(0),
                weight.stride(0),
                expectation.stride(0) if grad else 0,
                direction.stride(0) if grad else 0,
                width,
                GRAD=grad,
                BLOCK=LABEL_BLOCK,
                num_warps=LABEL_WARPS,
            )
        return logit / options.temperature, direction
    dtype = compute_dtype(hidden, weight)
    picked = weight[label_columns.clamp(min=0)].to(dtype)  # [R, D]
    if options.shard is not None:
        picked.masked_fill_((label_columns < 0)[:, None], 0.0)
        dist.all_reduce(picked, group=options.shard.group)
    logit = (hidden.to(dtype) * picked).sum(-1) / options.temperature
    return logit, None if expectation is None else expectation.sub_(picked).to(hidden.dtype)


def _weight_gradient(
    grad: Tensor,  # [N] upstream gradient of the per-token result, 0 at ignored tokens
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    label_columns: Tensor | None,  # [N] int64 within 0..vocab_size - 1, or -1 for a label that is another rank's
    logsumexp: Tensor,  # [N]
    options: HeadOptions,
) -> Tensor:
    """[V, D] in weight's dtype: softmax recomputed chunk by chunk, summed over tokens in float32, rounded once."""
    if options.vocab_size == 0 or hidden.shape[0] == 0:
        return torch.zeros_like(weight)
    if options.impl == "triton":
        return _weight_gradient_triton(grad, hidden, weight, label_columns, logsumexp, options)
    return _weight_gradient_torch(grad, hidden, weight, label_columns, logsumexp, options)


def _weight_gradient_triton(
    grad: Tensor, hidden: Tensor, weight: Tensor, label_columns: Tensor | None, logsumexp: Tensor, options: HeadOptions
) -> Tensor:
    low = hidden.dtype
    row_chunk, vocab_chunk = plan_tiles(hidden.shape[0], 0, low, options)
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    result[options.vocab_size :] = 0
    # The tile is multiplied in the hidden states' dtype. Rows are scaled so that the largest has 2^14, whatever the
    # size of upstream gradients: float16 would lose those of a mean over many tokens.
    largest = grad.abs().amax().float()
    unit = torch.where(largest > 0, largest, 1.0) * 2.0**-14
    scale = (grad.float() / unit).contiguous()
    device = hidden.device
    logits = torch.empty(row_chunk, vocab_chunk, dtype=torch.float32, device=device)
    tile = torch.empty(row_chunk, vocab_chunk, dtype=low, device=device)
    total = torch.empty(vocab_chunk, weight.shape[1], dtype=torch.float32, device=device)
    with exact_matmul(device):
        for chunk in spans(options.vocab_size, vocab_chunk):
            columns = chunk.stop - chunk.start
            for block in spans(hidden.shape[0], row_chunk):
                rows = block.stop - block.start
                z = product(hidden[block], weight[chunk].t(), logits[:rows, :columns])
                out = tile[:rows, :columns]
                label_gradient_tile_kernel[(rows,)](
                    z,
                    out,
                    logsumexp[block],
                    logsumexp if label_columns is None else label_columns[block],
                    scale[block],
                    z.stride(0),
                    out.stride(0),
                    columns,
                    chunk.start,
                    1.0 / options.temperature,
                    LABELS=label_columns is not None,
                    BLOCK=block_of(vocab_chunk),
                    num_warps=TILE_WARPS,
                )
                product(out.t(), hidden[block], total[:columns], accumulate=block.start > 0)
            result[chunk] = total[:columns].mul_(unit / options.temperature)
    return result


def _weight_gradient_torch(
    grad: Tensor, hidden: Tensor, weight: Tensor, label_columns: Tensor | None, logsumexp: Tensor, options: HeadOptions
) -> Tensor:
    dtype = logsumexp.dtype
    row_chunk, vocab_chunk = plan_chunks(hidden.shape[0], options, dtype, hidden.device)
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    result[options.vocab_size :] = 0
    grad = (grad.to(dtype) / options.temperature)[:, None]
    if not (hidden.is_cuda and hidden.dtype == torch.bfloat16):
        hidden = hidden.to(dtype)
    with exact_matmul(hidden.device):
        size = 0 if makes_logits(hidden, weight, dtype) else row_chunk * vocab_chunk
        scratch = torch.empty(size, dtype=dtype, device=hidden.device)
        for chunk in spans(options.vocab_size, vocab_chunk):
            columns = chunk.stop - chunk.start
            total = torch.zeros(columns, weight.shape[1], dtype=dtype, device=weight.device)
            for block in spans(hidden.shape[0], row_chunk):
                rows = block.stop - block.start
                tile = scratch[: rows * columns].view(rows, columns) if size else None
                z = logits_chunk(hidden[block], weight[chunk], 1.0 / options.temperature, tile, dtype)
                z.sub_(logsumexp[block, None]).exp_().mul_(grad[block])
                if label_columns is not None:
                    column = label_columns[block, None] - chunk.start
                    inside = (column >= 0) & (column < columns)
                    z.scatter_add_(1, column.clamp(0, columns - 1), torch.where(inside, -grad[block], 0.0))
                accumulate(total, z.t(), hidden[block], first=False)
            result[chunk] = total
    return result


class _LinearLogsumexp(torch.autograd.Function):
    """logsumexp [N], less the label's logit where labels are given."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        label_columns: Tensor | None,
        options: HeadOptions,
        frozen: FrozenHead | None,
    ) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        if frozen is not None:
            weight = frozen.weight  # the same object, by which the pass knows key and values to be one
        dtype = compute_dtype(hidden, weight)
        logsumexp = torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device)
        result = logsumexp if label_columns is None else torch.empty_like(logsumexp)
        # [N, D] temperature * d result / d hidden; kept in the dtype of the gradient that it becomes
        direction = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None
        for block in spans(hidden.shape[0], _rows_at_once(hidden, weight, need_hidden, options)):
            logsumexp[block], _, expectation = stream_head_statistics(
                hidden[block], weight, (frozen or weight) if need_hidden else None, options, with_mean=False
            )
            if label_columns is not None:
                logit, expectation = _subtract_label(hidden[block], weight, label_columns[block], expectation, options)
                result[block] = logsumexp[block] - logit
            if need_hidden:
                direction[block] = expectation
        saved = (hidden, weight, label_columns, logsumexp) if need_weight else (None,) * 4
        ctx.save_for_backward(direction, *saved)
        ctx.options = options
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        direction, hidden, weight, label_columns, logsumexp = ctx.saved_tensors
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            # row by row in float32, with no float32 copy of the whole
            grad_hidden = torch.empty_like(direction)
            torch.mul(direction, (grad / ctx.options.temperature)[:, None], out=grad_hidden)
            grad_hidden.masked_fill_((grad == 0)[:, None], 0.0)  # an ignored token's hidden state may be anything
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(grad, hidden, weight, label_columns, logsumexp, ctx.options)
        return grad_hidden, grad_weight, None, None, None


def _rows_at_once(hidden: Tensor, weight: Tensor, need_hidden: bool, options: HeadOptions) -> int:
    """Rows whose float32 expectations are alive at once: one row block of the stream below."""
    rows, width = hidden.shape[0], weight.shape[1] if need_hidden else 0
    if options.impl == "triton":
        sms = multiprocessors(hidden.device)
        return plan_tiles(rows, width, hidden.dtype, options, key=hidden.shape[1], sms=sms)[0]
    return plan_chunks(rows, options, compute_dtype(hidden, weight), hidden.device, width)[0]


@torch.compiler.disable
def _apply(hidden: Tensor, weight: Tensor | FrozenHead, label_columns: Tensor | None, options: HeadOptions) -> Tensor:
    weight, frozen = weight_of(weight), frozen_of(weight)
    if not torch.is_grad_enabled():  # a Function cannot see this itself, and would compute what backward needs
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearLogsumexp.apply(hidden, weight, label_columns, options, frozen)


# ---- public functions ----


def linear_logsumexp(
    hidden: Tensor,
    weight: Tensor | FrozenHead,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
    workspace_bytes: int | None = None,
    shard: VocabularyShard | None = None,
) -> Tensor:
    """log sum_v exp(hidden . weight[v] / temperature) of every token, without the logits.

    Args:
        hidden: [N, D] float32, bfloat16, float16 or float64; N may be 0. Differentiable.
        weight: [V, D] head. Differentiable where it requires a gradient (which costs a second pass, in backward). One
            that is not trained may be a `FrozenHead`, which is converted for the fused kernels once.
        vocab_size: rows of the head that take part (None: all). Rows beyond are never read; their gradient is 0.
        temperature: logits are divided by it.
        impl: as for `head_statistics`.
        workspace_bytes: scratch memory; None: the device's default.
        shard: where weight is this rank's rows of a head divided over ranks. Results and the gradient of hidden are
            those of the whole head, on every rank; the gradient of weight is that of this rank's rows.

    Returns:
        [N] float32, nats (float64 if an input is float64).

    Raises:
        ValueError: shapes that do not fit, several devices, vocab_size outside 1..V, temperature <= 0, unknown impl.
        TypeError: dtypes other than the four; float64 for impl="triton".
        ImportError: impl="triton" without Triton.
    """
    options = _checked_options(hidden, weight, None, vocab_size, temperature, impl, workspace_bytes, shard)
    if options.impl == "reference":
        plain = weight_of(weight)
        result = reference_linear_logsumexp(
            hidden, plain, vocab_size=options.vocab_size, temperature=options.temperature
        )
        return result.to(compute_dtype(hidden, plain))
    return _apply(hidden, weight, None, options)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | FrozenHead,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    vocab_size: int | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
    workspace_bytes: int | None = None,
    shard: VocabularyShard | None = None,
) -> Tensor:
    """Cross-entropy of softmax(hidden @ weight.T / temperature) against labels, without the logits.

    The autoregressive loss of the verbalization step and of fine-tuning (VLsI, section 3.2). The gradient's two parts,
    expected row and label's row, are subtracted in float32 and rounded to hidden's dtype once: separately rounded
    halves would cancel badly near convergence.

    Args:
        hidden: [N, D] float32, bfloat16, float16 or float64; N may be 0. Differentiable.
        weight: [V, D] head. Differentiable where it requires a gradient; a frozen one costs no pass in backward, and
            may be a `FrozenHead`, which is converted for the fused kernels once.
        labels: [N] int64 or int32, already shifted; each in 0..vocab_size - 1, or ignore_index.
        ignore_index: tokens with this label give loss 0 and no gradient, and do not count in the mean.
        reduction: "mean" over the tokens that count, "sum", or "none".
        vocab_size: rows of the head that take part (None: all). Rows beyond are never read; their gradient is 0.
        temperature: logits are divided by it; the loss is not scaled back.
        impl: as for `head_statistics`.
        workspace_bytes: scratch memory; None: the device's default.
        shard: where weight is this rank's rows of a head divided over ranks. Results and the gradient of hidden are
            those of the whole head, on every rank; the gradient of weight is that of this rank's rows. vocab_size must
            be given.

    Returns:
        float32 (float64 if an input is float64), nats: a scalar, or [N] for "none". The mean over no tokens
        (N = 0, or all ignored) is 0.0 with zero gradients, where PyTorch's own gives NaN.

    Raises:
        ValueError: shapes that do not fit, several devices, vocab_size outside 1..V, temperature <= 0, unknown impl or
            reduction; on CPU a label outside its range (elsewhere its token's loss and gradient are NaN, since asking
            would wait for the device).
        TypeError: other dtypes; float64 for impl="triton".
        ImportError: impl="triton" without Triton.
    """
    check_reduction(reduction)
    if shard is not None and vocab_size is None:
        raise ValueError("a sharded head needs vocab_size, the rows of the whole vocabulary, to check the labels")
    options = _checked_options(hidden, weight, labels, vocab_size, temperature, impl, workspace_bytes, shard)
    size = options.vocab_size if shard is None else vocab_size
    labels = labels.long()
    kept = labels != ignore_index
    inside = (labels >= 0) & (labels < size)
    if labels.device.type == "cpu" and not bool((inside | ~kept).all()):
        worst = labels[kept & ~inside][0].item()
        raise ValueError(
            f"label {worst} is outside 0..{size - 1}; cut the labels to the vocabulary, or mark such "
            f"tokens with ignore_index={ignore_index}"
        )
    columns = torch.where(kept & inside, labels, 0)
    if shard is not None:
        columns = columns - shard.start
        columns = torch.where((columns >= 0) & (columns < options.vocab_size), columns, -1)
    if options.impl == "reference":
        plain = weight_of(weight)
        loss = reference_linear_cross_entropy(
            hidden, plain, columns, ignore_index=-1, vocab_size=options.vocab_size, temperature=options.temperature
        ).to(compute_dtype(hidden, plain))
    else:
        loss = _apply(hidden, weight, columns, options)
    if labels.device.type != "cpu":
        loss = loss * torch.where(inside | ~kept, 1.0, float("nan")).to(loss.dtype)
    return reduce_tokens(loss, kept, reduction)


def _checked_options(
    hidden: Tensor,
    weight: Tensor | FrozenHead,
    labels: Tensor | None,
    vocab_size: int | None,
    temperature: float,
    impl: str,
    workspace_bytes: int | None,
    shard: VocabularyShard | None,
) -> HeadOptions:
    weight = weight_of(weight)
    check_tensor("hidden", hidden, ("N", "D"))
    check_tensor("weight", weight, ("V", "D"))
    check_width("hidden", hidden.shape[1], "weight", weight.shape[1])
    if labels is not None:
        check_labels(labels, hidden.shape[0])
    check_same_device(hidden=hidden, weight=weight, labels=labels)
    return make_options(vocab_size, (weight,), temperature, impl, workspace_bytes, (hidden,), shard)
