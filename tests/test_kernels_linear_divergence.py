"""linear_divergence against the dense float64 definition of the divergences, in value and gradient.

The Triton path runs on CUDA where there is one, else through Triton's interpreter (see conftest.py), where every
program is a loop step in Python: few rows there.
"""

import functools
import importlib.util

import pytest
import torch
from kernels_util import VOCAB, LargestTensor, MatmulSettings, randn, regime, relative_error
from torch.utils.flop_counter import FlopCounterMode

from vlsi_kernels import DEFAULT_WORKSPACE_BYTES, _common, layer_kl_matrix, teacher_targets
from vlsi_kernels._common import HeadOptions
from vlsi_kernels.divergence_triton import TILE_COLUMNS, DivergenceOptions, HeadPair, plan
from vlsi_kernels.linear_divergence import linear_divergence, reference_linear_divergence

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
TRITON = pytest.param("triton", marks=needs_triton)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BETAS = (0.0, 0.3, 1.0)
TINY = 1  # bytes of workspace: the smallest chunks there are
# Relative error (Frobenius) of a gradient. One rounding to bfloat16 costs 1.7e-3 on average, and a gradient sees two:
# that of hidden as kept and as returned, that of weight in Triton's tile and as returned.
GRAD_BAR = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def problem(n=7, v=600, ds=12, dl=9, dtype=torch.float32, scale=1.0):
    """Student's leaves, teacher's tensors; the teacher's head has five rows more, of NaN."""
    student = randn(n, ds, seed=0, dtype=dtype, scale=scale).to(DEVICE).requires_grad_()
    student_weight = randn(v, ds, seed=1, dtype=dtype).to(DEVICE).requires_grad_()
    teacher_weight = randn(v + 5, dl, seed=3, dtype=dtype).to(DEVICE)
    teacher_weight[v:] = float("nan")
    return student, student_weight, randn(n, dl, seed=2, dtype=dtype, scale=scale).to(DEVICE), teacher_weight


def ours(inputs, upstream=None, **options):
    """Per-token loss, and the gradients of the leaves among inputs under `upstream` (None: random)."""
    loss = linear_divergence(*inputs, reduction="none", **options)
    return loss, *gradients(loss, inputs, upstream)


def truth(inputs, upstream=None, **options):
    """The same from the float64 reference with float64 leaves, so that its gradients are not rounded."""
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    loss = reference_linear_divergence(*wide, **options)
    return loss, *gradients(loss, wide, upstream)


def gradients(loss, inputs, upstream):
    upstream = randn(loss.shape[0], seed=5).to(DEVICE) if upstream is None else upstream
    return torch.autograd.grad(loss, [t for t in inputs if t.requires_grad], upstream.to(loss.dtype))


def loss_error(loss, true):
    """Largest error of a token, relative where the loss is above 1."""
    return ((loss.double() - true).abs() / true.clamp(min=1)).max().item()


def check(result, expected, dtype, loss_bar=2e-6):
    loss, *grads = result
    true, *true_grads = expected
    assert loss.dtype == torch.float32 and all(g.dtype == dtype for g in grads)
    assert loss_error(loss, true) <= loss_bar
    for grad, true_grad in zip(grads, true_grads, strict=True):
        error = (grad.double() - true_grad).norm().item()  # 1e-6: where a vocabulary of one makes the truth 0
        assert error <= GRAD_BAR[dtype] * true_grad.norm().item() + 1e-6


# ---- value and gradient ----


@pytest.mark.parametrize("workspace", [None, TINY], ids=["default", "tiny_workspace"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 3, 2), (5, 999, 33, 17), (300, 1030, 16, 9)])
@pytest.mark.parametrize("impl", ["torch", TRITON])
def test_value_and_gradients(impl, shape, dtype, beta, workspace):
    """Random upstream gradients; temperature off 1, a vocabulary cut by one row, other rows NaN."""
    if impl == "triton" and DEVICE.type == "cpu" and shape[0] > 100:
        pytest.skip("interpreted kernels are slow")
    inputs = problem(*shape, dtype)
    cut = max(1, shape[1] - 1)
    with torch.no_grad():
        inputs[1][cut:] = float("nan")
    options = {"beta": beta, "vocab_size": cut, "temperature": 1.3}
    result = ours(inputs, impl=impl, workspace_bytes=workspace, **options)
    check(result, truth(inputs, **options), dtype)
    assert torch.equal(result[2][cut:], torch.zeros_like(result[2][cut:]))


