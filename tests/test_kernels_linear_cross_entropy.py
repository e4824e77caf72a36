"""linear_cross_entropy and linear_logsumexp against the dense float64 reference, in value and gradient."""

import pytest
import torch
from kernels_util import VOCAB, LargestTensor, randn, relative_error
from torch.utils.flop_counter import FlopCounterMode

from vlsi_kernels import DEFAULT_WORKSPACE_BYTES, linear_cross_entropy, linear_logsumexp
from vlsi_kernels.linear_cross_entropy import reference_linear_cross_entropy, reference_linear_logsumexp

# Relative gradient error (Frobenius, against float64 on the same rounded inputs). Half precision: rounding costs 1.7e-3
# (bfloat16) and 2e-4 (float16), and the gradient of hidden is rounded twice: as kept for backward, and as returned.
GRAD_BAR = {torch.float32: 1e-5, torch.bfloat16: 2.8e-3, torch.float16: 4e-4}
TINY = 1  # bytes of workspace: the smallest chunks there are


@pytest.fixture(autouse=True)
def poisoned_memory():
    """In deterministic mode PyTorch fills fresh memory with NaN, so that reading it unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def problem(n, v, d, dtype=torch.float32, scale=1.0):
    hidden = randn(n, d, seed=0, dtype=dtype, scale=scale)
    weight = randn(v, d, seed=1, dtype=dtype)
    labels = torch.randint(v, (n,), generator=torch.Generator().manual_seed(2))
    labels[1::4] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def gradients(function, hidden, weight, upstream):
    out = function(hidden, weight)
    return out, *torch.autograd.grad(out, (hidden, weight), upstream.to(out.dtype))


@pytest.mark.parametrize("workspace", [None, TINY], ids=["default", "tiny_workspace"])
@pytest.mark.parametrize("dtype", list(GRAD_BAR))
@pytest.mark.parametrize(
    ("shape", "scale"), [((1, 1, 3), 1.0), ((7, 999, 33), 1.0), ((300, 1025, 16), 1.0), ((40, 700, 16), 6.0)]
)
def test_value_and_gradients(shape, scale, dtype, workspace):
    """Random upstream gradients; vocabulary cut by one row, temperature off 1, ignored labels, logits near 80."""
    hidden, weight, labels = problem(*shape, dtype, scale)
    cut = max(1, shape[1] - 1)
    labels = labels.clamp(max=cut - 1)
    upstream = randn(shape[0], seed=5)
    options = {"vocab_size": cut, "temperature": 1.3}
    pairs = [
        (
            lambda h, w: linear_cross_entropy(h, w, labels, reduction="none", workspace_bytes=workspace, **options),
            lambda h, w: reference_linear_cross_entropy(h, w, labels, **options),
        ),
        (
            lambda h, w: linear_logsumexp(h, w, workspace_bytes=workspace, **options),
            lambda h, w: reference_linear_logsumexp(h, w, **options),
        ),
    ]
    for ours, reference in pairs:
        out, grad_hidden, grad_weight = gradients(ours, hidden, weight, upstream)
        wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]  # so that truths are not rounded
        true, true_hidden, true_weight = gradients(reference, *wide, upstream)
        assert out.dtype == torch.float32 and grad_hidden.dtype == grad_weight.dtype == dtype
        assert torch.allclose(out.double(), true, rtol=0, atol=1e-6 * max(1.0, 3 * true.abs().max().item()))
        assert torch.equal(grad_weight[cut:], torch.zeros_like(grad_weight[cut:]))
        for grad, expected in ((grad_hidden, true_hidden), (grad_weight, true_weight)):
            error = (grad.double() - expected).norm().item()  # 1e-6: where a vocabulary of one makes the truth 0
            assert error <= GRAD_BAR[dtype] * expected.norm().item() + 1e-6


def test_gradient_near_convergence_in_bfloat16():
    """Labels nearly certain: expected row and label's row cancel, so they must be subtracted before rounding."""
    weight = randn(5000, 64, seed=0, dtype=torch.bfloat16)
    labels = torch.arange(20)
    hidden = (weight[:20].float() * 0.21).bfloat16().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels, reduction="sum")
    assert 1e-3 < loss.item() / 20 < 0.3
    wide = hidden.detach().double().requires_grad_()
    reference_linear_cross_entropy(wide, weight, labels).sum().backward()
    loss.backward()
    assert relative_error(hidden.grad, wide.grad) < 5e-3


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_reductions_agree_with_pytorch(reduction, impl):
    hidden, weight, labels = problem(30, 80, 8)
    ours = linear_cross_entropy(hidden, weight, labels, reduction=reduction, impl=impl)
    theirs = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction=reduction)
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    assert torch.allclose(ours, theirs, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(ours.sum(), (hidden, weight)),
        torch.autograd.grad(theirs.sum(), (hidden, weight)),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("tokens", [0, 6])
def test_nothing_to_learn_from(impl, tokens):
    hidden, weight, _ = problem(tokens, 50, 8)
    loss = linear_cross_entropy(hidden, weight, torch.full((tokens,), -100), impl=impl)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden)) and torch.equal(weight.grad, torch.zeros_like(weight))


