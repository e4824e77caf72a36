"""teacher_targets and layer_kl_matrix against the dense float64 definition of the KL."""

import pytest
import torch
from kernels_util import VOCAB, LargestTensor, randn, regime, relative_error
from torch.utils.flop_counter import FlopCounterMode

from vlsi_kernels import DEFAULT_WORKSPACE_BYTES, TeacherTargets, _common, layer_kl_matrix, teacher_targets
from vlsi_kernels.layer_kl import _layer_kl_tokens, reference_layer_kl

TINY = 1  # bytes of workspace: the smallest chunks there are


@pytest.fixture(autouse=True)
def poisoned_memory():
    """In deterministic mode PyTorch fills fresh memory with NaN, so that reading it unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def problem(s=3, n=11, layers=4, v=700, vt=760, ds=9, dl=13, dtype=torch.float32):
    student = randn(s, n, ds, seed=0, dtype=dtype).requires_grad_()
    return (
        student,
        randn(v, ds, seed=1, dtype=dtype),
        randn(layers, n, dl, seed=2, dtype=dtype),
        randn(vt, dl, seed=3, dtype=dtype),
    )


def ours(student, student_weight, teacher, teacher_weight, token_weight=None, **options):
    targets = teacher_targets(teacher, teacher_weight, student_weight, **options)
    options.pop("vocab_size", None)
    return layer_kl_matrix(student, student_weight, targets, token_weight=token_weight, **options)


def truth(student, student_weight, teacher, teacher_weight, token_weight=None, **options):
    """[S, L] float64 and a float64 leaf in place of student."""
    leaf = student.detach().double().requires_grad_()
    kl = reference_layer_kl(leaf, student_weight, teacher, teacher_weight, **options)
    if token_weight is None:
        return kl.mean(-1), leaf
    return (kl * token_weight.double()).sum(-1) / token_weight.double().sum(), leaf


@pytest.mark.parametrize("shared", [False, True], ids=["two_heads", "one_head"])
@pytest.mark.parametrize("onednn", [False, True], ids=["blas", "onednn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["far", "near", "near_large"])
def test_precision_bars_at_full_vocabulary(name, dtype, onednn, shared, monkeypatch):
    """Per token |error| <= 1e-4 max(1, KL); gradient of matched pairs within 5e-3, whatever the regime.

    With the products of either library. A teacher that speaks through the student's head has its mean logit from g.
    """
    monkeypatch.setattr(_common, "_slow_mkl", lambda: onednn)
    student, student_weight, teacher, teacher_weight = regime(name, dtype)
    teacher_weight = student_weight if shared else teacher_weight
    leaf = student.double().requires_grad_()
    true = reference_layer_kl(leaf, student_weight, teacher, teacher_weight)  # [2, 2, N]
    matched = true[[0, 1], [0, 1]]
    peak = float((teacher.double() @ student_weight.double().T).max())
    if name == "far":
        assert matched.mean().item() > 1
    else:
        assert 2e-3 < matched.mean().item() < 5e-2
    assert (35 < peak < 80) if name == "near_large" else peak < 15 or name == "far"

    targets = teacher_targets(teacher, teacher_weight, student_weight)
    assert targets.vocab_size == VOCAB
    tokens = _layer_kl_tokens(student, student_weight, targets)
    assert ((tokens - true).abs() / true.clamp(min=1)).max().item() <= 1e-4

    student.requires_grad_()
    layer_kl_matrix(student, student_weight, targets)[[0, 1], [0, 1]].sum().backward()
    matched.mean(-1).sum().backward()
    assert student.grad.dtype == dtype
    assert relative_error(student.grad, leaf.grad) <= 5e-3


def test_products_of_a_processor_on_which_mkl_is_slow(monkeypatch):
    """They all go to oneDNN, are counted, and hold the user's options off; those in float64 stay."""

    def products(onednn, dtype):
        monkeypatch.setattr(_common, "_slow_mkl", lambda: onednn)
        torch.set_float32_matmul_precision("medium")
        try:
            with FlopCounterMode(display=False) as count:
                ours(*problem(dtype=dtype)).sum().backward()
        finally:
            torch.set_float32_matmul_precision("highest")
        counted = {str(op): n for op, n in count.get_flop_counts()["Global"].items() if "bmm" not in str(op)}
        return set(counted), sum(counted.values())

    blas, onednn = products(False, torch.bfloat16), products(True, torch.bfloat16)
    assert onednn[0] == {"mkldnn._linear_pointwise"} and blas[0] == {"aten.addmm"} and onednn[1] == blas[1] > 0
    assert products(True, torch.float64)[0] == {"aten.addmm"}


AMD = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx2 avx512f avx512_bf16\n\nvendor_id\t: GenuineIntel\n"