@functools.lru_cache(maxsize=1)
def regime_problem(name, dtype):
    """One layer of kernels_util.regime; "opposed": logits up to 50, student unrelated to the teacher.

    The inputs, random upstream gradients (so large that no gradient is lost below float16's range; in training, loss
    scaling does that), and by beta the true loss and gradients.
    """
    tokens = 6 if DEVICE.type == "cuda" else 2
    student, student_weight, teacher, weight = regime("near_large" if name == "opposed" else name, dtype)
    if name == "opposed":
        student = randn(*student.shape, seed=3, scale=11.0).to(dtype)
    inputs = [t.to(DEVICE) for t in (student[0, :tokens], student_weight, teacher[0, :tokens], weight)]
    inputs[0].requires_grad_()
    inputs[1].requires_grad_()
    upstream = randn(tokens, seed=5).to(DEVICE) * 4096
    expected = {beta: truth([*inputs[:3], inputs[3][:VOCAB]], upstream, beta=beta) for beta in BETAS}
    return inputs, upstream, expected


@pytest.mark.parametrize("impl", ["torch", TRITON])
@pytest.mark.parametrize("name", ["far", "near", "near_large"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_precision_bars_at_full_vocabulary(dtype, name, impl):
    """The bars: per token |error| <= 1e-4 max(1, loss), gradients within 5e-3. Losses are far better than that."""
    interpreted = impl == "triton" and DEVICE.type == "cpu"
    if interpreted and dtype != torch.bfloat16:
        pytest.skip("interpreted kernels are slow, and bfloat16 is the hardest")
    (student, weight, *teacher), upstream, expected = regime_problem(name, dtype)
    for beta in BETAS:
        inputs = (student, weight.detach() if interpreted else weight, *teacher)
        loss, *grads = ours(inputs, upstream, beta=beta, impl=impl)
        true, *true_grads = expected[beta]
        assert true.mean() > 0.3 if name == "far" else 1e-3 < true.mean() < 5e-2
        assert loss_error(loss, true) <= 5e-6
        for grad, true_grad in zip(grads, true_grads):
            assert relative_error(grad, true_grad) <= 5e-3


@pytest.mark.parametrize("impl", ["torch", TRITON])
def test_rows_that_oppose_the_teacher(impl):
    """Nearly all of q on tokens that p hardly knows: q r and R q are large, and q (r - R) is not."""
    (student, weight, *teacher), upstream, expected = regime_problem("opposed", torch.bfloat16)
    for beta in BETAS:
        loss, grad = ours((student, weight.detach(), *teacher), upstream, beta=beta, impl=impl)
        true, true_grad, _ = expected[beta]
        assert loss_error(loss, true) <= 5e-6
        # 1e-8: for a mixture such a row's gradient is 1e-8 of what other rows have, and one such part of that is lost
        assert (grad.double() - true_grad).norm() <= 5e-3 * true_grad.norm() + 1e-8 * upstream.norm()


@pytest.mark.parametrize("impl", ["torch", TRITON])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("offset", [-40.0, 40.0])
def test_offset_between_the_heads(offset, beta, impl):
    """A constant on all of the teacher's logits changes no distribution, and is 300 times what log(q / p) is here."""
    weight = randn(900, 32, seed=1, dtype=torch.bfloat16).to(DEVICE)
    teacher = randn(4, 32, seed=2, dtype=torch.bfloat16, scale=0.5).to(DEVICE)
    student = (teacher.float() + randn(4, 32, seed=3, scale=0.02).to(DEVICE)).bfloat16().requires_grad_()
    shifted = torch.cat([teacher, torch.full_like(teacher[:, :1], offset)], 1)
    shifted_weight = torch.cat([weight, torch.ones_like(weight[:, :1])], 1)
    inputs = student, weight, shifted, shifted_weight
    loss, grad = ours(inputs, beta=beta, impl=impl)
    true, true_grad = truth(inputs, beta=beta)
    assert 1e-4 < true.mean() < 2e-2
    assert loss_error(loss, true) <= 1e-5
    assert relative_error(grad, true_grad) <= 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("impl", ["torch", TRITON])
def test_probabilities_that_underflow(impl, beta, flip, dtype):
    """Logits from 0 to 300 along the vocabulary, so whole chunks of q (flipped: of p) are 0 in float32."""
    ramp = torch.linspace(0, 300, 1500)[:, None] * torch.ones(4) / 4
    student_weight = (ramp + randn(1500, 4, seed=1)).to(dtype).to(DEVICE)
    teacher_weight = ((ramp.flip(0) if flip else ramp) + randn(1500, 4, seed=2)).to(dtype).to(DEVICE)
    student = (torch.ones(3, 4) + randn(3, 4, seed=0, scale=0.01)).to(dtype).to(DEVICE).requires_grad_()
    inputs = student, student_weight.requires_grad_(), torch.ones(3, 4, dtype=dtype, device=DEVICE), teacher_weight
    result = ours(inputs, beta=beta, impl=impl, workspace_bytes=TINY)
    expected = truth(inputs, beta=beta)
    assert all(bool(t.isfinite().all()) for t in result)
    assert loss_error(result[0], expected[0]) <= 1e-5
    for grad, true_grad in zip(result[1:], expected[1:], strict=True):
        # 1e-6: a mixture of distributions that share nothing has no gradient to speak of
        assert (grad.double() - true_grad).norm() <= 5e-3 * true_grad.norm() + 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", ["torch", TRITON])
def test_log_ratios_beyond_float16(impl, dtype):
    """Two tokens share q, a thousand nats apart in p: Triton's float16 tile holds the ratio at its largest number."""
    student_weight = randn(300, 4, seed=1, scale=0.01)
    student_weight[[7, 200]] = torch.tensor([20.0, 0.0, 0.0, 0.0])
    teacher_weight = torch.zeros(300, 4)
    teacher_weight[200] = 250.0
    inputs = [torch.eye(4)[:1], student_weight, torch.ones(1, 4), teacher_weight]
    inputs = [t.to(dtype).to(DEVICE) for t in inputs]
    inputs[1][7, 1] = 1.0  # so that moving probability from one to the other changes the hidden state
    inputs[0].requires_grad_()
    loss, grad = ours(inputs, beta=1.0, impl=impl)
    true, true_grad = truth(inputs, beta=1.0)
    assert true > 400 and loss_error(loss, true) <= 1e-6
    exact = impl == "torch" or dtype == torch.float32
    assert relative_error(grad, true_grad) <= (5e-3 if exact else 0.6)


@pytest.mark.parametrize("beta", [0.0, 0.01, 0.5, 0.97, 1.0])
def test_gradcheck_float64(beta):
    inputs = problem(4, 40, 5, 3, torch.float64)
    labels = torch.tensor([1, -100, 3, 4], device=DEVICE)
    torch.autograd.gradcheck(
        lambda h, w: linear_divergence(h, w, *inputs[2:], beta=beta, labels=labels, temperature=0.7), inputs[:2]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_impl(dtype):
    inputs = problem(dtype=dtype)
    for beta in BETAS:
        dense, streamed = ours(inputs, beta=beta, impl="reference"), ours(inputs, beta=beta)
        for a, b in zip(dense, streamed, strict=True):
            assert a.dtype == b.dtype == dtype
            assert relative_error(b, a) < (1e-5 if dtype == torch.float32 else 1e-12)


# ---- what the divergences are to each other ----


@pytest.mark.parametrize("impl", ["torch", TRITON])
def test_forward_kl_is_that_of_layer_kl(impl):
    student, weight, teacher, teacher_weight = problem()
    frozen = weight.detach()
    targets = teacher_targets(teacher[None], teacher_weight, frozen, impl=impl)
    matrix = layer_kl_matrix(student[None], frozen, targets, impl=impl)
    loss = linear_divergence(student, frozen, teacher, teacher_weight, impl=impl)
    assert torch.allclose(loss, matrix[0, 0], rtol=1e-6, atol=1e-6)
    assert relative_error(*(torch.autograd.grad(t.sum(), student)[0] for t in (loss, matrix))) < 1e-5


@pytest.mark.parametrize("impl", ["torch", TRITON, "reference"])
@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 1.0])
def test_swapping_teacher_and_student_mirrors_beta(beta, impl):
    """Reverse KL is forward KL of the other; the symmetric Jensen-Shannon divergence does not change."""
    student, weight, teacher, teacher_weight = (t.detach() for t in problem())
    options = {"reduction": "none", "impl": impl}
    there = linear_divergence(student, weight, teacher, teacher_weight, beta=beta, **options)
    back = linear_divergence(teacher, teacher_weight, student, weight, beta=1 - beta, vocab_size=600, **options)
    assert torch.allclose(there, back, rtol=2e-6, atol=2e-6)
    assert bool((there > 0.01).all())
    same = linear_divergence(student, weight, student, weight, beta=beta, **options)
    assert float(same.abs().max()) < 5e-6


def test_small_beta_is_forward_kl_times_beta():
    inputs = problem(dtype=torch.float64, scale=0.1)
    kl = linear_divergence(*inputs)
    assert abs(linear_divergence(*inputs, beta=1e-4) / (1e-4 * kl) - 1) < 1e-3
    assert abs(linear_divergence(*inputs, beta=1 - 1e-4) / (1e-4 * linear_divergence(*inputs, beta=1)) - 1) < 1e-3


# ---- tokens that count ----


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("impl", ["torch", TRITON, "reference"])
def test_ignored_tokens_have_no_influence(impl, beta):
    """Even where their hidden states are NaN: values and gradients of the others are as if they were not there."""
    student, weight, teacher, teacher_weight = problem()
    labels = torch.tensor([5, 7, -1, 7, 0, 599, 7], dtype=torch.int32, device=DEVICE)
    kept = labels != 7
    alone = student.detach()[kept].requires_grad_(), weight, teacher[kept], teacher_weight
    expected = [linear_divergence(*alone, beta=beta, impl=impl, reduction=r) for r in ("mean", "sum", "none")]
    with torch.no_grad():
        student[~kept], teacher[~kept] = float("nan"), float("inf")
    for reduction, loss in zip(("mean", "sum", "none"), expected, strict=True):
        result = linear_divergence(
            student,
            weight,
            teacher,
            teacher_weight,
            beta=beta,
            labels=labels,
            ignore_index=7,
            impl=impl,
            reduction=reduction,
        )
        assert result.shape == (() if reduction != "none" else (7,))
        shown = result if reduction != "none" else result[kept]
        assert torch.allclose(shown, loss, rtol=1e-6, atol=1e-6)
        grads = torch.autograd.grad(result.sum(), (student, weight))
        true_grads = torch.autograd.grad(loss.sum(), alone[:2])
        assert relative_error(grads[0][kept], true_grads[0]) < 1e-5 and relative_error(grads[1], true_grads[1]) < 1e-5
        assert torch.equal(grads[0][~kept], torch.zeros_like(grads[0][~kept]))
    assert torch.equal(result[~kept], torch.zeros(3, device=DEVICE))


@pytest.mark.parametrize("impl", ["torch", TRITON, "reference"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("tokens", "labelled"), [(0, False), (0, True), (3, True)])
def test_nothing_to_learn_from(tokens, labelled, beta, impl):
    student, weight, *teacher = problem(tokens)
    labels = torch.full((tokens,), -100, device=DEVICE) if labelled else None
    loss = linear_divergence(student, weight, *teacher, beta=beta, labels=labels, impl=impl)
    loss.backward()
    assert loss.item() == 0.0 and loss.shape == ()
    assert torch.equal(student.grad, torch.zeros_like(student)) and torch.equal(weight.grad, torch.zeros_like(weight))


# ---- how it is called ----


@pytest.mark.parametrize("impl", ["torch", TRITON])
@pytest.mark.parametrize("beta", BETAS)
def test_strided_inputs(beta, impl):
    inputs = problem()
    result = ours(inputs, beta=beta, impl=impl)
    strided = [t.detach().T.contiguous().T.requires_grad_(t.requires_grad) for t in inputs[:3]]
    strided.append(inputs[3].repeat(1, 2)[:, : inputs[3].shape[1]])
    for a, b in zip(ours(strided, beta=beta, impl=impl), result, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("beta", BETAS)
def test_cost(beta):
    """In products of N x V: a frozen head costs nothing in backward, and what needs no gradient costs no product."""
    n, v, ds, dl = 7, 600, 12, 9
    student, weight, *teacher = problem(n, v, ds, dl)
    unit = 2 * n * v

    def flops(function):
        with FlopCounterMode(display=False) as count:
            result = function()
        return result, count.get_total_flops() / unit

    def call(h, w):
        return linear_divergence(h, w, *teacher, beta=beta, impl="torch")

    logits, passes = ds + dl, 1 if beta in (0, 1) else 2
    loss, cost = flops(lambda: call(student, weight.detach()))
    assert cost == passes * logits + 2 * ds
    assert flops(loss.backward)[1] == 0
    loss, cost = flops(lambda: call(student.detach(), weight))
    assert cost == passes * logits
    assert flops(loss.backward)[1] == logits + ds
    with torch.no_grad():
        assert flops(lambda: call(student, weight))[1] == passes * logits


@pytest.mark.parametrize("slow_mkl", [False, True])
@pytest.mark.parametrize("beta", BETAS)
def test_nothing_of_size_tokens_by_vocabulary(beta, slow_mkl, monkeypatch):
    """On processors whose products are MKL's, and on those that give them to oneDNN, whichever this one is."""
    monkeypatch.setattr(_common, "_slow_mkl", lambda: slow_mkl)
    student, weight, *teacher = problem(150, VOCAB, 4, 6)
    workspace = DEFAULT_WORKSPACE_BYTES["cpu"]
    with LargestTensor() as largest:
        loss = linear_divergence(student, weight, *teacher, beta=beta, impl="torch", workspace_bytes=workspace)
        loss.backward()
    assert largest.numel <= workspace // 4 < 150 * VOCAB // 2


@needs_triton
@pytest.mark.parametrize("beta", BETAS)
def test_nothing_of_size_tokens_by_vocabulary_in_triton(beta):
    """In bytes, since the interpreter copies what a kernel takes as bytes."""
    student, weight, *teacher = problem(8, 12000, 2, 2)
    with LargestTensor() as largest:
        linear_divergence(student, weight, *teacher, beta=beta, impl="triton", workspace_bytes=100_000).backward()
    assert largest.numel <= max(100_000, teacher[1].nbytes) < 8 * 12000 * 4 // 2


@pytest.mark.parametrize("with_product", [False, True])
@pytest.mark.parametrize("workspace", [10**7, 2**29])
@pytest.mark.parametrize(("rows", "vocab", "width"), [(1, 1, 8), (4096, 151936, 64), (81920, 152064, 128)])
def test_plan_keeps_to_the_workspace(rows, vocab, width, workspace, with_product):
    weight = torch.empty(vocab, width, dtype=torch.bfloat16, device="meta")
    hidden = torch.empty(rows, width, dtype=torch.bfloat16, device="meta")
    options = DivergenceOptions(HeadOptions(vocab, 1.0, "triton", workspace), 0.5)
    row_chunk, columns = plan(HeadPair(hidden, weight, hidden, weight), options, with_product)
    assert 1 <= row_chunk <= rows and 1 <= columns <= TILE_COLUMNS
    used = row_chunk * (columns * 2 * 4 + with_product * (columns * 2 * 2 + 2 * 4 * width)) + columns * width * 2
    assert used <= workspace * 1.05


def test_options_of_users_do_not_lower_precision():
    """Neither autocast nor a lowered float32 matmul precision rounds anything or is changed by the call."""
    inputs = problem(ds=64, dl=64, scale=0.125)
    for beta in BETAS:
        torch.set_float32_matmul_precision("medium")
        try:
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16), MatmulSettings() as settings:
                result = ours(inputs, beta=beta)
            assert settings.seen == {("ieee", "ieee")}
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision("highest")
        check(result, truth(inputs, beta=beta), torch.float32, 5e-6)


@pytest.mark.parametrize("impl", ["torch", TRITON])
def test_compile(impl):
    student, weight, *teacher = problem(3)

    def step(h):
        return linear_divergence(h * 1.5, weight, *teacher, beta=0.5, impl=impl) * 2

    plain, compiled = step(student), torch.compile(step, backend="aot_eager")(student)
    assert torch.allclose(compiled, plain)
    assert torch.allclose(*(torch.autograd.grad(t, student)[0] for t in (compiled, plain)), atol=1e-6)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("beta", BETAS)
def test_no_host_synchronisation(beta):
    student, weight, *teacher = problem(64, 9000, 32, 48, torch.bfloat16)
    labels = torch.zeros(64, dtype=torch.long, device=DEVICE)

    def step():
        linear_divergence(student, weight, *teacher, beta=beta, labels=labels, impl="triton").backward()

    step()  # compiles, and makes the library's handles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("beta", BETAS)
def test_agrees_with_liger(beta):
    """Their chunked loss, soft part alone."""
    jsd = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss")
    student, weight, teacher, teacher_weight = problem(n=9)
    labels = torch.tensor([3, 1, -100, 4, 1, 5, -100, 2, 6], device=DEVICE)
    theirs = jsd.LigerFusedLinearJSDFunction.apply(
        student, weight, teacher, teacher_weight[:600], labels, None, None, 0.0, 1.0, beta, -100, 1.7, False, 4
    )
    loss = linear_divergence(student, weight, teacher, teacher_weight, beta=beta, labels=labels, temperature=1.7)
    assert torch.allclose(loss, theirs, rtol=1e-5)
    for a, b in zip(*(torch.autograd.grad(t, (student, weight)) for t in (loss, theirs)), strict=True):
        assert relative_error(a, b) < 1e-5


def test_a_teacher_that_asks_for_a_gradient_is_refused_in_grad_mode_only():
    student, weight, teacher, teacher_weight = problem()
    head = torch.nn.Parameter(teacher_weight)
    with pytest.raises(ValueError, match=r"the teacher is frozen; pass teacher_weight.detach\(\)"):
        linear_divergence(student, weight, teacher, head)
    with pytest.raises(ValueError, match=r"pass teacher_hidden.detach\(\)"):
        linear_divergence(student, weight, teacher.requires_grad_(), teacher_weight)
    with torch.no_grad():
        linear_divergence(student, weight, teacher, head)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"beta": 1.01}, ValueError, "between Jensen-Shannon"),
        ({"beta": -0.1}, ValueError, r"in 0\.\.1"),
        ({"beta": float("nan")}, ValueError, r"in 0\.\.1"),
        ({"beta": True}, ValueError, "must be a number"),
        ({"reduction": "batchmean"}, ValueError, "choose one of 'mean', 'sum', 'none'"),
        ({"labels": torch.zeros(2)}, TypeError, "labels.long"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, ValueError, "one per token"),
        ({"labels": torch.zeros(2, dtype=torch.long, device="meta")}, ValueError, "one device"),
        ({"teacher_hidden": torch.zeros(3, 6)}, ValueError, "same tokens from both"),
        ({"teacher_hidden": torch.zeros(2, 5)}, ValueError, "width 5"),
        ({"student_weight": torch.zeros(20, 5)}, ValueError, "width 5"),
        ({"student_hidden": torch.zeros(1, 2, 4)}, ValueError, r"\[N, Ds\]"),
        ({"teacher_weight": torch.zeros(25, 6, dtype=torch.int64)}, TypeError, "convert it"),
        ({"vocab_size": 21}, ValueError, r"outside 1\.\.20"),
        ({"temperature": 0.0}, ValueError, "above 0"),
        ({"workspace_bytes": 0}, ValueError, "positive int"),
        ({"impl": "fast"}, ValueError, "choose one of"),
        ({"impl": "triton", "teacher_hidden": torch.zeros(2, 6, dtype=torch.float64)}, TypeError, "float64"),
    ],
)
def test_bad_input(change, error, match):
    call = {
        "student_hidden": torch.zeros(2, 4),
        "student_weight": torch.zeros(20, 4),
        "teacher_hidden": torch.zeros(2, 6),
        "teacher_weight": torch.zeros(25, 6),
    } | change
    if call.get("impl") == "triton":
        pytest.importorskip("triton")
        call = {name: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for name, t in call.items()}
    with pytest.raises(error, match=match):
        linear_divergence(**call)