def test_ignore_index_inside_the_vocabulary_and_int32_labels():
    hidden, weight, labels = problem(20, 50, 8)
    labels = labels.clamp(min=0)
    labels[::3] = 7
    ours = linear_cross_entropy(hidden, weight, labels.int(), ignore_index=7)
    assert torch.allclose(ours, torch.nn.functional.cross_entropy(hidden @ weight.T, labels, ignore_index=7), atol=1e-5)


def test_frozen_head_costs_one_pass():
    """No gradient of the weight, and not one matrix product in backward."""
    hidden, weight, labels = problem(20, 600, 8)
    weight.requires_grad_(False)
    with FlopCounterMode(display=False) as forward:
        loss = linear_cross_entropy(hidden, weight, labels)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert weight.grad is None and hidden.grad is not None
    assert forward.get_total_flops() == 2 * 2 * 20 * 600 * 8
    assert backward.get_total_flops() == 0


def test_frozen_hidden_needs_no_expectation():
    hidden, weight, labels = problem(20, 600, 8)
    with FlopCounterMode(display=False) as forward:
        loss = linear_cross_entropy(hidden.detach(), weight, labels)
    loss.backward()
    assert forward.get_total_flops() == 2 * 20 * 600 * 8
    true = torch.autograd.grad(reference_linear_cross_entropy(hidden, weight, labels).sum() / 15, weight)[0]
    assert relative_error(weight.grad, true) < 1e-5
    with torch.no_grad(), FlopCounterMode(display=False) as evaluation:
        linear_cross_entropy(hidden, weight, labels)
    assert evaluation.get_total_flops() == 2 * 20 * 600 * 8


def test_poisoned_padding_rows_and_strided_inputs():
    hidden, weight, labels = problem(24, 640, 8)
    base_h, base_w = hidden.detach().T.contiguous(), weight.detach().T.contiguous()
    base_w[:, 600:] = float("nan")
    strided_h, strided_w = base_h.T.requires_grad_(), base_w.T.requires_grad_()
    labels = labels.clamp(max=599)
    linear_cross_entropy(strided_h, strided_w, labels, vocab_size=600, workspace_bytes=TINY).backward()
    linear_cross_entropy(hidden, weight, labels, vocab_size=600).backward()
    assert relative_error(strided_h.grad, hidden.grad) < 1e-5
    assert relative_error(strided_w.grad, weight.grad) < 1e-5


def test_half_precision_weight_gradient_is_summed_in_float32():
    """2000 equal tokens: a bfloat16 running sum would stall far below the truth."""
    hidden = torch.ones(2000, 4, dtype=torch.bfloat16)
    weight = torch.zeros(3, 4, dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.zeros(2000, dtype=torch.long), reduction="sum").backward()
    assert torch.allclose(weight.grad[:, 0].float(), torch.tensor([-4000 / 3, 2000 / 3, 2000 / 3]), rtol=4e-3)


def test_gradcheck_float64():
    hidden, weight, labels = problem(5, 30, 4, torch.float64)
    call = {"vocab_size": 28, "temperature": 0.7}
    labels = labels.clamp(max=27)
    torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, **call), (hidden, weight))
    torch.autograd.gradcheck(lambda h, w: linear_logsumexp(h, w, **call), (hidden, weight))


def test_nothing_of_size_tokens_by_vocabulary():
    hidden, weight = randn(200, 8, seed=0).requires_grad_(), randn(VOCAB, 8, seed=1).requires_grad_()
    with LargestTensor() as largest:
        linear_cross_entropy(hidden, weight, torch.arange(200)).backward()
    assert largest.numel <= max(DEFAULT_WORKSPACE_BYTES["cpu"] // 8, weight.numel()) < 200 * VOCAB // 4


def test_autocast_does_not_round_logits():
    hidden, weight, labels = problem(20, 300, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
        loss.backward()
    true = reference_linear_cross_entropy(hidden, weight, labels).sum() / 15
    assert abs(loss.item() - true.item()) < 2e-6 * true.item()
    assert relative_error(hidden.grad, torch.autograd.grad(true, hidden)[0]) < 1e-5


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"labels": torch.tensor([0, 20])}, ValueError, r"label 20 is outside 0\.\.19"),
        ({"labels": torch.tensor([0, -1])}, ValueError, r"label -1 is outside"),
        ({"labels": torch.tensor([0, 19]), "vocab_size": 10}, ValueError, r"label 19 is outside 0\.\.9"),
        ({"labels": torch.zeros(2)}, TypeError, "labels.long"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, ValueError, "one per token"),
        ({"labels": torch.zeros(2, dtype=torch.long, device="meta")}, ValueError, "one device"),
        ({"reduction": "avg"}, ValueError, "choose one of 'mean', 'sum', 'none'"),
        ({"impl": "cuda"}, ValueError, "is unknown; choose one of"),
        ({"weight": torch.zeros(20, 5)}, ValueError, "width 5"),
        ({"hidden": torch.zeros(4)}, ValueError, r"\[N, D\]"),
        ({"temperature": -1.0}, ValueError, "above 0"),
    ],
)
def test_bad_input(change, error, match):
    call = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(20, 4), "labels": torch.tensor([0, -100])} | change
    with pytest.raises(error, match=match):
        linear_cross_entropy(**call)