@pytest.mark.parametrize(
    ("info", "slow"),
    [
        (AMD, True),
        (AMD.replace("AuthenticAMD", "GenuineIntel"), False),
        (AMD.replace("avx512f", "fma"), False),  # MKL's AVX2 code is then the best there is
        ("processor\t: 0\nFeatures\t: fp asimd\n", False),  # no x86
    ],
)
def test_where_mkl_is_slow(info, slow, monkeypatch, tmp_path):
    if not torch.backends.mkl.is_available():
        pytest.skip("this torch has no MKL")
    (tmp_path / "cpuinfo").write_text(info)
    monkeypatch.setattr(_common, "Path", lambda path: tmp_path / "cpuinfo")
    assert _common._slow_mkl.__wrapped__() is slow
    (tmp_path / "cpuinfo").unlink()
    assert _common._slow_mkl.__wrapped__() is False


@pytest.mark.parametrize("workspace", [None, TINY], ids=["default", "tiny_workspace"])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"n": 1},
        {"s": 1, "layers": 1, "v": 1, "vt": 3},
        {"n": 130, "s": 2, "layers": 5, "v": 1030, "vt": 1000},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
    ],
)
def test_value_and_gradient(shape, workspace):
    """Random gradients of the whole matrix, temperature off 1, heads of different row counts, some weights zero."""
    inputs = problem(**shape)
    token_weight = randn(inputs[0].shape[1], seed=9).abs()
    token_weight[1::3] = 0
    upstream = randn(inputs[0].shape[0], inputs[2].shape[0], seed=8)
    kl = ours(*inputs, token_weight, temperature=1.6, workspace_bytes=workspace)
    kl.backward(upstream)
    true, leaf = truth(*inputs, token_weight, temperature=1.6)
    true.backward(upstream.double())
    assert kl.dtype == torch.float32
    assert torch.allclose(kl.double(), true, rtol=2e-6, atol=3e-6)
    if shape.get("v") == 1:
        assert float(inputs[0].grad.abs().max()) < 1e-6
    else:
        bar = {torch.float32: 1e-5, torch.bfloat16: 2.2e-3, torch.float16: 4e-4}[inputs[0].dtype]
        assert relative_error(inputs[0].grad, leaf.grad) < bar


def test_equal_weights_are_the_plain_mean():
    student, *rest = problem()
    assert torch.allclose(ours(student, *rest), ours(student, *rest, torch.full((11,), 3, dtype=torch.int64)))


def test_tokens_of_weight_zero_have_no_influence():
    student, student_weight, teacher, teacher_weight = problem()
    token_weight = torch.ones(11)
    token_weight[4] = 0
    kl = ours(student, student_weight, teacher, teacher_weight, token_weight)
    kl.sum().backward()
    clean, student.grad = student.grad, None
    with torch.no_grad():
        student[:, 4] = float("nan")
        teacher[:, 4] = float("inf")
    again = ours(student, student_weight, teacher, teacher_weight, token_weight)
    again.sum().backward()
    assert torch.equal(kl, again) and torch.equal(student.grad, clean)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize(("tokens", "weights"), [(0, None), (0, torch.zeros(0)), (3, torch.zeros(3))])
def test_nothing_to_average(tokens, weights, impl):
    student, *rest = problem(n=tokens)
    kl = ours(student, *rest, weights, impl=impl)
    kl.sum().backward()
    assert torch.equal(kl, torch.zeros(3, 4)) and torch.equal(student.grad, torch.zeros_like(student))


def test_vocabulary_cut_and_poisoned_rows():
    student, student_weight, teacher, teacher_weight = problem(v=700, vt=760)
    true, _ = truth(student, student_weight, teacher, teacher_weight, vocab_size=650)
    student_weight[650:], teacher_weight[650:] = float("nan"), float("nan")
    kl = ours(student, student_weight, teacher, teacher_weight, vocab_size=650)
    assert torch.allclose(kl.double(), true, rtol=2e-6, atol=3e-6)


def test_strided_inputs():
    student, student_weight, teacher, teacher_weight = problem()
    kl = ours(student, student_weight, teacher, teacher_weight)
    flipped = student.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()
    strided = ours(
        flipped,
        student_weight.T.contiguous().T,
        teacher.transpose(0, 1).contiguous().transpose(0, 1),
        teacher_weight.repeat(1, 2)[:, :13],
    )
    assert torch.allclose(kl, strided, atol=1e-6)
    (kl.sum() + strided.sum()).backward()
    assert relative_error(flipped.grad, student.grad) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_impl(dtype):
    student, *rest = problem(dtype=dtype)
    dense, streamed = ours(student, *rest, impl="reference"), ours(student, *rest)
    assert dense.dtype == streamed.dtype == dtype
    assert torch.allclose(dense, streamed, rtol=2e-6, atol=3e-6)
    a, b = (torch.autograd.grad(kl[0, 2] + kl[1, 1], student)[0] for kl in (dense, streamed))
    assert relative_error(b, a) < 1e-5


