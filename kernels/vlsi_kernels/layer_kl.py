"""KL(teacher || student) of every pair of layers, each layer's vocabulary read once.

    teacher   a[l, n] = teacher head . teacher_hidden[l, n] / T,   p = softmax(a)
    student   b[s, n] = student head . student_hidden[s, n] / T,   q = softmax(b)
    neg_entropy[l, n] = sum_v p log p                  g[l, n] = sum_v p[v] student_weight[v]       (teacher pass)
    lse[s, n]         = log sum_v exp b                e[s, n] = sum_v q[v] student_weight[v]       (student pass)
    KL[s, l, n]       = neg_entropy[l, n] - student_hidden[s, n] . g[l, n] / T + lse[s, n]
    d KL[s, l, n] / d student_hidden[s, n] = (e[s, n] - g[l, n]) / T

Shapes: student_hidden [S, N, Ds], student_weight [V', Ds], teacher hidden [L, N, Dl], teacher weight [V, Dl];
N tokens, V / V' rows of the heads, S / L student / teacher layers, Ds / Dl widths; T temperature.
The heads are frozen, so a teacher enters only through neg_entropy and g: pairs cost nothing beyond one small product,
and the gradient of any of them needs no vocabulary at all. Layers are stacked on the row axis of one pass.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._common import (
    HeadOptions,
    VocabularyShard,
    check_no_grad,
    check_same_device,
    check_tensor,
    check_width,
    compute_dtype,
    exact_matmul,
    launch_on,
    make_options,
    spans,
)
from ._triton import jit, tl
from .frozen_head import FrozenHead, frozen_of, weight_of
from .head_statistics import reference_head_statistics, stream_head_statistics


class TeacherTargets(NamedTuple):
    """All that the students' KLs need to know of L frozen teacher layers; float32 (float64 for float64 inputs)."""

    neg_entropy: Tensor  # [L, N], nats
    expectation: Tensor  # [L, N, Ds], in the unit of the student head's rows
    vocab_size: int  # rows of the heads that took part (of this rank's, where the heads are sharded)
    temperature: float


# ---- reference ----


