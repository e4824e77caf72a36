"""verb_ffn against the float64 reference, for single and stacked weights."""

import pytest
import torch
from kernels_util import randn, relative_error

from vlsi_kernels import verb_ffn
from vlsi_kernels.verb_ffn import reference_verb_ffn

SINGLE = ((5, 12), (20, 12), (20, 12), (7, 20))
CASES = {
    "one_layer": SINGLE,
    "vector": ((12,), *SINGLE[1:]),
    "batch": ((2, 3, 12), *SINGLE[1:]),
    "no_tokens": ((0, 12), *SINGLE[1:]),
    "stacked": ((3, 5, 12), (3, 20, 12), (3, 20, 12), (3, 7, 20)),
    "stacked_batch": ((3, 2, 4, 12), (3, 20, 12), (3, 20, 12), (3, 7, 20)),
}


def tensors(case, dtype):
    return [randn(*s, seed=i, dtype=dtype, scale=1.0 if i == 0 else s[-1] ** -0.5).requires_grad_()
            for i, s in enumerate(CASES[case])]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", list(CASES))
def test_value_and_gradients(case, dtype):
    """Error at most twice that of plain PyTorch in the same dtype."""
    inputs = tensors(case, dtype)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    plain = [t.detach().clone().requires_grad_() for t in inputs]
    ours, true = verb_ffn(*inputs), reference_verb_ffn(*wide)
    x, gate, up, down = plain
    rows = x.flatten(1, -2) if gate.dim() == 3 else x
    same = ((torch.nn.functional.silu(rows @ gate.mT) * (rows @ up.mT)) @ down.mT).reshape(true.shape)
    assert ours.shape == true.shape and ours.dtype == dtype
    if not ours.numel():
        ours.sum().backward()
        assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in inputs)
        return
    upstream = randn(*true.shape, seed=9, dtype=dtype)
    for out in (ours, same):
        out.backward(upstream)
    true.backward(upstream.double())
    floor = torch.finfo(dtype).eps / 2
    pairs = [(ours, same, true)] + [(a.grad, b.grad, c.grad) for a, b, c in zip(inputs, plain, wide, strict=True)]
    for value, baseline, expected in pairs:
        assert relative_error(value, expected) <= 2 * max(relative_error(baseline, expected), floor)


@pytest.mark.parametrize("case", ["one_layer", "stacked"])
def test_gradcheck_float64(case):
    torch.autograd.gradcheck(verb_ffn, tensors(case, torch.float64))


def test_partial_gradients():
    for wanted in range(4):
        inputs = tensors("one_layer", torch.float64)
        full = torch.autograd.grad(verb_ffn(*inputs).square().sum(), inputs)
        alone = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(inputs)]
        verb_ffn(*alone).square().sum().backward()
        assert [t.grad is not None for t in alone] == [i == wanted for i in range(4)]
        assert torch.allclose(alone[wanted].grad, full[wanted])


def test_strided_inputs_and_reference_impl():
    x, gate, up, down = tensors("stacked", torch.float32)
    strided = verb_ffn(x.transpose(0, 1).contiguous().transpose(0, 1), gate.mT.contiguous().mT, up, down)
    dense = verb_ffn(x, gate, up, down, impl="reference")
    assert dense.dtype == torch.float32
    assert torch.allclose(strided, dense, atol=1e-5)


def test_autocast_converts_like_a_linear_layer():
    inputs = tensors("one_layer", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = verb_ffn(*inputs)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in inputs)
    assert relative_error(out, reference_verb_ffn(*inputs)) < 2e-2


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.zeros(5, 11)}, ValueError, "width 11"),
        ({"x": torch.zeros(5, 12, dtype=torch.bfloat16)}, ValueError, "one dtype"),
        ({"x": torch.zeros(5, 12, dtype=torch.int64)}, TypeError, "convert it"),
        ({"up": torch.zeros(19, 12)}, ValueError, "do not fit"),
        ({"down": torch.zeros(7, 21)}, ValueError, "do not fit"),
        ({"down": torch.zeros(7)}, ValueError, r"\[Dout, Dh\]"),
        ({"gate": torch.zeros(2, 20, 12)}, ValueError, r"up must have shape \[K, Dh, Din\]"),
        ({"up": torch.zeros(20, 12, device="meta")}, ValueError, "one device"),
        ({"impl": "triton"}, NotImplementedError, "not part of this release"),
        ({"impl": "x"}, ValueError, "choose one of"),
    ],
)
def test_bad_input(change, error, match):
    call = dict(zip(["x", "gate", "up", "down"], (torch.zeros(*s) for s in SINGLE), strict=True)) | change
    with pytest.raises(error, match=match):
        verb_ffn(**call)


def test_stacked_needs_the_layer_axis():
    x, gate, up, down = tensors("stacked", torch.float32)
    with pytest.raises(ValueError, match="stack the layers' inputs on axis 0"):
        verb_ffn(x[:2], gate, up, down)