def test_gradcheck_float64():
    student, student_weight, teacher, teacher_weight = problem(s=2, n=3, layers=2, v=40, vt=44, dtype=torch.float64)
    targets = teacher_targets(teacher, teacher_weight, student_weight, temperature=2.0)
    token_weight = torch.tensor([1.0, 0.0, 2.5])
    torch.autograd.gradcheck(
        lambda h: layer_kl_matrix(h, student_weight, targets, token_weight=token_weight, temperature=2.0), (student,)
    )


def test_cost_is_one_pass_each_and_none_in_backward():
    """Vocabulary products: 2 N V (Dl + Ds) a teacher layer, 4 N V Ds a student layer; pairs add 2 S L N Ds."""
    s, n, layers, v, ds, dl = 3, 11, 4, 700, 9, 13
    student, student_weight, teacher, teacher_weight = problem()
    with FlopCounterMode(display=False) as count:
        targets = teacher_targets(teacher, teacher_weight, student_weight)
    assert count.get_total_flops() == 2 * layers * n * v * (dl + ds)
    with FlopCounterMode(display=False) as count:
        kl = layer_kl_matrix(student, student_weight, targets)
    assert count.get_total_flops() == 4 * s * n * v * ds + 2 * s * layers * n * ds
    with FlopCounterMode(display=False) as count:
        kl[[0, 1, 2], [0, 1, 3]].sum().backward()
    assert count.get_total_flops() == 0
    with torch.no_grad(), FlopCounterMode(display=False) as count:
        layer_kl_matrix(student, student_weight, targets)
    assert count.get_total_flops() == 2 * s * n * v * ds + 2 * s * layers * n * ds


def test_nothing_of_size_tokens_by_vocabulary():
    shape = {"s": 2, "n": 150, "layers": 2, "v": VOCAB, "vt": VOCAB + 128, "ds": 4, "dl": 6}
    student, student_weight, teacher, teacher_weight = problem(**shape)
    with LargestTensor() as largest:
        ours(student, student_weight, teacher, teacher_weight).sum().backward()
    assert largest.numel <= max(DEFAULT_WORKSPACE_BYTES["cpu"] // 8, teacher_weight.numel()) < 150 * VOCAB // 4


def test_autocast_and_lowered_precision_do_not_round():
    inputs = problem(ds=64, dl=64)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            kl = ours(*inputs)
            kl.sum().backward()
    finally:
        torch.set_float32_matmul_precision("highest")
    true, leaf = truth(*inputs)
    true.sum().backward()
    assert torch.allclose(kl.double(), true, rtol=5e-6, atol=1e-5)
    assert relative_error(inputs[0].grad, leaf.grad) < 2e-5


def test_trainable_head_is_refused_in_grad_mode_only():
    student, student_weight, teacher, teacher_weight = problem()
    targets = teacher_targets(teacher, teacher_weight, student_weight)
    head = torch.nn.Parameter(student_weight)
    with pytest.raises(ValueError, match="heads are frozen in distillation; pass student_weight.detach()"):
        layer_kl_matrix(student, head, targets)
    with torch.no_grad():
        layer_kl_matrix(student, head, targets)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"temperature": 2.0}, ValueError, "built with 1.0; pass temperature=1.0"),
        ({"vocab_size": 600}, ValueError, "built with 700; pass the targets' own"),
        ({"student_weight": torch.zeros(650, 9)}, ValueError, r"outside 1\.\.650"),
        ({"student_weight": torch.zeros(700, 8)}, ValueError, "width 8"),
        ({"student_hidden": torch.zeros(3, 10, 9)}, ValueError, "same answer tokens"),
        ({"student_hidden": torch.zeros(11, 9)}, ValueError, r"\[S, N, Ds\]"),
        ({"targets": TeacherTargets(torch.zeros(4, 11), torch.zeros(4, 11, 5), 700, 1.0)}, ValueError, "width 5"),
        ({"token_weight": torch.ones(10)}, ValueError, "one per token"),
        ({"token_weight": torch.ones(11, requires_grad=True)}, ValueError, "constants"),
        ({"token_weight": torch.ones(11, device="meta")}, ValueError, "one device"),
        ({"impl": "cuda"}, ValueError, "is unknown; choose one of"),
        ({"impl": "fast"}, ValueError, "choose one of"),
    ],
)
def test_bad_input(change, error, match):
    student, student_weight, teacher, teacher_weight = problem()
    targets = teacher_targets(teacher, teacher_weight, student_weight)
    call = {"student_hidden": student, "student_weight": student_weight, "targets": targets} | change
    with pytest.raises(error, match=match):
        layer_kl_matrix(**call)


def test_bad_targets_input():
    _, student_weight, teacher, teacher_weight = problem()
    with pytest.raises(ValueError, match=r"outside 1\.\.700"):
        teacher_targets(teacher, teacher_weight, student_weight, vocab_size=701)
    with pytest.raises(ValueError, match=r"\[L, N, Dl\]"):
        teacher_targets(teacher[0], teacher_weight, student_weight)
    with pytest.raises(ValueError, match="width 12"):
        teacher_targets(teacher[..., :12], teacher_weight, student_weight)
