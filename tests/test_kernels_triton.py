"""The Triton path of the vocabulary operators against the dense float64 reference.

On CUDA where there is one, else on the CPU through Triton's interpreter (see conftest.py): rows are few there, since
every program of a kernel is a loop step in Python.
"""

import importlib

import pytest
import torch
from kernels_util import VOCAB, LargestTensor, randn, regime, relative_error

from vlsi_kernels import head_statistics, layer_kl_matrix, linear_cross_entropy, linear_logsumexp, teacher_targets
from vlsi_kernels._common import HeadOptions, plan_chunks, plan_tiles, resolve_impl
from vlsi_kernels.head_statistics import reference_head_statistics
from vlsi_kernels.layer_kl import _layer_kl_tokens, reference_layer_kl
from vlsi_kernels.linear_cross_entropy import reference_linear_cross_entropy, reference_linear_logsumexp

triton = pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TINY = 1  # bytes of workspace: the smallest tiles there are
# Relative error (Frobenius) of a gradient. One rounding to bfloat16 costs 1.7e-3 on average, and a gradient sees two:
# that of hidden as kept and as returned, that of weight in the tile and as returned.
GRAD_BAR = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}
cuda_only = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")


def numbers(*shape, seed, dtype=torch.float32, scale=1.0):
    return randn(*shape, seed=seed, dtype=dtype, scale=scale).to(DEVICE)


def check_statistics(hidden, weight, values, workspace=None, **options):
    stats = head_statistics(hidden, weight, values, impl="triton", workspace_bytes=workspace, **options)
    truth = reference_head_statistics(hidden, weight, values, **options)
    spread = max(1.0, float(truth.logsumexp.abs().max())) if truth.logsumexp.numel() else 1.0
    assert torch.allclose(stats.logsumexp.double(), truth.logsumexp, rtol=0, atol=3e-6 * spread)
    exact = values is None or values.dtype == torch.float32
    assert torch.allclose(stats.mean_logit.double(), truth.mean_logit, rtol=0, atol=(8e-6 if exact else 1e-3) * spread)
    if values is None:
        assert stats.expectation is None
    elif truth.expectation.numel():
        assert stats.expectation.dtype == torch.float32
        assert relative_error(stats.expectation, truth.expectation) < (6e-6 * spread if exact else 4e-4)
    return stats, truth


@pytest.mark.parametrize("workspace", [None, TINY], ids=["default", "tiny_workspace"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 3, 2), (7, 999, 33, 17), (19, 1025, 16, 1100), (0, 70, 8, 5)])
def test_statistics(shape, dtype, workspace):
    n, v, dk, dv = shape
    hidden, weight, values = (numbers(*s, seed=i, dtype=dtype) for i, s in enumerate([(n, dk), (v, dk), (v, dv)]))
    check_statistics(hidden, weight, values, workspace, temperature=1.7)
    check_statistics(hidden, weight, None, workspace)


