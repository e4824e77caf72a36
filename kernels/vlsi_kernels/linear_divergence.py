"""Divergence of a student's language head from a teacher's, without the logits of either.

    a[n, v] = teacher_hidden[n] . teacher_weight[v] / T     p = softmax(a)      v < vocab_size
    b[n, v] = student_hidden[n] . student_weight[v] / T     q = softmax(b)

    beta = 0      loss = KL(p || q)                                  d loss / d b = q - p
    beta = 1      loss = KL(q || p)                                  d loss / d b = q (r - R)
    0 < beta < 1  loss = beta KL(p || m) + (1 - beta) KL(q || m)     d loss / d b = (1 - beta) q (r - R)
    with m = beta p + (1 - beta) q,   r = log(q / p) or log(q / m),   R = sum_v q r

Shapes: student_hidden [N, Ds], student_weight [V, Ds], teacher_hidden [N, Dl], teacher_weight [V', Dl]; N tokens,
V / V' rows of the heads, Ds / Dl widths; T temperature.

Both heads are read together, chunk by chunk, and two tiles made of a chunk's logits are multiplied with the student's
head W. The ends need one pass, with an online softmax: beta = 0 forms sum p W and sum q W; beta = 1 forms
A = sum q (r - c) W and E = sum q W with b - a in place of r. Between the ends m wants the log-sum-exps, so a pass
without products comes first. Since sum q (r - R) W = A - (R - c) E, the centre c of a row may be anything; it is kept
at the mean of r over the vocabulary read so far, and A follows when it moves. With c = 0 the two halves would cancel
wherever r is far from 0: b - a holds the difference of the log-sum-exps, and rows may oppose the teacher.

The loss is summed from logits, as sum p (a - b) and the like. Where layers are paired (layer_kl) sum p b is taken from
sum p W instead; near |logit| 50 that is off by up to 1e-4, since a float32 sum over a chunk loses its small terms.
A frozen student head costs no pass in backward, a trained one a further pass, in chunks too.
Here is the plain PyTorch; Triton's kernels are in divergence_triton.py.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._common import (
    MIN_VOCAB_CHUNK,
    accumulate,
    by_onednn,
    check_labels,
    check_no_grad,
    check_reduction,
    check_same_device,
    check_tensor,
    check_width,
    compute_dtype,
    exact_matmul,
    launch_on,
    logits_chunk,
    make_options,
    reduce_tokens,
    spans,
)
from .divergence_triton import LOWEST_LOG_RATIO, DivergenceOptions, HeadPair, RowNumbers, TritonTiles, new_state, plan
from .frozen_head import FrozenHead, frozen_of, weight_of

# ---- reference ----


def reference_linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    beta: float = 0.0,
    vocab_size: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Dense float64 oracle by the definition: per-token loss [N] float64, differentiable by autograd."""
    size = min(student_weight.shape[0], teacher_weight.shape[0]) if vocab_size is None else vocab_size
    log_p = (teacher_hidden.double() @ teacher_weight[:size].double().T / temperature).log_softmax(-1)
    log_q = (student_hidden.double() @ student_weight[:size].double().T / temperature).log_softmax(-1)
    if beta == 0:
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if beta == 1:
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    weight = torch.tensor([beta, 1 - beta], dtype=torch.float64, device=log_p.device).log()
    log_m = torch.logaddexp(log_p + weight[0], log_q + weight[1])
    return beta * (log_p.exp() * (log_p - log_m)).sum(-1) + (1 - beta) * (log_q.exp() * (log_q - log_m)).sum(-1)


# ---- plain PyTorch ----