def reference_layer_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Dense float64 oracle by the definition, sum_v p (log p - log q): [S, L, N], differentiable in the student."""
    size = min(student_weight.shape[0], teacher_weight.shape[0]) if vocab_size is None else vocab_size
    log_p = (teacher_hidden.double() @ teacher_weight[:size].double().T / temperature).log_softmax(-1)  # [L, N, V]
    log_q = (student_hidden.double() @ student_weight[:size].double().T / temperature).log_softmax(-1)  # [S, N, V]
    rows = [torch.stack([(p.exp() * (p - q)).sum(-1) for p in log_p]) for q in log_q]
    return torch.stack(rows)


def _reference_from_targets(student_hidden: Tensor, student_weight: Tensor, targets: TeacherTargets) -> Tensor:
    """[S, L, N] float64 from given targets, with the student side dense and differentiable."""
    hidden = student_hidden.double()
    logits = hidden @ student_weight[: targets.vocab_size].double().T / targets.temperature
    cross = torch.einsum("snd,lnd->sln", hidden, targets.expectation.double()) / targets.temperature
    return targets.neg_entropy.double()[None] - cross + logits.logsumexp(-1)[:, None]


# ---- Triton kernels ----


@jit
def pair_kl_kernel(
    hidden_ptr,  # [S, N, D] student
    expectation_ptr,  # [L, N, D] f32 teacher's g
    neg_entropy_ptr,  # [L, N] f32
    logsumexp_ptr,  # [S, N] f32
    kl_ptr,  # [S, L, N] f64, written
    hidden_stride_s, hidden_stride_n, students, tokens, layers, width,
    inverse_temperature,
    BLOCK_L: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """KL of one token and student layer against BLOCK_L teacher layers; grid [N S, L / BLOCK_L].

    All student layers of a token run side by side, so that they find its g in the L2 cache: g is read from memory once.
    The KL is a small difference of numbers near 20: products in float32 (no tensor cores, hence no TF32), sums of
    BLOCK numbers in float32, sums of those in float64.
    """
    n = (tl.program_id(0) // students).to(tl.int64)
    s = (tl.program_id(0) % students).to(tl.int64)
    layer = (tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
    present = layer < layers
    cross = tl.zeros((BLOCK_L,), tl.float64)
    for start in range(0, width, BLOCK):
        d = start + tl.arange(0, BLOCK)
        h = tl.load(hidden_ptr + s * hidden_stride_s + n * hidden_stride_n + d, mask=d < width, other=0.0)
        g_ptr = expectation_ptr + (layer[:, None] * tokens + n) * width + d[None, :]
        g = tl.load(g_ptr, mask=present[:, None] & (d < width)[None, :], other=0.0)
        cross += tl.sum(g * h.to(tl.float32)[None, :], 1).to(tl.float64)
    neg_entropy = tl.load(neg_entropy_ptr + layer * tokens + n, mask=present, other=0.0).to(tl.float64)
    logsumexp = tl.load(logsumexp_ptr + s * tokens + n).to(tl.float64)
    kl = neg_entropy - cross * inverse_temperature + logsumexp
    tl.store(kl_ptr + (s * layers + layer) * tokens + n, kl, mask=present)


@jit
def pair_gradient_kernel(
    student_ptr,  # [S, N, D] f32 e
    teacher_ptr,  # [L, N, D] f32 g
    share_ptr,  # [N] f32: token's share of the mean, over temperature
    grad_ptr,  # [S, L] f32 upstream
    out_ptr,  # [S, N, D], written
    tokens, layers, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """sum_l grad[s, l] (e[s, n] - g[l, n]) share[n], subtracted in float32 and rounded once; grid [N, S].

    Only the matched pairs have an upstream gradient, and only those layers' g are read.
    """
    n = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1).to(tl.int64)
    share = tl.load(share_ptr + n)
    for start in range(0, width, BLOCK):
        d = start + tl.arange(0, BLOCK)
        inside = d < width
        e = tl.load(student_ptr + (s * tokens + n) * width + d, mask=inside, other=0.0)
        total = tl.zeros((BLOCK,), tl.float32)
        for layer in range(0, layers):
            weight = tl.load(grad_ptr + s * layers + layer)
            if weight != 0.0:
                g_ptr = teacher_ptr + (n + layer * tokens) * width + d
                total += (e - tl.load(g_ptr, mask=inside, other=0.0)) * weight
        total = tl.where(share == 0.0, 0.0, total * share)  # no influence, even where the KL is not finite
        tl.store(out_ptr + (s * tokens + n) * width + d, total.to(out_ptr.dtype.element_ty), mask=inside)


PAIR_BLOCK = 128
PAIR_WARPS = 4  # 32 layers x 128 columns: 32 float32 numbers a thread
GRADIENT_BLOCK = 1024
GRADIENT_WARPS = 4
MAX_BLOCK_L = 32


def _pair_tokens_triton(
    student_hidden: Tensor, logsumexp: Tensor, targets: TeacherTargets, options: HeadOptions
) -> Tensor:
    """KL of every pair and token, [S, L, N] float64; shapes as `_pair_tokens`."""
    students, tokens, width = student_hidden.shape
    layers = targets.expectation.shape[0]
    result = torch.empty(students, layers, tokens, dtype=torch.float64, device=student_hidden.device)
    if result.numel() == 0:
        return result
    if student_hidden.stride(2) != 1:
        student_hidden = student_hidden.contiguous()
    block_l = min(MAX_BLOCK_L, 1 << (layers - 1).bit_length())
    pair_kl_kernel[(tokens * students, -(-layers // block_l))](
        student_hidden,
        targets.expectation.contiguous(),
        targets.neg_entropy.contiguous(),
        logsumexp.contiguous(),
        result,
        student_hidden.stride(0),
        student_hidden.stride(1),
        students,
        tokens,
        layers,
        width,
        1.0 / options.temperature,
        BLOCK_L=block_l,
        BLOCK=PAIR_BLOCK,
        num_warps=PAIR_WARPS,
    )
    return result


def _pair_gradient_triton(student: Tensor, teacher: Tensor, share: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of the KLs [S, N, D] in `dtype`; student [S, N, D], teacher [L, N, D], share [N], grad [S, L] f32."""
    students, tokens, width = student.shape
    out = torch.empty(students, tokens, width, dtype=dtype, device=student.device)
    if out.numel():
        with launch_on(student.device):
            pair_gradient_kernel[(tokens, students)](
                student,
                teacher.contiguous(),
                share.contiguous(),
                grad.contiguous(),
                out,
                tokens,
                teacher.shape[0],
                width,
                BLOCK=GRADIENT_BLOCK,
                num_warps=GRADIENT_WARPS,
            )
    return out


# ---- streaming implementation ----