def test_more_rows_than_a_block():
    hidden, weight, values = numbers(300, 8, seed=0), numbers(300, 8, seed=1), numbers(300, 6, seed=2)
    check_statistics(hidden, weight, values, TINY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("growth", [0.5, 30.0, 200.0])
def test_maximum_that_rises_along_the_vocabulary(growth, dtype):
    """The scale of a row's exponentials must follow its maximum, also far beyond float16's and exp's range."""
    v = 2000
    hidden = numbers(5, 8, seed=0).abs().to(dtype)
    weight = torch.linspace(0, growth, v)[:, None] * torch.ones(8) + randn(v, 8, seed=1)
    weight = weight.to(DEVICE, dtype)
    values = numbers(v, 1030, seed=2, dtype=dtype)
    check_statistics(hidden, weight, values, TINY)
    check_statistics(hidden, weight.flip(0), values, TINY)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_values_of_any_size(scale):
    """bfloat16 reaches from 1e-38 to 1e38, the float16 that its values are multiplied in from 6e-8 to 6e4."""
    hidden, weight = (numbers(s, 8, seed=i, dtype=torch.bfloat16) for i, s in enumerate((5, 700)))
    values = numbers(700, 12, seed=2, dtype=torch.bfloat16, scale=scale)
    check_statistics(hidden, weight, values)
    zero = head_statistics(hidden, weight, torch.zeros_like(values), impl="triton").expectation
    assert torch.equal(zero, torch.zeros_like(zero))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_beyond_the_vocabulary_are_never_read(dtype):
    hidden, weight, values = (numbers(s, 8, seed=i, dtype=dtype) for i, s in enumerate((4, 640, 700)))
    weight[600:], values[600:] = float("nan"), float("nan")
    check_statistics(hidden, weight, values, vocab_size=600)


def test_strided_inputs_and_mixed_dtypes():
    hidden, weight, values = numbers(8, 6, seed=0).T, numbers(8, 500, seed=1).T, numbers(500, 10, seed=2)[:, ::2]
    check_statistics(hidden, weight, values, TINY)
    check_statistics(hidden.bfloat16(), weight, values.half(), TINY)
    check_statistics(hidden.half(), weight.bfloat16(), values.bfloat16(), TINY)


# ---- cross-entropy and log-sum-exp ----


def problem(n, v, d, dtype, scale=1.0):
    hidden = numbers(n, d, seed=0, dtype=dtype, scale=scale)
    weight = numbers(v, d, seed=1, dtype=dtype)
    labels = torch.randint(v, (n,), generator=torch.Generator().manual_seed(2)).to(DEVICE)
    labels[1::4] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


@pytest.mark.parametrize("workspace", [None, TINY], ids=["default", "tiny_workspace"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "scale"), [((1, 1, 3), 1.0), ((7, 999, 33), 1.0), ((20, 700, 16), 6.0), ((3, 400, 1030), 0.1)]
)
def test_cross_entropy_and_logsumexp(shape, scale, dtype, workspace):
    """Random upstream gradients; vocabulary cut by one row, temperature off 1, ignored labels, logits near 80."""
    hidden, weight, labels = problem(*shape, dtype, scale)
    cut = max(1, shape[1] - 1)
    labels = labels.clamp(max=cut - 1)
    upstream = numbers(shape[0], seed=5)
    options = {"vocab_size": cut, "temperature": 1.3}
    ours_options = options | {"impl": "triton", "workspace_bytes": workspace}
    pairs = [
        (
            lambda h, w: linear_cross_entropy(h, w, labels, reduction="none", **ours_options),
            lambda h, w: reference_linear_cross_entropy(h, w, labels, **options),
        ),
        (
            lambda h, w: linear_logsumexp(h, w, **ours_options),
            lambda h, w: reference_linear_logsumexp(h, w, **options),
        ),
    ]
    for ours, reference in pairs:
        out, truth = ours(hidden, weight), reference(hidden, weight)
        grads = torch.autograd.grad(out, (hidden, weight), upstream)
        true_grads = torch.autograd.grad(truth, (hidden, weight), upstream.double())
        assert torch.allclose(out.double(), truth, rtol=1e-6, atol=1e-5)
        for grad, true_grad, tensor in zip(grads, true_grads, (hidden, weight)):
            assert grad.dtype == tensor.dtype
            assert relative_error(grad, true_grad) < GRAD_BAR[dtype] or true_grad.norm() < 1e-6
        assert not grads[1][cut:].any()


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_weight_gradient_under_tiny_and_huge_upstream_gradients(size):
    hidden, weight, labels = problem(9, 300, 8, torch.float16)
    upstream = numbers(9, seed=5).double() * size
    leaf = weight.detach().float().requires_grad_()
    loss = linear_cross_entropy(hidden.detach(), leaf, labels, reduction="none", impl="triton")
    truth_leaf = weight.detach().double().requires_grad_()
    truth = reference_linear_cross_entropy(hidden.detach(), truth_leaf, labels)
    (grad,) = torch.autograd.grad(loss, leaf, upstream.float())
    (true_grad,) = torch.autograd.grad(truth, truth_leaf, upstream)
    assert relative_error(grad, true_grad) < 1e-3


def test_ignored_tokens_may_hold_anything():
    hidden, weight, labels = problem(8, 300, 8, torch.bfloat16)
    with torch.no_grad():
        hidden[labels == -100] = float("nan")
    loss = linear_cross_entropy(hidden, weight.detach(), labels, impl="triton")
    (grad,) = torch.autograd.grad(loss, hidden)
    assert loss.isfinite() and grad.isfinite().all()
    assert not grad[labels == -100].any() and grad[labels != -100].any()


def test_all_tokens_ignored_and_none_at_all():
    hidden, weight, _ = problem(5, 30, 8, torch.float32)
    for rows in (5, 0):
        h = hidden[:rows]
        loss = linear_cross_entropy(h, weight, torch.full((rows,), -100, device=DEVICE), impl="triton")
        assert loss == 0
        for grad in torch.autograd.grad(loss, (h, weight)):
            assert not grad.any()


def test_a_frozen_head_costs_nothing_in_backward(monkeypatch):
    module = importlib.import_module("vlsi_kernels.linear_cross_entropy")
    calls = []
    monkeypatch.setattr(module, "product", lambda *a, **k: calls.append(a))
    hidden, weight, labels = problem(6, 50, 8, torch.float32)
    loss = linear_cross_entropy(hidden, weight.detach(), labels, impl="triton")
    saved = loss.grad_fn
    assert saved is not None
    loss.backward()
    assert not calls


# ---- KL of all pairs ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["far", "near", "near_large"])
def test_layer_kl_in_the_regimes_that_matter(name, dtype):
    """Real vocabulary. KL per token within 1e-4 (relative above 1), gradient within 5e-3, also where they cancel."""
    if DEVICE.type == "cpu" and name != "near" and dtype != torch.bfloat16:
        pytest.skip("interpreted kernels are slow, and bfloat16 is the hardest")
    student, student_weight, teacher, weight = (t.to(DEVICE) for t in regime(name, dtype, tokens=3, width=40))
    student.requires_grad_()
    targets = teacher_targets(teacher, weight, student_weight, vocab_size=VOCAB, impl="triton")
    tokens = _layer_kl_tokens(student.detach(), student_weight, targets, impl="triton")
    truth = reference_layer_kl(student, student_weight, teacher, weight, vocab_size=VOCAB)
    assert ((tokens - truth).abs() / truth.clamp(min=1.0)).max() < 1e-4
    kl = layer_kl_matrix(student, student_weight, targets, impl="triton")
    pairs = torch.zeros(2, 2, device=DEVICE)
    pairs[[0, 1], [0, 1]] = numbers(2, seed=9).abs() + 0.1
    (grad,) = torch.autograd.grad((kl * pairs).sum(), student)
    (true_grad,) = torch.autograd.grad((truth.mean(-1) * pairs).sum(), student)
    assert grad.dtype == dtype
    assert relative_error(grad, true_grad) < 5e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 8, 8), (3, 5, 4, 17, 33), (2, 40, 3, 1030, 20)])
