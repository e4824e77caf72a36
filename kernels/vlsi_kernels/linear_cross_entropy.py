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
from torch import Tensor
from torch.autograd.function import once_differentiable

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
from .head_statistics import stream_head_statistics

REDUCTIONS = ("mean", "sum", "none")


# ---- reference ----


def reference_linear_logsumexp(
    hidden: Tensor, weight: Tensor, *, vocab_size: int | None = None, temperature: float = 1.0
) -> Tensor:
    """Dense float64 oracle of `linear_logsumexp`: [N] float64, differentiable by autograd."""
    return (hidden.double() @ weight[:vocab_size].double().T / temperature).logsumexp(-1)


def reference_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, vocab_size: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Dense float64 oracle of the per-token loss: [N] float64, 0 at ignored tokens, differentiable by autograd."""
    log_q = (hidden.double() @ weight[:vocab_size].double().T / temperature).log_softmax(-1)
    kept = labels != ignore_index
    picked = log_q.gather(1, torch.where(kept, labels, 0).long()[:, None])[:, 0]
    return torch.where(kept, -picked, 0.0)


# ---- streaming implementation ----


def _weight_gradient(
    grad: Tensor,  # [N] upstream gradient of the per-token result, 0 at ignored tokens
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    label_columns: Tensor | None,  # [N] int64 within 0..vocab_size - 1
    logsumexp: Tensor,  # [N]
    options: HeadOptions,
) -> Tensor:
    """[V, D] in weight's dtype: softmax recomputed chunk by chunk, summed over tokens in float32, rounded once."""
    dtype = logsumexp.dtype
    row_chunk, vocab_chunk = plan_chunks(hidden.shape[0], options, dtype, hidden.device)
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    result[options.vocab_size :] = 0
    grad = (grad.to(dtype) / options.temperature)[:, None]
    if not (hidden.is_cuda and hidden.dtype == torch.bfloat16):
        hidden = hidden.to(dtype)
    with exact_matmul(hidden.device):
        scratch = torch.empty(row_chunk * vocab_chunk, dtype=dtype, device=hidden.device)
        for chunk in spans(options.vocab_size, vocab_chunk):
            columns = chunk.stop - chunk.start
            total = torch.zeros(columns, weight.shape[1], dtype=dtype, device=weight.device)
            for block in spans(hidden.shape[0], row_chunk):
                rows = block.stop - block.start
                tile = scratch[: rows * columns].view(rows, columns)
                z = logits_chunk(hidden[block], weight[chunk], 1.0 / options.temperature, tile)
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
    def forward(ctx, hidden: Tensor, weight: Tensor, label_columns: Tensor | None, options: HeadOptions) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        logsumexp, _, expectation = stream_head_statistics(
            hidden, weight, weight if need_hidden else None, options, with_mean=False
        )
        result, direction = logsumexp, expectation  # direction [N, D]: temperature * d result / d hidden
        if label_columns is not None:
            picked = weight[label_columns].to(logsumexp.dtype)  # [N, D]
            result = logsumexp - (hidden.to(logsumexp.dtype) * picked).sum(-1) / options.temperature
            direction = expectation.sub_(picked) if need_hidden else None
        saved = (hidden, weight, label_columns, logsumexp) if need_weight else (None,) * 4
        ctx.save_for_backward(direction, *saved)
        ctx.options, ctx.hidden_dtype = options, hidden.dtype
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        direction, hidden, weight, label_columns, logsumexp = ctx.saved_tensors
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_hidden = (direction * (grad / ctx.options.temperature)[:, None]).to(ctx.hidden_dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(grad, hidden, weight, label_columns, logsumexp, ctx.options)
        return grad_hidden, grad_weight, None, None


def _apply(hidden: Tensor, weight: Tensor, label_columns: Tensor | None, options: HeadOptions) -> Tensor:
    if not torch.is_grad_enabled():  # a Function cannot see this itself, and would compute what backward needs
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearLogsumexp.apply(hidden, weight, label_columns, options)


# ---- public functions ----


def linear_logsumexp(
    hidden: Tensor,
    weight: Tensor,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
    workspace_bytes: int | None = None,
) -> Tensor:
    """log sum_v exp(hidden . weight[v] / temperature) of every token, without the logits.

    Args:
        hidden: [N, D] float32, bfloat16, float16 or float64; N may be 0. Differentiable.
        weight: [V, D] head. Differentiable where it requires a gradient (which costs a second pass, in backward).
        vocab_size: rows of the head that take part (None: all). Rows beyond are never read; their gradient is 0.
        temperature: logits are divided by it.
        impl: "auto" and "torch": streaming; "reference": dense float64.
        workspace_bytes: scratch memory; None: the device's default.

    Returns: [N] float32, nats (float64 if an input is float64).

    Raises:
        ValueError: shapes that do not fit, several devices, vocab_size outside 1..V, temperature <= 0, unknown impl.
        TypeError: dtypes other than the four. NotImplementedError: impl="triton".
    """
    options = _checked_options(hidden, weight, None, vocab_size, temperature, impl, workspace_bytes)
    if options.impl == "reference":
        result = reference_linear_logsumexp(
            hidden, weight, vocab_size=options.vocab_size, temperature=options.temperature
        )
        return result.to(compute_dtype(hidden, weight))
    return _apply(hidden, weight, None, options)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    vocab_size: int | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
    workspace_bytes: int | None = None,
) -> Tensor:
    """Cross-entropy of softmax(hidden @ weight.T / temperature) against labels, without the logits.

    The autoregressive loss of the verbalization step and of fine-tuning (VLsI, section 3.2). The gradient's two parts,
    expected row and label's row, are subtracted in float32 and rounded to hidden's dtype once: separately rounded
    halves would cancel badly near convergence.

    Args:
        hidden: [N, D] float32, bfloat16, float16 or float64; N may be 0. Differentiable.
        weight: [V, D] head. Differentiable where it requires a gradient; a frozen one costs no pass in backward.
        labels: [N] int64 or int32, already shifted; each in 0..vocab_size - 1, or ignore_index.
        ignore_index: tokens with this label give loss 0 and no gradient, and do not count in the mean.
        reduction: "mean" over the tokens that count, "sum", or "none".
        vocab_size: rows of the head that take part (None: all). Rows beyond are never read; their gradient is 0.
        temperature: logits are divided by it; the loss is not scaled back.
        impl: "auto" and "torch": streaming; "reference": dense float64.
        workspace_bytes: scratch memory; None: the device's default.

    Returns: float32 (float64 if an input is float64), nats: a scalar, or [N] for "none". The mean over no tokens
        (N = 0, or all ignored) is 0.0 with zero gradients, where PyTorch's own gives NaN.

    Raises:
        ValueError: shapes that do not fit, several devices, vocab_size outside 1..V, temperature <= 0, unknown impl or
            reduction; on CPU a label outside its range (elsewhere its token's loss and gradient are NaN, since asking
            would wait for the device).
        TypeError: other dtypes. NotImplementedError: impl="triton".
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is unknown; choose one of {', '.join(map(repr, REDUCTIONS))}")
    options = _checked_options(hidden, weight, labels, vocab_size, temperature, impl, workspace_bytes)
    labels = labels.long()
    kept = labels != ignore_index
    inside = (labels >= 0) & (labels < options.vocab_size)
    if labels.device.type == "cpu" and not bool((inside | ~kept).all()):
        worst = labels[kept & ~inside][0].item()
        raise ValueError(
            f"label {worst} is outside 0..{options.vocab_size - 1}; cut the labels to the vocabulary, or mark such "
            f"tokens with ignore_index={ignore_index}"
        )
    columns = torch.where(kept & inside, labels, 0)
    if options.impl == "reference":
        loss = reference_linear_cross_entropy(
            hidden, weight, columns, ignore_index=-1, vocab_size=options.vocab_size, temperature=options.temperature
        ).to(compute_dtype(hidden, weight))
    else:
        loss = _apply(hidden, weight, columns, options)
    if labels.device.type != "cpu":
        loss = loss * torch.where(inside | ~kept, 1.0, float("nan")).to(loss.dtype)
    loss = loss.masked_fill(~kept, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / kept.sum().clamp(min=1)


def _checked_options(
    hidden: Tensor, weight: Tensor, labels: Tensor | None, vocab_size: int | None, temperature: float, impl: str,
    workspace_bytes: int | None,
) -> HeadOptions:
    check_tensor("hidden", hidden, ("N", "D"))
    check_tensor("weight", weight, ("V", "D"))
    check_width("hidden", hidden.shape[1], "weight", weight.shape[1])
    if labels is not None:
        if labels.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"labels has dtype {labels.dtype}; convert it with labels.long()")
        if labels.shape != hidden.shape[:1]:
            raise ValueError(
                f"labels must have shape [{hidden.shape[0]}], one per row of hidden, got {list(labels.shape)}; "
                "flatten both over batch and position"
            )
    check_same_device(hidden=hidden, weight=weight, labels=labels)
    return make_options(vocab_size, weight.shape[0], temperature, impl, workspace_bytes, hidden.device)