def _pair_tokens(
    student_hidden: Tensor,  # [S, N, Ds]
    logsumexp: Tensor,  # [S, N]
    targets: TeacherTargets,
    options: HeadOptions,
) -> Tensor:
    """KL of every pair and token, [S, L, N] float64.

    A KL is a small difference of numbers near 20: the contraction runs in float64 (immune to TF32 too), in token blocks
    sized by the workspace. It is some 2 S L N Ds operations, nothing beside the vocabulary passes.
    """
    if options.impl == "triton":
        return _pair_tokens_triton(student_hidden, logsumexp, targets, options)
    layers, tokens, width = targets.expectation.shape
    result = (targets.neg_entropy.double()[None] + logsumexp.double()[:, None]).contiguous()  # [S, L, N]
    step = max(1, options.workspace_bytes // (8 * max(1, width * (layers + student_hidden.shape[0]))))
    for block in spans(tokens, step):
        h = student_hidden[:, block].double().transpose(0, 1)  # [n, S, Ds]
        g = targets.expectation[:, block].double().permute(1, 2, 0)  # [n, Ds, L]
        result[:, :, block] -= torch.bmm(h, g).permute(1, 2, 0) / options.temperature
    return result


def _weighted_mean(kl: Tensor, share: Tensor) -> Tensor:
    """[S, L] from [S, L, N] and shares [N]; tokens of share 0 do not count even where their KL is not finite."""
    return (kl.masked_fill(share == 0, 0.0) * share).sum(-1)


class _LayerKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        student_hidden: Tensor,
        student_weight: Tensor,
        share: Tensor,
        targets: TeacherTargets,
        options: HeadOptions,
        frozen: FrozenHead | None,
    ) -> Tensor:
        layers, tokens, width = student_hidden.shape
        need_grad = ctx.needs_input_grad[0]
        if frozen is not None:
            student_weight = frozen.weight  # the same object, by which the pass knows key and values to be one
        logsumexp, _, expectation = stream_head_statistics(
            student_hidden.reshape(layers * tokens, width),
            student_weight,
            (frozen or student_weight) if need_grad else None,
            options,
            with_mean=False,
        )
        with exact_matmul(student_hidden.device):
            kl = _pair_tokens(student_hidden, logsumexp.view(layers, tokens), targets, options)
        if need_grad:
            ctx.save_for_backward(expectation.view(layers, tokens, width), targets.expectation, share)
            ctx.options, ctx.hidden_dtype = options, student_hidden.dtype
        return _weighted_mean(kl, share).to(logsumexp.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # grad [S, L]
        student, teacher, share = ctx.saved_tensors  # [S, N, Ds], [L, N, Ds], [N]
        if ctx.options.impl == "triton":
            share = (share / ctx.options.temperature).float()
            result = _pair_gradient_triton(student, teacher, share, grad, ctx.hidden_dtype)
            return result, None, None, None, None, None
        total = torch.zeros_like(student)
        difference = torch.empty_like(student)
        # Elementwise on purpose: e - g cancels as the student converges, and a product with g alone would have to
        # be carried out beyond float32 (or suffer TF32) to leave the difference right.
        for layer in range(teacher.shape[0]):
            torch.sub(student, teacher[layer], out=difference)
            total.addcmul_(difference, grad[:, layer, None, None].to(student.dtype))
        total.mul_((share / ctx.options.temperature).to(student.dtype)[:, None])
        total.masked_fill_((share == 0)[:, None], 0.0)
        return total.to(ctx.hidden_dtype), None, None, None, None, None


def _layer_kl_tokens(
    student_hidden: Tensor,
    student_weight: Tensor,
    targets: TeacherTargets,
    *,
    impl: str = "torch",
    workspace_bytes: int | None = None,
) -> Tensor:
    """[S, L, N] float64 per-token KLs by the streaming path, no gradient: what the mean is taken of. For tests."""
    options = make_options(
        targets.vocab_size, (student_weight,), targets.temperature, impl, workspace_bytes, (student_hidden,)
    )
    with torch.no_grad():
        flat = student_hidden.flatten(0, 1)
        logsumexp, _, _ = stream_head_statistics(flat, student_weight, None, options, with_mean=False)
        return _pair_tokens(student_hidden, logsumexp.view(student_hidden.shape[:2]), targets, options)


# ---- public functions ----


@torch.compiler.disable
@torch.no_grad()
def teacher_targets(
    hidden: Tensor,
    weight: Tensor,
    student_weight: Tensor | FrozenHead,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
    workspace_bytes: int | None = None,
    shard: VocabularyShard | None = None,
) -> TeacherTargets:
    """What L frozen, verbalized teacher layers contribute to every KL against a student. No gradient.

    One pass over both heads for all layers (VLsI, section 3.2: interaction step).

    Args:
        hidden: [L, N, Dl] verbalized hidden states of the teacher; float32, bfloat16, float16 or float64; N may be 0.
        weight: [V, Dl] the teacher's head.
        student_weight: [V', Ds] the student's head, over the same tokens; V' may differ from V by padding rows. As a
            `FrozenHead` it is converted for the fused kernels once, for this and all other passes.
        vocab_size: rows of both heads that take part; None: the shorter head's. Rows beyond are never read.
        temperature: the teacher's logits are divided by it; the student's must be divided by the same.
        impl: as for `head_statistics`.
        workspace_bytes: scratch memory; None: the device's default.
        shard: where both heads are this rank's rows of heads divided over ranks in the same way.

    Returns:
        TeacherTargets(neg_entropy [L, N], expectation [L, N, Ds], vocab_size, temperature); float32 (float64 if an
        input is float64), which holds L * N * (Ds + 1) numbers whatever the vocabulary.

    Raises:
        ValueError: shapes that do not fit, several devices, vocab_size outside 1..min(V, V'), temperature <= 0,
            unknown impl. TypeError: dtypes other than the four; float64 for impl="triton".
        ImportError: impl="triton" without Triton.
    """
    check_tensor("hidden", hidden, ("L", "N", "Dl"))
    student = weight_of(student_weight)
    check_tensor("weight", weight, ("V", "Dl"))
    check_tensor("student_weight", student, ("V'", "Ds"))
    check_width("hidden", hidden.shape[2], "weight", weight.shape[1])
    check_same_device(hidden=hidden, weight=weight, student_weight=student)
    heads = (weight, student)
    options = make_options(vocab_size, heads, temperature, impl, workspace_bytes, (hidden,), shard)
    flat = hidden.flatten(0, 1)
    if options.impl == "reference":
        lse, mean, expectation = reference_head_statistics(
            flat, weight, student, vocab_size=options.vocab_size, temperature=options.temperature
        )
    else:
        lse, mean, expectation = stream_head_statistics(flat, weight, student_weight, options)
    dtype = compute_dtype(hidden, weight, student)
    return TeacherTargets(
        (mean - lse).to(dtype).view(hidden.shape[:2]),
        expectation.to(dtype).view(*hidden.shape[:2], student.shape[1]),
        options.vocab_size,
        options.temperature,
    )


def layer_kl_matrix(
    student_hidden: Tensor,
    student_weight: Tensor | FrozenHead,
    targets: TeacherTargets,
    *,
    token_weight: Tensor | None = None,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    impl: str = "auto",
    workspace_bytes: int | None = None,
    shard: VocabularyShard | None = None,
) -> Tensor:
    """KL(teacher || student) of every student layer against every teacher layer, averaged over tokens.

    The matrix that layer matching draws from (VLsI, section 3.2, Algorithm 1); index it with the pairs chosen and
    backpropagate, only those carry gradient. Differentiable in student_hidden only.

    Args:
        student_hidden: [S, N, Ds] verbalized hidden states of the student; float32, bfloat16, float16 or float64.
        student_weight: [V', Ds] the student's frozen head, the one that the targets were built with; as for
            `teacher_targets`.
        targets: from `teacher_targets`, for the same N tokens.
        token_weight: [N] non-negative weights of the tokens, or None for equal ones. A token of weight 0 has no
            influence at all. No gradient.
        vocab_size: None, or the same as the targets'.
        temperature: the same as the targets'. The KL is not multiplied by temperature squared; do that in the loss if
            gradients should keep their size.
        impl: as for `head_statistics`; "reference" is dense float64 on the student's side.
        workspace_bytes: scratch memory; None: the device's default.
        shard: the same as the targets', where the heads are divided over ranks.

    Returns:
        [S, L] float32, nats (float64 if an input is float64). sum_n w KL / sum_n w; zeros with zero gradients for
        no tokens or weights that sum to 0. Values are not clamped: rounding can give -1e-6 where the truth is 0.

    Raises:
        ValueError: shapes that do not fit or disagree with the targets, several devices, a vocab_size or temperature
            that is not the targets', student_weight (or the targets) requiring a gradient in grad mode, unknown impl.
        TypeError: dtypes other than the four; float64 for impl="triton".
        ImportError: impl="triton" without Triton.
    """
    weight, frozen = weight_of(student_weight), frozen_of(student_weight)
    options = _checked_options(
        student_hidden, weight, targets, token_weight, vocab_size, temperature, impl, workspace_bytes, shard
    )
    share = _token_share(token_weight, student_hidden)
    if options.impl == "reference":
        dtype = compute_dtype(student_hidden, weight, targets.expectation)
        return _weighted_mean(_reference_from_targets(student_hidden, weight, targets), share).to(dtype)
    return _apply(student_hidden, weight.detach(), share, targets, options, frozen)


@torch.compiler.disable
def _apply(
    student_hidden: Tensor,
    student_weight: Tensor,
    share: Tensor,
    targets: TeacherTargets,
    options: HeadOptions,
    frozen: FrozenHead | None,
) -> Tensor:
    if not torch.is_grad_enabled():  # a Function cannot see this itself, and would compute what backward needs
        student_hidden = student_hidden.detach()
    return _LayerKL.apply(student_hidden, student_weight, share, targets, options, frozen)


def _token_share(token_weight: Tensor | None, student_hidden: Tensor) -> Tensor:
    """[N] float64 that sums to 1, or zeros where there is nothing to average."""
    tokens = student_hidden.shape[1]
    if token_weight is None:
        return torch.full((tokens,), 1.0 / max(1, tokens), dtype=torch.float64, device=student_hidden.device)
    weight = token_weight.detach().double()
    total = weight.sum()
    return weight / torch.where(total == 0, 1.0, total)


def _checked_options(
    student_hidden: Tensor,
    student_weight: Tensor,
    targets: TeacherTargets,
    token_weight: Tensor | None,
    vocab_size: int | None,
    temperature: float,
    impl: str,
    workspace_bytes: int | None,
    shard: VocabularyShard | None,
) -> HeadOptions:
    check_tensor("student_hidden", student_hidden, ("S", "N", "Ds"))
    check_tensor("student_weight", student_weight, ("V'", "Ds"))
    check_tensor("targets.neg_entropy", targets.neg_entropy, ("L", "N"))
    check_tensor("targets.expectation", targets.expectation, ("L", "N", "Ds"))
    check_width("student_hidden", student_hidden.shape[2], "student_weight", student_weight.shape[1])
    check_width("student_hidden", student_hidden.shape[2], "targets.expectation", targets.expectation.shape[2])
    tokens = student_hidden.shape[1]
    if targets.expectation.shape[1] != tokens or targets.neg_entropy.shape != targets.expectation.shape[:2]:
        raise ValueError(
            f"student_hidden has {tokens} tokens but the targets are [L, N] = {list(targets.neg_entropy.shape)}; "
            "gather the same answer tokens from teacher and student"
        )
    if token_weight is not None and token_weight.shape != (tokens,):
        raise ValueError(f"token_weight must have shape [{tokens}], one per token, got {list(token_weight.shape)}")
    if token_weight is not None and token_weight.is_complex():
        raise TypeError(f"token_weight has dtype {token_weight.dtype}; pass real weights")
    check_same_device(
        student_hidden=student_hidden,
        student_weight=student_weight,
        neg_entropy=targets.neg_entropy,
        expectation=targets.expectation,
        token_weight=token_weight,
    )
    check_no_grad("student_weight", student_weight, "heads are frozen in distillation")
    check_no_grad("targets.neg_entropy", targets.neg_entropy, "the teacher is frozen")
    check_no_grad("targets.expectation", targets.expectation, "the teacher is frozen")
    check_no_grad("token_weight", token_weight, "weights are constants here")
    options = make_options(
        targets.vocab_size if vocab_size is None and shard is None else vocab_size,
        (student_weight,),
        temperature,
        impl,
        workspace_bytes,
        (student_hidden, targets.expectation),
        shard,
    )
    if options.vocab_size != targets.vocab_size:
        raise ValueError(
            f"vocab_size={options.vocab_size} but the targets were built with {targets.vocab_size}; pass the "
            "targets' own (None where the heads are whole), or build the targets again"
        )
    if temperature != targets.temperature:
        raise ValueError(
            f"temperature={temperature} but the targets were built with {targets.temperature}; pass "
            f"temperature={targets.temperature}, or build the targets again"
        )
    return options
