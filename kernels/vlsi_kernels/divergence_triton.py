"""Triton's part of linear_divergence: two tiles of logits, the student's and the teacher's, to the tiles of a gradient.

Formulas, shapes and dimension letters are those of linear_divergence.py, which has the same in plain PyTorch. R rows
are read at a time, C columns of the vocabulary; between the kernels stand the library's matrix products.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._common import MAX_TILE_COLUMNS, HeadOptions, compute_dtype, plan_chunks, plan_tiles, product
from ._triton import constant, jit, tl
from .frozen_head import FrozenHead, TileValues, tile_dtype
from .head_statistics import BLOCK_WIDTH, block_of

# log(q / p) is not let below this: q is then under 1e-34 and counts for nothing, but exp of more would overflow.
LOWEST_LOG_RATIO = -80.0
# Half-precision tiles are float16 (11 bits; bfloat16's 8 cost up to 2.4e-3 of gradient near convergence). A row's
# largest exponential is 2^8: normal down to 2^-22 of it, and times r - c there is room up to 255. Only a token that has
# much of the student's probability and is hundreds of nats from the rest passes that; it is held at the largest number.
LOG_TOP = constant(8 * math.log(2))
FLOAT16_MAX = constant(65504.0)


# ---- what both implementations share ----


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


def new_state(rows: int, device: torch.device) -> Tensor:
    """[8, R] float64 of R rows before anything is read.

    0, 1: what is subtracted from the student's logits, and the sum of their exponentials; 2, 3: the teacher's;
    4: sum of q as it was multiplied; 5: sum of what was multiplied beside it, p or q (r - c); 6: c; 7: the loss's sum.
    """
    state = torch.zeros(8, rows, dtype=torch.float64, device=device)
    state[0:4:2] = -math.inf
    return state


def plan(heads: HeadPair, options: DivergenceOptions, with_product: bool) -> tuple[int, int]:
    """Row and vocabulary chunk. The planners count one tile of logits; here are two, so they are half as wide."""
    rows, weight, head = heads.student_hidden.shape[0], heads.student_weight, options.head
    width = 2 * weight.shape[1] if with_product else 0
    if head.impl == "triton":
        row_chunk, columns = plan_tiles(rows, width, tile_dtype(weight), head)
    else:
        row_chunk, columns = plan_chunks(rows, head, compute_dtype(*heads), weight.device, width)
    return row_chunk, min(math.ceil(columns / 256) * 128, head.vocab_size)


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
# blocks share an SM and one computes while the other loads. The assembler is told so: left alone, it spills to come
# down to 80, for three blocks. Not yet measured on a GPU.
TILE_WARPS = 8
TILE_REGISTERS = 128
TILE_COLUMNS = MAX_TILE_COLUMNS // 2


# ---- launcher ----


class TritonTiles:
    """Fused kernels; the library's matrix products stand around them. Holds the buffers of one call."""

    def __init__(
        self, heads: HeadPair, options: DivergenceOptions, with_product: bool, frozen: FrozenHead | None = None
    ):
        self.options = options
        self.row_chunk, self.vocab_chunk = plan(heads, options, with_product)
        self.block = {"LOWEST": LOWEST_LOG_RATIO, "BLOCK": block_of(self.vocab_chunk)}
        self.block |= {"num_warps": TILE_WARPS, "maxnreg": TILE_REGISTERS}
        weight, size = heads.student_weight, (2, self.row_chunk, self.vocab_chunk)
        self.buffers = torch.empty(size, dtype=torch.float32, device=weight.device)
        self.pair, self.unit = None, 1.0  # what is multiplied; what one unit of the products is worth
        if with_product:
            self.values = TileValues(frozen or weight, options.head.vocab_size, self.vocab_chunk)
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
            student,
            teacher,
            numbers.student_lse,
            numbers.teacher_lse,
            state,
            student if pair is None else pair,
            student if totals is None else totals,
            rows,
            columns,
            width,
            student.stride(0),
            teacher.stride(0),
            0 if pair is None else pair.stride(0),
            sum_stride,
            1.0 / self.options.head.temperature,
            self.options.beta,
            MODE=mode,
            WRITE=pair is not None,
            BLOCK_WIDTH=BLOCK_WIDTH,
            **self.block,
        )
        return pair

    def gradient(self, logits: tuple[Tensor, Tensor], numbers: RowNumbers, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """[R, C] in `dtype`, the hidden states': scale [R] times the loss's gradient by the student's logits."""
        student, teacher = logits
        rows, columns = student.shape
        if self.pair is None:
            self.pair = torch.empty(self.row_chunk, self.vocab_chunk, dtype=dtype, device=student.device)
        out = self.pair[:rows, :columns]
        divergence_gradient_kernel[(rows,)](
            student,
            teacher,
            *numbers,
            scale,
            out,
            columns,
            student.stride(0),
            teacher.stride(0),
            out.stride(0),
            1.0 / self.options.head.temperature,
            self.options.beta,
            MODE=self.options.kind,
            **self.block,
        )
        return out

    def add_product(self, total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
        """total = left @ right (+ total)."""
        product(left, right, total, accumulate=not first)