class _TorchTiles:
    """As TritonTiles, in plain PyTorch. Tiles are float32 (float64 where an input is) and not rounded."""

    def __init__(self, heads: HeadPair, options: DivergenceOptions, with_product: bool):
        self.options, self.with_product, self.values, self.unit = options, with_product, heads.student_weight, 1.0
        self.row_chunk, self.vocab_chunk = plan(heads, options, with_product)
        dtype = compute_dtype(*heads)
        if by_onednn(heads.student_weight.device, dtype):  # which makes two tiles of its own beside these
            self.vocab_chunk = min(self.vocab_chunk, max(MIN_VOCAB_CHUNK, self.vocab_chunk * 2 // 3))
        # The plan rounds chunks up for Triton's tiles; these four stay within the workspace.
        fitting = options.head.workspace_bytes // (4 * dtype.itemsize * max(1, self.row_chunk))
        self.vocab_chunk = min(self.vocab_chunk, max(MIN_VOCAB_CHUNK, fitting // 64 * 64))
        size = 4 * self.row_chunk * self.vocab_chunk
        self.buffer = torch.empty(size, dtype=dtype, device=heads.student_weight.device)

    def logits(self, heads: HeadPair, chunk: slice) -> tuple[Tensor, Tensor]:
        """Over temperature already."""
        rows, columns = heads.student_hidden.shape[0], chunk.stop - chunk.start
        _, student, teacher, _ = self._tiles(rows, columns)
        scale = 1.0 / self.options.head.temperature
        dtype = self.buffer.dtype
        student = logits_chunk(heads.student_hidden, heads.student_weight[chunk], scale, student, dtype)
        return student, logits_chunk(heads.teacher_hidden, heads.teacher_weight[chunk], scale, teacher, dtype)

    def _tiles(self, rows: int, columns: int) -> Tensor:
        """[4, R, C]: the pair to multiply, whose second is the student's logits at first; the teacher's; one more."""
        return self.buffer[: 4 * rows * columns].view(4, rows, columns)

    def take(
        self, logits: tuple[Tensor, Tensor], numbers: RowNumbers, state: Tensor, totals: Tensor | None, mode: str
    ) -> Tensor | None:
        b, a = logits
        first, q, _, r = tiles = self._tiles(*b.shape)
        q_factor = p_factor = step = None
        if mode == "mixture":
            b.sub_(numbers.student_lse[:, None])
            a.sub_(numbers.teacher_lse[:, None])
            d = torch.sub(b, a, out=first).clamp_(min=LOWEST_LOG_RATIO)
            _log_mixture_ratio_torch(d, self.options.beta, out=r)
            torch.exp(b, out=q)
            state[7] += self.options.beta * torch.sub(r, d, out=d).mul_(a.exp_()).sum(1).double()
            state[7] += (1.0 - self.options.beta) * torch.mul(q, r, out=d).sum(1).double()
        else:
            torch.sub(b, a, out=r)
            q_factor = _online_softmax_torch(b, state[0:2], out=q)
            p_factor = _online_softmax_torch(a, state[2:4], out=first)
        if mode == "lse":
            return None
        if mode == "forward":
            state[7].mul_(p_factor).sub_(r.mul_(first).sum(1).double())
            state[4:6] = state[1:4:2]
        else:
            step = _centre_torch(r, q, state, q_factor, out=first)
            if mode == "reverse":
                state[7] = state[5]
        if totals is not None:
            _move_torch(totals, step, p_factor if mode == "forward" else q_factor, q_factor)
        return tiles[:2].flatten(0, 1) if self.with_product else None

    def gradient(self, logits: tuple[Tensor, Tensor], numbers: RowNumbers, scale: Tensor, dtype: torch.dtype) -> Tensor:
        log_q, log_p = logits[0].sub_(numbers.student_lse[:, None]), logits[1].sub_(numbers.teacher_lse[:, None])
        if self.options.kind == "forward":
            return log_q.exp_().sub_(log_p.exp_()).mul_(scale[:, None])
        r = torch.sub(log_q, log_p, out=log_p)
        if self.options.kind == "mixture":
            r = _log_mixture_ratio_torch(r.clamp_(min=LOWEST_LOG_RATIO), self.options.beta, out=r)
        return r.sub_(numbers.mean_ratio[:, None]).mul_(log_q.exp_()).mul_(scale[:, None])

    def add_product(self, total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
        accumulate(total, left, right, first)


def _online_softmax_torch(z: Tensor, state: Tensor, out: Tensor) -> Tensor:
    """Exponentials of a tile [R, C] into `out`, shift and sum [2, R] renewed; what earlier sums are multiplied by."""
    shift = torch.maximum(state[0], z.amax(1).double())
    factor = (state[0] - shift).exp()
    torch.sub(z, shift.to(z.dtype)[:, None], out=out).exp_()
    state[1].mul_(factor).add_(out.sum(1).double())
    state[0] = shift
    return factor


def _log_mixture_ratio_torch(d: Tensor, beta: float, out: Tensor) -> Tensor:
    """log(q / m) = -log(1 + beta (p / q - 1)) from d = log(q / p), which keeps its digits where p and q are close."""
    return torch.neg(d, out=out).expm1_().mul_(beta).log1p_().neg_()


def _centre_torch(r: Tensor, q: Tensor, state: Tensor, factor: Tensor | None, out: Tensor) -> Tensor:
    """q (r - c) into `out`, where c [R] is the mean of r over all that was read; by how much it moved."""
    mass, other, centre = state[4:7]
    if factor is not None:
        mass.mul_(factor)
        other.mul_(factor)
    q_sum = q.sum(1).double()
    new_mass = mass + q_sum
    mean = other + torch.mul(q, r, out=out).sum(1).double() - centre * q_sum
    mean /= torch.where(new_mass > 0, new_mass, 1.0)  # all q of "mixture" may underflow so far: 0 / 1 then
    moved = (centre + mean).to(r.dtype)
    step = (moved.double() - centre).to(r.dtype)
    torch.sub(r, moved[:, None], out=out).mul_(q)
    other.sub_(step.double() * mass).add_(out.sum(1).double())
    mass.copy_(new_mass)
    centre.copy_(moved)
    return step


def _move_torch(totals: Tensor, step: Tensor | None, first_factor: Tensor | None, q_factor: Tensor | None) -> None:
    """Sums of earlier products [2 R, Ds] as the new centre and shifts see them; arguments [R], None: not moved."""
    first, of_q = totals.chunk(2)
    if step is not None:
        first.addcmul_(of_q, step[:, None], value=-1.0)
    if q_factor is not None:
        first.mul_(first_factor.to(totals.dtype)[:, None])
        of_q.mul_(q_factor.to(totals.dtype)[:, None])


def _tiles_for(
    heads: HeadPair, options: DivergenceOptions, with_product: bool, frozen: FrozenHead | None = None
) -> TritonTiles | _TorchTiles:
    if options.head.impl == "triton":
        return TritonTiles(heads, options, with_product, frozen)
    return _TorchTiles(heads, options, with_product)


# ---- streaming implementation ----


def _forward(
    heads: HeadPair, direction: Tensor | None, options: DivergenceOptions, frozen: FrozenHead | None
) -> tuple[Tensor, RowNumbers]:
    """Loss [N] and what backward needs of the rows; writes T d loss / d student_hidden to direction [N, Ds]."""
    device = heads.student_weight.device
    loss = torch.empty(heads.student_hidden.shape[0], dtype=compute_dtype(*heads), device=device)
    numbers = RowNumbers(*(torch.empty_like(loss) for _ in RowNumbers._fields))
    tiles = _tiles_for(heads, options, direction is not None, frozen)
    with exact_matmul(device):
        for block in spans(loss.shape[0], tiles.row_chunk):
            here, kept = heads.rows(block), numbers.rows(block)
            state = new_state(block.stop - block.start, device)
            for mode in ("lse", "mixture") if options.kind == "mixture" else (options.kind,):
                totals = _read_heads(here, kept, state, tiles, mode)
                kept.student_lse.copy_(state[0] + state[1].log())
                kept.teacher_lse.copy_(state[2] + state[3].log())
            loss[block] = _loss(state, kept, options.kind)
            if direction is not None:
                direction[block] = _direction(state, totals, tiles.unit * options.share, options.kind)
    return loss, numbers


def _read_heads(
    heads: HeadPair, numbers: RowNumbers, state: Tensor, tiles: TritonTiles | _TorchTiles, mode: str
) -> Tensor | None:
    """One pass for R rows: everything into the state, and the sum of the products [2 R, Ds] where any are formed."""
    weight, rows = heads.student_weight, state.shape[1]
    totals = None
    for chunk in spans(tiles.options.head.vocab_size, tiles.vocab_chunk):
        pair = tiles.take(tiles.logits(heads, chunk), numbers, state, totals, mode)
        if pair is not None:
            first = totals is None
            if first:
                totals = torch.empty(2 * rows, weight.shape[1], dtype=numbers.student_lse.dtype, device=weight.device)
            tiles.add_product(totals, pair, tiles.values[chunk], first)
    return totals


def _loss(state: Tensor, numbers: RowNumbers, kind: str) -> Tensor:
    """[R] float64 from the state of rows that were read to the end; writes the mean ratio R to numbers."""
    q_shift, q_total, p_shift, p_total, mass, other, centre, loss = state
    gap = q_shift + q_total.log() - p_shift - p_total.log()  # of the log-sum-exps, which b - a contains
    if kind == "forward":
        numbers.mean_ratio.zero_()
        return loss / p_total + gap
    numbers.mean_ratio.copy_(centre + other / mass)
    if kind == "reverse":
        numbers.mean_ratio.copy_(centre + other / mass - numbers.student_lse.double() + numbers.teacher_lse.double())
        return centre + loss / q_total - gap
    return loss


def _direction(state: Tensor, totals: Tensor, unit: float | Tensor, kind: str) -> Tensor:
    """[R, Ds] from sums of products [2 R, Ds], in place: subtracted before anything is rounded to half precision."""
    rows = state.shape[1]
    first, of_q = totals[:rows], totals[rows:]  # sum p W or A, and E
    mass, other = state[4:6]
    positive, negative, ratio = (of_q, first, mass / other) if kind == "forward" else (first, of_q, other / mass)
    positive.addcmul_(negative, ratio.to(totals.dtype)[:, None], value=-1.0)
    return positive.mul_((unit / mass).to(totals.dtype)[:, None])


def _weight_gradient(grad: Tensor, heads: HeadPair, numbers: RowNumbers, options: DivergenceOptions) -> Tensor:
    """[V, Ds] in the head's dtype: logits are formed again, their gradient is multiplied with the hidden states.

    grad [N] upstream gradient of the per-token loss. Summed over tokens in float32, rounded once.
    """
    weight, hidden, dtype = heads.student_weight, heads.student_hidden, compute_dtype(*heads)
    result = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    if hidden.shape[0] == 0:
        return result
    tiles = _tiles_for(heads, options, with_product=False)
    # Triton's tiles have the hidden states' dtype; in float16 a mean's 1 / N could fall below its range
    unit = grad.abs().amax().to(dtype) / 2**8
    unit = torch.where(unit > 0, unit, 1.0)
    scale = grad.to(dtype) / unit
    total = torch.empty(tiles.vocab_chunk, weight.shape[1], dtype=dtype, device=weight.device)
    with exact_matmul(hidden.device):
        for chunk in spans(options.head.vocab_size, tiles.vocab_chunk):
            part = total[: chunk.stop - chunk.start]
            for block in spans(hidden.shape[0], tiles.row_chunk):
                here = heads.rows(block)
                tile = tiles.gradient(tiles.logits(here, chunk), numbers.rows(block), scale[block], hidden.dtype)
                tiles.add_product(part, tile.t(), here.student_hidden, first=block.start == 0)
            result[chunk] = part.mul_(unit * (options.share / options.head.temperature))
    return result


class _LinearDivergence(torch.autograd.Function):
    """Per-token loss [N]."""

    @staticmethod
    def forward(
        ctx,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        options: DivergenceOptions,
        frozen: FrozenHead | None,
    ) -> Tensor:
        heads = HeadPair(student_hidden, student_weight, teacher_hidden, teacher_weight)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        direction = None  # [N, Ds] T d loss / d student_hidden, kept in the dtype of the gradient that it becomes ..
        if need_hidden:  # .. but not in float16, below whose range it may be before it is multiplied by grad
            dtype = torch.float32 if student_hidden.dtype == torch.float16 else student_hidden.dtype
            direction = torch.empty(student_hidden.shape, dtype=dtype, device=student_hidden.device)
        loss, numbers = _forward(heads, direction, options, frozen)
        ctx.save_for_backward(direction, *((*heads, *numbers) if need_weight else ()))
        ctx.options, ctx.hidden_dtype = options, student_hidden.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        direction, *saved = ctx.saved_tensors
        grad_hidden = grad_weight = None
        if ctx.needs_input_grad[0]:
            # row by row in float32, with no float32 copy of the whole
            grad_hidden = torch.empty_like(direction, dtype=ctx.hidden_dtype)
            torch.mul(direction, (grad / ctx.options.head.temperature)[:, None], out=grad_hidden)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(grad, HeadPair(*saved[:4]), RowNumbers(*saved[4:]), ctx.options)
        return grad_hidden, grad_weight, None, None, None, None


@torch.compiler.disable
def _apply(heads: HeadPair, options: DivergenceOptions, frozen: FrozenHead | None) -> Tensor:
    if not torch.is_grad_enabled():  # a Function cannot see this itself, and would compute what backward needs
        heads = HeadPair(*(t.detach() for t in heads))
    with launch_on(heads.student_weight.device):
        return _LinearDivergence.apply(*heads, options, frozen)


# ---- public function ----


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor | FrozenHead,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    beta: float = 0.0,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    temperature: float = 1.0,
    vocab_size: int | None = None,
    impl: str = "auto",
    workspace_bytes: int | None = None,
) -> Tensor:
    """Divergence of the student's vocabulary distribution from a frozen teacher's, without the logits of either.

    The usual loss of logit distillation, for any two models that share a tokenizer (TRL's GKD trainer and Liger's
    fused linear JSD have the same `beta`). With p the teacher's distribution and q the student's:

        beta = 0: KL(p || q), forward    beta = 1: KL(q || p), reverse
        between: beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, generalized Jensen-Shannon

    The ends are not limits of the middle, which goes to 0 at both. As in Liger 0.8.5, the mean is over the tokens that
    count, and nothing is multiplied by T^2. What differs: beta defaults to 0 (there 0.5); no bias and no cross-entropy
    mixed in (its chunked loss has both); heads of different row counts are cut to the shorter (its chunked loss takes
    the student's missing logits as 0); logits are never rounded to half precision (its chunked loss does); a teacher
    that requires a gradient is refused (there ignored). TRL's reduction "batchmean" with labels is "mean" here.

    Args:
        student_hidden: [N, Ds] float32, bfloat16, float16 or float64; N may be 0. Differentiable.
        student_weight: [V, Ds] head. Differentiable where it requires a gradient (a further pass, in backward). One
            that is not trained may be a `FrozenHead`, which is converted for the fused kernels once.
        teacher_hidden: [N, Dl] of the same tokens. No gradient.
        teacher_weight: [V', Dl] head over the same vocabulary; V' may differ from V by padding rows. No gradient.
        beta: 0..1, see above. 0 and 1 need one pass over the heads, all else two.
        labels: [N] int64 or int32, or None. Tokens labelled ignore_index give loss 0 and no gradient whatever their
            hidden states hold, and do not count in the mean; other labels have no meaning here. Ignored tokens cost
            as much as others: where many are, gather the rest first.
        ignore_index: the label of tokens that take no part.
        reduction: "mean" over the tokens that count, "sum", or "none".
        temperature: both heads' logits are divided by it. The loss is not multiplied by its square; do that where
            gradients should keep their size.
        vocab_size: rows of both heads that take part; None: the shorter head's. Rows beyond are never read; their
            gradient is 0.
        impl: "triton": fused kernels on CUDA; "torch": streaming in plain PyTorch; "reference": dense float64; "auto":
            "triton" on CUDA where Triton is installed and no input is float64, else "torch".
        workspace_bytes: scratch memory; None: the device's default.

    Returns:
        float32 (float64 if an input is float64), nats: a scalar, or [N] for "none". The mean over no tokens is 0.0
        with zero gradients. Values are not clamped: rounding can give -1e-6 where the truth is 0.

    Raises:
        ValueError: shapes that do not fit, several devices, beta outside 0..1, vocab_size outside 1..min(V, V'),
            temperature <= 0, unknown impl or reduction, impl="triton" on another device, a teacher that requires a
            gradient in grad mode.
        TypeError: other dtypes; float64 for impl="triton".
        ImportError: impl="triton" where Triton is not installed.
    """
    frozen, student_weight = frozen_of(student_weight), weight_of(student_weight)
    heads = HeadPair(student_hidden, student_weight, teacher_hidden, teacher_weight)
    check_reduction(reduction)
    _check_tensors(heads, labels)
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta={beta!r} must be a number in 0..1: 0 forward KL, 1 reverse KL, between Jensen-Shannon")
    head = make_options(
        vocab_size,
        (student_weight, teacher_weight),
        temperature,
        impl,
        workspace_bytes,
        (student_hidden, teacher_hidden),
    )
    kept = None if labels is None else labels != ignore_index
    if kept is not None:  # an ignored token's hidden state may be anything, so nothing is computed from it
        heads = heads._replace(
            student_hidden=student_hidden.masked_fill(~kept[:, None], 0.0),
            teacher_hidden=teacher_hidden.masked_fill(~kept[:, None], 0.0),
        )
    if head.impl == "reference":
        loss = reference_linear_divergence(
            *heads, beta=beta, vocab_size=head.vocab_size, temperature=head.temperature
        ).to(compute_dtype(*heads))
    else:
        loss = _apply(heads, DivergenceOptions(head, float(beta)), frozen)
    return reduce_tokens(loss, kept, reduction)


def _check_tensors(heads: HeadPair, labels: Tensor | None) -> None:
    check_tensor("student_hidden", heads.student_hidden, ("N", "Ds"))
    check_tensor("student_weight", heads.student_weight, ("V", "Ds"))
    check_tensor("teacher_hidden", heads.teacher_hidden, ("N", "Dl"))
    check_tensor("teacher_weight", heads.teacher_weight, ("V'", "Dl"))
    check_width("student_hidden", heads.student_hidden.shape[1], "student_weight", heads.student_weight.shape[1])
    check_width("teacher_hidden", heads.teacher_hidden.shape[1], "teacher_weight", heads.teacher_weight.shape[1])
    tokens = heads.student_hidden.shape[0]
    if heads.teacher_hidden.shape[0] != tokens:
        raise ValueError(
            f"student_hidden has {tokens} tokens but teacher_hidden has {heads.teacher_hidden.shape[0]}; gather the "
            "same tokens from both"
        )
    if labels is not None:
        check_labels(labels, tokens)
    check_same_device(**heads._asdict(), labels=labels)
    check_no_grad("teacher_hidden", heads.teacher_hidden, "the teacher is frozen")
    check_no_grad("teacher_weight", heads.teacher_weight, "the teacher is frozen")