def test_layer_kl_ragged(sizes, dtype):
    """More teacher layers than a block, odd widths, weights of tokens with a zero on a token that is not finite."""
    s, l, n, ds, dl = sizes
    student = numbers(s, n, ds, seed=0, dtype=dtype, scale=ds**-0.5)
    teacher = numbers(l, n, dl, seed=1, dtype=dtype, scale=dl**-0.5)
    student_weight, weight = numbers(333, ds, seed=2, dtype=dtype), numbers(340, dl, seed=3, dtype=dtype)
    token_weight = torch.rand(n, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    if n > 1:
        token_weight[1] = 0.0
    truth_student = student.clone().requires_grad_()
    truth = reference_layer_kl(truth_student, student_weight, teacher, weight, temperature=2.0)
    truth = (truth * token_weight).sum(-1) / token_weight.sum()
    if n > 1:
        student[:, 1] = float("nan")
    student.requires_grad_()
    options = {"temperature": 2.0, "impl": "triton", "workspace_bytes": TINY}
    targets = teacher_targets(teacher, weight, student_weight, **options)
    kl = layer_kl_matrix(student, student_weight, targets, token_weight=token_weight, **options)
    assert torch.allclose(kl.double(), truth, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-4)
    upstream = numbers(s, l, seed=5)
    (grad,) = torch.autograd.grad(kl, student, upstream)
    (true_grad,) = torch.autograd.grad(truth, truth_student, upstream.double())
    assert relative_error(grad, true_grad) < (2e-5 if dtype == torch.float32 else 5e-3)


def test_layer_kl_of_strided_students_and_no_tokens():
    teacher, weight = numbers(2, 5, 6, seed=0), numbers(50, 6, seed=1)
    student = numbers(5, 3, 6, seed=2).transpose(0, 1)
    targets = teacher_targets(teacher, weight, weight, impl="triton")
    kl = layer_kl_matrix(student, weight, targets, impl="triton")
    assert torch.allclose(kl, layer_kl_matrix(student, weight, targets, impl="torch"), atol=1e-6)
    none = teacher_targets(teacher[:, :0], weight, weight, impl="triton")
    leaf = student[:, :0].detach().requires_grad_()
    empty = layer_kl_matrix(leaf, weight, none, impl="triton")
    assert torch.equal(empty, torch.zeros(3, 2, device=DEVICE))
    empty.sum().backward()
    assert leaf.grad.shape == (3, 0, 6)


# ---- how it is called ----


def test_workspace_bounds_every_tensor():
    """Nothing of rows x vocabulary is made, and tiles shrink with the workspace."""
    hidden, weight = numbers(32, 8, seed=0, dtype=torch.bfloat16), numbers(30000, 8, seed=1, dtype=torch.bfloat16)
    with LargestTensor() as largest:
        loss = linear_cross_entropy(
            hidden.requires_grad_(),
            weight,
            torch.zeros(32, dtype=torch.long, device=DEVICE),
            impl="triton",
            workspace_bytes=400_000,
        )
        loss.backward()
    assert largest.numel <= weight.nbytes  # which the interpreter copies as bytes; rows x vocabulary is twice that
    rows, columns = plan_tiles(32, 8, torch.float16, HeadOptions(30000, 1.0, "triton", 400_000))
    assert rows * columns * 6 <= 400_000


@pytest.mark.parametrize("workspace", [1, 10**6, 10**8, 2**29, 10**10])
@pytest.mark.parametrize(
    ("rows", "vocab", "width"),
    [(1, 1, 0), (1, 151936, 1536), (10**6, 152064, 3584), (81920, 152064, 8192), (300, 1025, 40)],
)
def test_plan(rows, vocab, width, workspace):
    row_chunk, columns = plan_tiles(rows, width, torch.float16, HeadOptions(vocab, 1.0, "triton", workspace))
    assert 1 <= row_chunk <= rows and 1 <= columns <= 8192
    used = row_chunk * (columns * 6 + 4 * width) + columns * width * 2
    least = min(rows, 256) * (384 * 6 + 4 * width) + 384 * width * 2
    assert used <= max(workspace * 1.02, least)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("workspace", [10**7, 10**8, 2**29, 10**10])
@pytest.mark.parametrize(("rows", "width"), [(0, 8), (1, 0), (86016, 1536), (86016, 3584), (10**6, 8192), (300, 40)])
def test_plan_of_the_pytorch_path(device, rows, width, workspace):
    """Tiles and the products beside them are within the workspace, however many rows there are."""
    options = HeadOptions(151936, 1.0, "torch", workspace)
    row_chunk, columns = plan_chunks(rows, options, torch.float32, torch.device(device), width)
    assert 1 <= row_chunk <= max(1, rows) and 1 <= columns <= 151936
    tiles, products = (2, 1) if device == "cpu" else (4, 2)
    used = 4 * row_chunk * (tiles * columns + products * width)
    least = 4 * min(max(rows, 1), 256) * (tiles * 256 + products * width)
    assert used <= max(workspace, least)


def test_autocast_and_compile():
    hidden, weight, labels = problem(6, 300, 16, torch.float32)
    teacher = numbers(2, 6, 16, seed=4)

    def step(hidden):
        hidden = hidden * 1.5
        loss = linear_cross_entropy(hidden, weight, labels, impl="triton")
        targets = teacher_targets(teacher, weight.detach(), weight.detach(), impl="triton")
        return loss + layer_kl_matrix(hidden[None], weight.detach(), targets, impl="triton").sum() * 2

    plain = step(hidden)
    (grad,) = torch.autograd.grad(plain, hidden)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        inside = step(hidden)
    assert torch.equal(plain, inside)  # logits are never rounded, whatever surrounds the operator
    compiled = torch.compile(step, backend="aot_eager")(hidden)
    (compiled_grad,) = torch.autograd.grad(compiled, hidden)
    assert torch.allclose(compiled, plain) and torch.allclose(compiled_grad, grad)


def test_which_implementation_is_taken(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    double = torch.zeros(1, dtype=torch.float64)
    assert resolve_impl("auto", cpu) == "torch"
    assert resolve_impl("auto", cuda) == "triton"
    assert resolve_impl("auto", cuda, None, double) == "torch"
    with pytest.raises(TypeError, match='use impl="auto" or "torch" for float64'):
        resolve_impl("triton", cuda, double)
    common = importlib.import_module("vlsi_kernels._common")
    monkeypatch.setattr(common, "interpreted", lambda: False)
    with pytest.raises(ValueError, match="needs tensors on a CUDA device, got cpu"):
        resolve_impl("triton", cpu)
    monkeypatch.setattr(common, "triton", None)
    assert resolve_impl("auto", cuda) == "torch"
    with pytest.raises(ImportError, match="pip install triton"):
        resolve_impl("triton", cuda)


# ---- on a GPU only ----


@cuda_only
def test_no_host_synchronisation():
    hidden, weight, labels = problem(64, 9000, 32, torch.bfloat16)
    teacher = numbers(3, 64, 32, seed=4, dtype=torch.bfloat16)

    def step():
        frozen = weight.detach()
        loss = linear_cross_entropy(hidden, weight, labels, impl="triton")
        targets = teacher_targets(teacher, frozen, frozen, impl="triton")
        (loss + layer_kl_matrix(hidden[None], frozen, targets, impl="triton").sum()).backward()

    step()  # compiles, and makes the library's handles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cuda_only
def test_a_million_rows():
    hidden, weight = numbers(10**6, 64, seed=0, dtype=torch.bfloat16), numbers(5000, 64, seed=1, dtype=torch.bfloat16)
    stats = head_statistics(hidden, weight, weight, impl="triton")
    some = torch.arange(0, 10**6, 9973, device=DEVICE)
    truth = reference_head_statistics(hidden[some], weight, weight)
    assert torch.allclose(stats.logsumexp[some].double(), truth.logsumexp, rtol=0, atol=1e-4)
    assert relative_error(stats.expectation[some], truth.expectation) < 5e-4


@cuda_only
def test_memory_at_the_size_of_a_72b_teacher():
    """N 4096, V 152064, widths 8192 and 3584, 20 x 7 layers: at most 1 GiB beyond inputs, outputs and what is kept."""
    make = {"device": "cuda", "dtype": torch.bfloat16}
    teacher, weight = torch.randn(20, 4096, 8192, **make), torch.randn(152064, 8192, **make) * 0.02
    student = torch.randn(7, 4096, 3584, **make).requires_grad_()
    student_weight = torch.randn(152064, 3584, **make) * 0.02
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    targets = teacher_targets(teacher, weight, student_weight, impl="triton")
    outputs = torch.cuda.memory_allocated() - base
    assert torch.cuda.max_memory_allocated() - base - outputs <= 2**30
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    layer_kl_matrix(student, student_weight, targets, impl="triton").trace().backward()
    kept = 7 * 4096 * 3584 * 4 + student.grad.nbytes
    assert torch.cuda.max_memory_allocated() - base - kept <= 2**30
