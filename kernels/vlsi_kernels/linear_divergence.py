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
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._common import (
    MAX_TILE_COLUMNS,
    HeadOptions,
    accumulate,
    check_no_grad,
    check_same_device,
    check_tensor,
    check_width,
    compute_dtype,
    exact_matmul,
    launch_on,
    logits_chunk,
    make_options,
    plan_chunks,
    plan_tiles,
    product,
    spans,
)
from ._triton import Build, constant, jit, tl
from .head_statistics import BLOCK_WIDTH, TileValues, block_of, tile_dtype
from .linear_cross_entropy import REDUCTIONS

# log(q / p) is not let below this: q is then under 1e-34 and counts for nothing, but exp of more would overflow.
LOWEST_LOG_RATIO = -80.0
# Half-precision tiles are float16 (11 bits; bfloat16's 8 cost up to 2.4e-3 of gradient near convergence). A row's
# largest exponential is 2^8: normal down to 2^-22 of it, and times r - c there is room up to 255. Only a token that has
# much of the student's probability and is hundreds of nats from the rest passes that; it is held at the largest number.
LOG_TOP = constant(8 * math.log(2))
FLOAT16_MAX = constant(65504.0)


@dataclass(frozen=True)
class DivergenceOptions:
    """The non-tensor options of the operator, after checks."""

    head: HeadOptions
    beta: float  # in 0..1

    @property
    def kind(self) -> str:
        """Which formula holds."""
        return {0.0: "forward", 1.0: "reverse"}.get(self.beta, "mixture")

    @property
    def share(self) -> float:
        """What the gradient's formula is multiplied by."""
        return 1.0 - self.beta if self.kind == "mixture" else 1.0


class HeadPair(NamedTuple):
    """The tensors of the operator."""

    student_hidden: Tensor  # [N, Ds]
    student_weight: Tensor  # [V, Ds]
    teacher_hidden: Tensor  # [N, Dl]
    teacher_weight: Tensor  # [V', Dl]

    def rows(self, block: slice) -> "HeadPair":
        return self._replace(student_hidden=self.student_hidden[block], teacher_hidden=self.teacher_hidden[block])


class RowNumbers(NamedTuple):
    """What is kept of N tokens to form any tile of the gradient again."""

    student_lse: Tensor  # [N]
    teacher_lse: Tensor  # [N]
    mean_ratio: Tensor  # [N], R of the formulas; not used at beta = 0

    def rows(self, block: slice) -> "RowNumbers":
        return RowNumbers(*(t[block] for t in self))


# ---- reference ----


