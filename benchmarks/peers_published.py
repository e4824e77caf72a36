"""Published ways to one pair's KL from hidden states, written anew from what their authors say of them.

* Nitrobrew (Tilde Research, blog.tilderesearch.com/blog/nitrobrew, April 2026): hidden states travel instead of logits.
  One pass over the vocabulary in chunks of 2048 rows with running sums for the value; backward forms both heads' logits
  once more. Logits here are float32 sums, and the head gets no gradient, since it is frozen.
* The KL cache trick (jonathanc.net/blog/kl-cache-trick, May 2026): with a fixed student head the teacher enters only by
  `softmax(teacher) @ student head`, kept beside the constant negative entropy. Logits are materialized, as there.

Both are `peers.PairLoss`. At temperature 1.
"""

from __future__ import annotations

import torch
from peers import PairLoss
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2048
"""Vocabulary rows at a time: Nitrobrew's default."""


def float32_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """[N, D] x [V, D] -> [N, V], never rounded below float32."""
    if hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)
    return hidden.float() @ weight.float().T


def _back(gradient: Tensor, weight: Tensor) -> Tensor:
    """[N, V] x [V, D] -> [N, D] float32; on a GPU in the head's dtype, summed in float32."""
    if weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(gradient.to(weight.dtype), weight, out_dtype=torch.float32)
    return gradient @ weight.float()


# ---- Nitrobrew ----


def _online(z: Tensor, shift: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exponentials of a chunk [N, C], new shift and sum [N], and what sums under the old shift are multiplied by."""
    raised = torch.maximum(shift, z.amax(1))
    factor = (shift - raised).exp()
    e = (z - raised[:, None]).exp()
    return e, raised, total * factor + e.sum(1), factor


def _value_chunk(b: Tensor, a: Tensor, state: tuple[Tensor, ...], reverse: bool) -> tuple[Tensor, ...]:
    """Student's and teacher's logits of a chunk [N, C]; state: shift and sum of each, and the weighed difference."""
    q, student_shift, student_sum, student_factor = _online(b, *state[:2])
    p, teacher_shift, teacher_sum, teacher_factor = _online(a, *state[2:4])
    weighed = state[4] * student_factor + (q * (b - a)).sum(1) if reverse else state[4] * teacher_factor
    weighed = weighed if reverse else weighed + (p * (a - b)).sum(1)
    return student_shift, student_sum, teacher_shift, teacher_sum, weighed


def _slope_chunk(b: Tensor, a: Tensor, lse: tuple[Tensor, Tensor], kl: Tensor, reverse: bool) -> Tensor:
    """Derivative of the KL with respect to the student's logits [N, C]."""
    log_q, log_p = b - lse[0][:, None], a - lse[1][:, None]
    return log_q.exp() * (log_q - log_p - kl[:, None]) if reverse else log_q.exp() - log_p.exp()


class _HiddenKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, heads: tuple[Tensor, Tensor], reverse: bool, chunks) -> Tensor:
        low = torch.full((len(student),), float("-inf"), device=student.device)
        zero = torch.zeros_like(low)
        state = (low, zero, low, zero, zero)
        for ours, theirs in zip(*(head.split(CHUNK) for head in heads), strict=True):
            state = chunks[0](float32_logits(student, ours), float32_logits(teacher, theirs), state, reverse)
        lse = state[0] + state[1].log(), state[2] + state[3].log()
        kl = state[4] / state[1] - lse[0] + lse[1] if reverse else state[4] / state[3] + lse[0] - lse[1]
        ctx.save_for_backward(student, teacher, *lse, kl)
        ctx.heads, ctx.reverse, ctx.slope = heads, reverse, chunks[1]
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        student, teacher, *lse, kl = ctx.saved_tensors
        total = torch.zeros_like(student, dtype=torch.float32)
        for ours, theirs in zip(*(head.split(CHUNK) for head in ctx.heads), strict=True):
            b, a = float32_logits(student, ours), float32_logits(teacher, theirs)
            total += _back(ctx.slope(b, a, lse, kl, ctx.reverse), ours)
        return (total * grad[:, None]).to(student.dtype), None, None, None, None


def hidden_state_kl(student_weight: Tensor, teacher_weight: Tensor, reverse: bool, compiled: bool) -> PairLoss:
    """Nitrobrew's KL(teacher || student), or the reverse. `compiled`: what lies between the products, as theirs is."""
    chunks = _value_chunk, _slope_chunk
    if compiled:
        chunks = tuple(torch.compile(chunk) for chunk in chunks)

    def run(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        leaf, kept = student.detach().requires_grad_(), labels != -100
        loss = (_HiddenKL.apply(leaf, teacher, (student_weight, teacher_weight), reverse, chunks) * kept).sum()
        loss = loss / kept.sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        return loss.detach(), gradient

    return run


# ---- the KL cache trick ----


def cached_teacher(teacher: Tensor, student_weight: Tensor, teacher_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Negative entropy [N] and softmax(teacher) @ student head [N, Ds], float32."""
    log_p = float32_logits(teacher, teacher_weight).log_softmax(-1)
    p = log_p.exp()
    return (p * log_p).sum(-1), _back(p, student_weight)


def kl_cache(student_weight: Tensor, teacher_weight: Tensor, cached: tuple[Tensor, Tensor] | None = None) -> PairLoss:
    """KL(teacher || student). `cached`: from an earlier `cached_teacher`; None: made within each step."""

    def run(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        neg_entropy, expectation = cached or cached_teacher(teacher, student_weight, teacher_weight)
        kept = (labels != -100).float() / (labels != -100).sum()
        logits = float32_logits(student, student_weight)
        loss = neg_entropy + logits.logsumexp(-1) - (student.float() * expectation).sum(-1)
        gradient = _back(logits.softmax(-1), student_weight).sub_(expectation).mul_(kept[:, None])
        return (loss * kept).sum(), gradient.to(student.dtype)

    return run