def reference_linear_divergence(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, *,
    beta: float = 0.0, vocab_size: int | None = None, temperature: float = 1.0,
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


# ---- Triton kernels ----


@jit
def _online_softmax(z, inside, state_ptr, rows):
    """Exponentials of a tile's row, its new shift and sum, and what sums of earlier exponentials are multiplied by."""
    old = tl.load(state_ptr).to(tl.float32)
    shift = tl.maximum(old, tl.max(tl.where(inside, z, float("-inf")), 0) - LOG_TOP)
    e = tl.where(inside, tl.exp(z - shift), 0.0)
    factor = tl.exp(old - shift)  # exactly 1 unless the row's largest logit has grown
    total = tl.load(state_ptr + rows) * factor + tl.sum(e, 0)
    return e, shift, total, factor


@jit
def _log_mixture_ratio(d, beta):
    """log(q / m) from d = log(q / p)."""
    return -tl.log((1.0 - beta) + beta * tl.exp(-d))


@jit
def _rounded(x, tile_ptr):
    """x in the tile's dtype, held within float16's range where that is what it becomes."""
    if tile_ptr.dtype.element_ty == tl.float16:
        x = tl.minimum(tl.maximum(x, -FLOAT16_MAX), FLOAT16_MAX)
    return x.to(tile_ptr.dtype.element_ty)


@jit
def divergence_tile_kernel(
    student_ptr,  # [R, C] f32 logits b before temperature
    teacher_ptr,  # [R, C] f32 logits a before temperature
    student_lse_ptr,  # [R] f32, read by "mixture"
    teacher_lse_ptr,  # [R] f32, read by "mixture"
    state_ptr,  # [8, R] f64, see new_state
    tile_ptr,  # [2, R, C] f16 or f32, written where WRITE: p or q (r - c), then q, as exponentials of shifted logits
    sum_ptr,  # [2, R, width] f32, what earlier tiles were multiplied into; follows shifts and centre
    rows, columns, width, student_stride, teacher_stride, tile_stride, sum_stride,
    to_logit,  # 1 / temperature
    beta,  # of "mixture"
    MODE: tl.constexpr,  # "lse", "forward", "reverse" or "mixture"
    WRITE: tl.constexpr,
    LOWEST: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Takes a tile of both heads into the rows' state, and makes what is multiplied with W; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    b = tl.load(student_ptr + row * student_stride + column, mask=inside, other=0.0) * to_logit
    a = tl.load(teacher_ptr + row * teacher_stride + column, mask=inside, other=0.0) * to_logit
    state_ptr += row
    q, q_shift, q_total, q_factor = _online_softmax(b, inside, state_ptr, rows)
    if MODE != "mixture":
        p, p_shift, p_total, p_factor = _online_softmax(a, inside, state_ptr + rows * 2, rows)
    if MODE != "lse":
        mass = tl.load(state_ptr + rows * 4) * q_factor  # of earlier tiles, from here on as the new shifts see them
        other = tl.load(state_ptr + rows * 5)
        loss = tl.load(state_ptr + rows * 7)
        step = 0.0
        first_factor = q_factor
        if MODE == "forward":
            first, first_factor = p, p_factor
            other *= p_factor
            loss = loss * p_factor + tl.sum(p * (a - b), 0)
        else:
            r = b - a
            if MODE == "mixture":
                q_lse = tl.load(student_lse_ptr + row)
                p_lse = tl.load(teacher_lse_ptr + row)
                d = tl.maximum((b - q_lse) - (a - p_lse), LOWEST)
                r = _log_mixture_ratio(d, beta)
                p = tl.where(inside, tl.exp(a - p_lse), 0.0)
                loss += tl.sum(beta * p * (r - d) + (1.0 - beta) * tl.exp(q_shift - q_lse) * q * r, 0)
            other *= q_factor
            old_centre = tl.load(state_ptr + rows * 6)
            new_mass = mass + tl.sum(q, 0)
            # all q of "mixture" may underflow so far: 0 / 1 then
            mean = (other + tl.sum(q * (r - old_centre.to(tl.float32)), 0)) / tl.where(new_mass > 0.0, new_mass, 1.0)
            centre = (old_centre + mean).to(tl.float32)
            step = (centre - old_centre).to(tl.float32)
            other -= step * mass
            first = q * (r - centre)
            if MODE == "reverse":
                loss = (loss - step * tl.load(state_ptr + rows)) * q_factor + tl.sum(first, 0)
        if WRITE:
            low_first = _rounded(first, tile_ptr)
            low_q = _rounded(q, tile_ptr)
            tl.store(tile_ptr + row * tile_stride + column, low_first, mask=inside)
            tl.store(tile_ptr + (rows + row) * tile_stride + column, low_q, mask=inside)
            first = low_first.to(tl.float32)
            q = low_q.to(tl.float32)
            if (first_factor != 1.0) | (q_factor != 1.0) | (step != 0.0):
                for start in range(0, width, BLOCK_WIDTH):
                    w = start + tl.arange(0, BLOCK_WIDTH)
                    first_sum = sum_ptr + row * sum_stride + w
                    q_sum = sum_ptr + (rows + row) * sum_stride + w
                    old_q = tl.load(q_sum, mask=w < width)
                    moved = (tl.load(first_sum, mask=w < width) - step * old_q) * first_factor
                    tl.store(first_sum, moved, mask=w < width)
                    tl.store(q_sum, old_q * q_factor, mask=w < width)
        mass += tl.sum(q, 0)
        other += tl.sum(first, 0)
        tl.store(state_ptr + rows * 4, mass)
        tl.store(state_ptr + rows * 5, other)
        tl.store(state_ptr + rows * 7, loss)
        if MODE != "forward":
            tl.store(state_ptr + rows * 6, centre.to(tl.float64))
    if MODE != "mixture":
        tl.store(state_ptr, q_shift.to(tl.float64))
        tl.store(state_ptr + rows, q_total)
        tl.store(state_ptr + rows * 2, p_shift.to(tl.float64))
        tl.store(state_ptr + rows * 3, p_total)


@jit
def divergence_gradient_kernel(
    student_ptr,  # [R, C] f32 logits before temperature
    teacher_ptr,  # [R, C] f32 logits before temperature
    student_lse_ptr,  # [R] f32
    teacher_lse_ptr,  # [R] f32
    mean_ratio_ptr,  # [R] f32, not read by "forward"
    scale_ptr,  # [R] f32: what the row is multiplied by
    out_ptr,  # [R, C] in the hidden states' dtype, written
    columns, student_stride, teacher_stride, out_stride,
    to_logit,  # 1 / temperature
    beta,  # of "mixture"
    MODE: tl.constexpr,  # "forward", "reverse" or "mixture"
    LOWEST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradient of the loss with respect to a tile of student logits; one program a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    log_q = tl.load(student_ptr + row * student_stride + column, mask=inside, other=0.0) * to_logit
    log_q -= tl.load(student_lse_ptr + row)
    log_p = tl.load(teacher_ptr + row * teacher_stride + column, mask=inside, other=0.0) * to_logit
    log_p -= tl.load(teacher_lse_ptr + row)
    gradient = tl.exp(log_q)
    if MODE == "forward":
        gradient -= tl.exp(log_p)
    else:
        r = log_q - log_p
        if MODE == "mixture":
            r = _log_mixture_ratio(tl.maximum(r, LOWEST), beta)
        gradient *= r - tl.load(mean_ratio_ptr + row)
    gradient = _rounded(gradient * tl.load(scale_ptr + row), out_ptr)
    tl.store(out_ptr + row * out_stride + column, gradient, mask=inside)


# A row of up to 4096 columns in 16 registers a thread, some four such arrays live: at most 128 registers in all, so two
# blocks share an SM and one computes while the other loads. Not yet measured on a GPU.
TILE_WARPS = 8
TILE_COLUMNS = MAX_TILE_COLUMNS // 2


def _builds() -> list[Build]:
    shared = {"student_ptr": "*fp32", "teacher_ptr": "*fp32", "student_lse_ptr": "*fp32", "teacher_lse_ptr": "*fp32",
              "columns": "i32", "student_stride": "i32", "teacher_stride": "i32", "to_logit": "fp32", "beta": "fp32"}
    aligned = ("student_ptr", "teacher_ptr", "student_stride", "teacher_stride")
    sizes = {"LOWEST": LOWEST_LOG_RATIO, "BLOCK": TILE_COLUMNS}
    builds = []
    for mode in ("lse", "forward", "reverse", "mixture"):
        for tile in ("none",) if mode == "lse" else ("fp16", "fp32", "none"):
            write = tile != "none"
            signature = shared | {
                "state_ptr": "*fp64", "tile_ptr": f"*{tile}" if write else "*fp32", "sum_ptr": "*fp32", "rows": "i32",
                "width": "i32", "tile_stride": "i32", "sum_stride": "i32",
            }  # fmt: skip
            constants = sizes | {"MODE": mode, "WRITE": write, "BLOCK_WIDTH": BLOCK_WIDTH}
            builds.append(
                Build(f"divergence_tile {mode} tile={tile}", divergence_tile_kernel, signature, constants, TILE_WARPS,
                      aligned=(*aligned, "state_ptr", "tile_ptr", "tile_stride", "sum_ptr", "sum_stride"))
            )  # fmt: skip
        for out in () if mode == "lse" else ("bf16", "fp16", "fp32"):
            signature = shared | {
                "mean_ratio_ptr": "*fp32", "scale_ptr": "*fp32", "out_ptr": f"*{out}", "out_stride": "i32",
            }  # fmt: skip
            builds.append(
                Build(f"divergence_gradient {mode} {out}", divergence_gradient_kernel, signature,
                      sizes | {"MODE": mode}, TILE_WARPS, aligned=(*aligned, "out_ptr", "out_stride"))
            )  # fmt: skip
    return builds


BUILDS = _builds()


# ---- launchers: two tiles of logits to what is multiplied, by Triton or by PyTorch ----


def new_state(rows: int, device: torch.device) -> Tensor:
    """[8, R] float64 of R rows before anything is read.

    0, 1: what is subtracted from the student's logits, and the sum of their exponentials; 2, 3: the teacher's;
    4: sum of q as it was multiplied; 5: sum of what was multiplied beside it, p or q (r - c); 6: c; 7: the loss's sum.
    """
    state = torch.zeros(8, rows, dtype=torch.float64, device=device)
    state[0:4:2] = -math.inf
    return state


def _plan(heads: HeadPair, options: DivergenceOptions, with_product: bool) -> tuple[int, int]:
    """Row and vocabulary chunk. The planners count one tile of logits; here are two, so they are half as wide."""
    rows, weight, head = heads.student_hidden.shape[0], heads.student_weight, options.head
    if head.impl == "triton":
        width = 2 * weight.shape[1] if with_product else 0
        row_chunk, columns = plan_tiles(rows, width, tile_dtype(weight), head)
    else:
        row_chunk, columns = plan_chunks(rows, head, compute_dtype(*heads), weight.device)
    return row_chunk, min(math.ceil(columns / 256) * 128, head.vocab_size)


class _TritonTiles:
    """Fused kernels; the library's matrix products stand around them. Holds the buffers of one call."""

    def __init__(self, heads: HeadPair, options: DivergenceOptions, with_product: bool):
        self.options = options
        self.row_chunk, self.vocab_chunk = _plan(heads, options, with_product)
        self.block = {"LOWEST": LOWEST_LOG_RATIO, "BLOCK": block_of(self.vocab_chunk), "num_warps": TILE_WARPS}
        weight, size = heads.student_weight, (2, self.row_chunk, self.vocab_chunk)
        self.buffers = torch.empty(size, dtype=torch.float32, device=weight.device)
        self.pair, self.unit = None, 1.0  # what is multiplied; what one unit of the products is worth
        if with_product:
            self.values = TileValues(weight, options.head.vocab_size, self.vocab_chunk)
            self.unit = 1.0 if self.values.scale is None else 1.0 / self.values.scale
            self.pair = torch.empty(size, dtype=tile_dtype(weight), device=weight.device).flatten(0, 1)

    def logits(self, heads: HeadPair, chunk: slice) -> tuple[Tensor, Tensor]:
        """Student's and teacher's, [R, C] f32 before temperature, in buffers that the next call reuses."""
        rows, columns = heads.student_hidden.shape[0], chunk.stop - chunk.start
        student, teacher = (b[:rows, :columns] for b in self.buffers)
        product(heads.student_hidden, heads.student_weight[chunk].t(), student)
        product(heads.teacher_hidden, heads.teacher_weight[chunk].t(), teacher)
        return student, teacher

    def take(
        self, logits: tuple[Tensor, Tensor], numbers: RowNumbers, state: Tensor, totals: Tensor | None, mode: str
    ) -> Tensor | None:
        """Takes two tiles into the state, moves totals [2 R, Ds] along; both tiles to multiply [2 R, C], or None."""
        student, teacher = logits
        rows, columns = student.shape
        pair = None if self.pair is None or mode == "lse" else self.pair[: 2 * rows, :columns]
        width, sum_stride = (0, 0) if totals is None else (totals.shape[1], totals.stride(0))
        divergence_tile_kernel[(rows,)](
            student, teacher, numbers.student_lse, numbers.teacher_lse, state, student if pair is None else pair,
            student if totals is None else totals, rows, columns, width, student.stride(0), teacher.stride(0),
            0 if pair is None else pair.stride(0), sum_stride, 1.0 / self.options.head.temperature, self.options.beta,
            MODE=mode, WRITE=pair is not None, BLOCK_WIDTH=BLOCK_WIDTH, **self.block,
        )  # fmt: skip
        return pair

    def gradient(
        self, logits: tuple[Tensor, Tensor], numbers: RowNumbers, scale: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """[R, C] in `dtype`, the hidden states': scale [R] times the loss's gradient by the student's logits."""
        student, teacher = logits
        rows, columns = student.shape
        if self.pair is None:
            self.pair = torch.empty(self.row_chunk, self.vocab_chunk, dtype=dtype, device=student.device)
        out = self.pair[:rows, :columns]
        divergence_gradient_kernel[(rows,)](
            student, teacher, *numbers, scale, out, columns, student.stride(0), teacher.stride(0), out.stride(0),
            1.0 / self.options.head.temperature, self.options.beta, MODE=self.options.kind, **self.block,
        )  # fmt: skip
        return out

    def add_product(self, total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
        """total = left @ right (+ total)."""
        product(left, right, total, accumulate=not first)


class _TorchTiles:
    """The same in plain PyTorch. Tiles are float32 (float64 where an input is) and not rounded."""

    def __init__(self, heads: HeadPair, options: DivergenceOptions, with_product: bool):
        self.options, self.with_product, self.values, self.unit = options, with_product, heads.student_weight, 1.0
        self.row_chunk, self.vocab_chunk = _plan(heads, options, with_product)
        size = 4 * self.row_chunk * self.vocab_chunk
        self.buffer = torch.empty(size, dtype=compute_dtype(*heads), device=heads.student_weight.device)

    def logits(self, heads: HeadPair, chunk: slice) -> tuple[Tensor, Tensor]:
        """Over temperature already."""
        rows, columns = heads.student_hidden.shape[0], chunk.stop - chunk.start
        _, student, teacher, _ = self._tiles(rows, columns)
        scale = 1.0 / self.options.head.temperature
        student = logits_chunk(heads.student_hidden, heads.student_weight[chunk], scale, student)
        return student, logits_chunk(heads.teacher_hidden, heads.teacher_weight[chunk], scale, teacher)

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

    def gradient(
        self, logits: tuple[Tensor, Tensor], numbers: RowNumbers, scale: Tensor, dtype: torch.dtype
    ) -> Tensor:
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


def _tiles_for(heads: HeadPair, options: DivergenceOptions, with_product: bool) -> _TritonTiles | _TorchTiles:
    return (_TritonTiles if options.head.impl == "triton" else _TorchTiles)(heads, options, with_product)


# ---- streaming implementation ----


def _forward(heads: HeadPair, direction: Tensor | None, options: DivergenceOptions) -> tuple[Tensor, RowNumbers]:
    """Loss [N] and what backward needs of the rows; writes T d loss / d student_hidden to direction [N, Ds]."""
    device = heads.student_weight.device
    loss = torch.empty(heads.student_hidden.shape[0], dtype=compute_dtype(*heads), device=device)
    numbers = RowNumbers(*(torch.empty_like(loss) for _ in RowNumbers._fields))
    tiles = _tiles_for(heads, options, direction is not None)
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
    heads: HeadPair, numbers: RowNumbers, state: Tensor, tiles: _TritonTiles | _TorchTiles, mode: str
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
        ctx, student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor,
        options: DivergenceOptions,
    ) -> Tensor:
        heads = HeadPair(student_hidden, student_weight, teacher_hidden, teacher_weight)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        direction = None  # [N, Ds] T d loss / d student_hidden, kept in the dtype of the gradient that it becomes ..
        if need_hidden:  # .. but not in float16, below whose range it may be before it is multiplied by grad
            dtype = torch.float32 if student_hidden.dtype == torch.float16 else student_hidden.dtype
            direction = torch.empty(student_hidden.shape, dtype=dtype, device=student_hidden.device)
        loss, numbers = _forward(heads, direction, options)
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
        return grad_hidden, grad_weight, None, None, None


@torch.compiler.disable
def _apply(heads: HeadPair, options: DivergenceOptions) -> Tensor:
    if not torch.is_grad_enabled():  # a Function cannot see this itself, and would compute what backward needs
        heads = HeadPair(*(t.detach() for t in heads))
    with launch_on(heads.student_weight.device):
        return _LinearDivergence.apply(*heads, options)


# ---- public function ----


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
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
        student_weight: [V, Ds] head. Differentiable where it requires a gradient (a further pass, in backward).
        teacher_hidden: [N, Dl] of the same tokens. No gradient.
        teacher_weight: [V', Dl] head over the same vocabulary; V' may differ from V by padding rows. No gradient.
        beta: 0..1, see above. 0 and 1 need one pass over the heads, all else two.
        labels: [N] int64 or int32, or None. Tokens labelled ignore_index give loss 0 and no gradient whatever their
            hidden states hold, and do not count in the mean; other labels have no meaning here. Ignored tokens cost
            as much as others: where many are, gather the rest first.
        reduction: "mean" over the tokens that count, "sum", or "none".
        temperature: both heads' logits are divided by it. The loss is not multiplied by its square; do that where
            gradients should keep their size.
        vocab_size: rows of both heads that take part; None: the shorter head's. Rows beyond are never read; their
            gradient is 0.
        impl: "triton": fused kernels on CUDA; "torch": streaming in plain PyTorch; "reference": dense float64; "auto":
            "triton" on CUDA where Triton is installed and no input is float64, else "torch".
        workspace_bytes: scratch memory; None: the device's default.

    Returns: float32 (float64 if an input is float64), nats: a scalar, or [N] for "none". The mean over no tokens is 0.0
        with zero gradients. Values are not clamped: rounding can give -1e-6 where the truth is 0.

    Raises:
        ValueError: shapes that do not fit, several devices, beta outside 0..1, vocab_size outside 1..min(V, V'),
            temperature <= 0, unknown impl or reduction, impl="triton" on another device, a teacher that requires a
            gradient in grad mode.
        TypeError: other dtypes; float64 for impl="triton". ImportError: impl="triton" where Triton is not installed.
    """
    heads = HeadPair(student_hidden, student_weight, teacher_hidden, teacher_weight)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is unknown; choose one of {', '.join(map(repr, REDUCTIONS))}")
    _check_tensors(heads, labels)
    if isinstance(beta, bool) or not isinstance(beta, (int, float)) or not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta={beta!r} must be a number in 0..1: 0 forward KL, 1 reverse KL, between Jensen-Shannon")
    head = make_options(
        vocab_size, (student_weight, teacher_weight), temperature, impl, workspace_bytes,
        (student_hidden, teacher_hidden),
    )  # fmt: skip
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
        loss = _apply(heads, DivergenceOptions(head, float(beta)))
    if kept is not None:
        loss = loss.masked_fill(~kept, 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (max(1, loss.shape[0]) if kept is None else kept.sum().clamp(min=1))


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
        if labels.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"labels has dtype {labels.dtype}; convert it with labels.long()")
        if labels.shape != (tokens,):
            raise ValueError(
                f"labels must have shape [{tokens}], one per token, got {list(labels.shape)}; flatten both over "
                "batch and position"
            )
    check_same_device(**heads._asdict(), labels=labels)
    check_no_grad("teacher_hidden", heads.teacher_hidden, "the teacher is frozen")
    check_no_grad("teacher_weight", heads.teacher_weight, "the teacher is frozen")
