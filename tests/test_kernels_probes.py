"""The self-test's comparisons: what is right agrees, with room to its bar, and what is wrong does not.

On CUDA at real widths, else on the CPU, Triton's kernels in its interpreter (few, since it is slow).
"""

import dataclasses
import json

import pytest
import torch
import varlen_standin
from kernels_util import randn
from liger_util import liger_kernels

from vlsi_fast import attention
from vlsi_fast.self_test import backbone, operators
from vlsi_fast.self_test.probe import BARS, DeviceLostError, Probe, compare, error_of
from vlsi_kernels._triton import triton

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
WIDTHS = (1536, 3584) if CUDA else (48, 80)
VOCABULARY = operators.VOCABULARY if CUDA else 700
HALF = [F16, BF16] if CUDA else [F16]
"""Of liger-kernel's parts: the interpreter has no bfloat16 arithmetic."""
needs_triton = pytest.mark.skipif(triton is None, reason="Triton is not installed")


def of_operators(dtype, impl):
    options = {"dtype": dtype, "impl": impl, "vocabulary": VOCABULARY}
    student, teacher = WIDTHS
    probes = [
        operators.layer_kl(student, teacher, temperature=2.0, **options),
        operators.cross_entropy(student, trained_head=True, **options),
        operators.cross_entropy(student, trained_head=False, **options),
        operators.divergence(student, teacher, beta=1.0, **options),
        operators.divergence(student, teacher, beta=0.3, **options),
        operators.feed_forward(student, 2 * student, student, dtype, impl),
    ]
    more = operators.MANY_TOKENS if CUDA else 5
    return [*probes, operators.feed_forward(student + 2, student - 15, teacher, dtype, impl, more)]


def assert_agreement(probes):
    """With errors that are at most half of what is allowed, so that rounding elsewhere is no alarm."""
    halved = [dataclasses.replace(probe, slack=probe.slack / 2) for probe in probes]
    outcomes = compare(halved, DEVICE)
    assert all(outcome.agrees for outcome in outcomes), [(o.name, o.detail) for o in outcomes if not o.agrees]
    for probe, outcome in zip(probes, outcomes):
        assert outcome.outputs is not None and (outcome.gradients is not None) == bool(probe.learns)
        assert 0 < outcome.outputs < 1, "an error of nothing at all: the two sides are one"
    return outcomes


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_operators_in_plain_pytorch(dtype):
    assert_agreement(of_operators(dtype, "torch"))


@needs_triton
@pytest.mark.parametrize("dtype", [F32, BF16, F16] if CUDA else [BF16])
def test_operators_in_triton(dtype):
    assert_agreement(of_operators(dtype, "triton"))


@pytest.mark.parametrize("dtype", [F32, *HALF])
def test_liger_kernel(dtype):
    pytest.importorskip("liger_kernel")
    with liger_kernels():
        sizes = (3584, 18944, 28, 4, 128) if CUDA else (48, 80, 3, 1, 16)
        width, inner, heads, kv_heads, head = sizes
        probes = [backbone.liger_rms_norm(width, 1e-6, dtype), backbone.liger_swiglu(inner, dtype)]
        assert_agreement([*probes, backbone.liger_rope(heads, kv_heads, head, dtype)])


def of_attention(name, dtype, **options):
    return [
        backbone.attention(name, "student.attn_implementation", 8, 2, 64, dtype, causal=True, **options),
        backbone.attention(name, "student.attn_implementation", 4, 4, 72, dtype, causal=False, **options),
        backbone.attention(name, "student.attn_implementation", 4, 4, 80, dtype, causal=False, packed=False, **options),
    ]


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_torchs_attention(dtype):
    assert_agreement(of_attention("sdpa", dtype))


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.skipif(
    not (CUDA and torch.backends.cuda.is_flash_attention_available()), reason="needs CUDA and flash-attention"
)
def test_torchs_attention_over_packed_rows(dtype):
    assert_agreement(of_attention(attention.VARLEN, dtype))


@pytest.mark.skipif(CUDA, reason="the stand-in is for the CPU")
def test_packed_rows_are_kept_apart_by_the_bounds_that_the_probe_gives(monkeypatch):
    varlen_standin.install(monkeypatch)
    assert_agreement(of_attention(attention.VARLEN, F32))

    def all_one_row(query, key, value, ends, key_ends, longest, longest_key, **options):
        ends, longest = ends[[0, -1]], len(query)
        return varlen_standin.SIGNATURES["2.12"](query, key, value, ends, ends, longest, longest, **options)

    varlen_standin.install(monkeypatch, all_one_row)
    assert not any(outcome.agrees for outcome in compare(of_attention(attention.VARLEN, F32), DEVICE))


# ---- what is wrong ----


def broken(fast, dtype=BF16, learns=("x",)):
    """A probe of x * x whose fast side is `fast`."""
    inputs = lambda generator: {"x": torch.randn(7, 11, generator=generator, device=generator.device)}  # noqa: E731
    return Probe("square", "impl", "triton", dtype, inputs, fast, lambda x: x * x, learns)


def one_wrong(x):
    scale = torch.ones_like(x)
    scale[6, 10] = 1.5
    return x * x * scale


def fails(x):
    raise RuntimeError("no kernel image is available\nfor execution on the device")


@pytest.mark.parametrize(
    "fast, said",
    [
        (one_wrong, "output 0 is off by"),
        (lambda x: x * x.detach(), "gradient of x is off by"),
        (lambda x: x * x / (x != x[0, 0]), "output 0 is not finite, the bar is 5e-02"),
        (fails, "RuntimeError: no kernel image is available"),
        (lambda x: (x * x)[:-1], "RuntimeError"),
    ],
)
def test_what_is_wrong_disagrees_and_says_how(fast, said):
    right, wrong = compare([broken(lambda x: x * x), broken(fast)], DEVICE)
    assert right.agrees and not right.message and right.dtype == "bfloat16"
    assert not wrong.agrees and said in wrong.message and "\n" not in wrong.message and wrong.message in wrong.detail
    json.dumps(dataclasses.asdict(wrong), allow_nan=False)


def test_a_kernel_that_writes_into_the_gradient_it_is_given_spoils_no_other_comparison():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            return grad.mul_(2 * ctx.saved_tensors[0])

    (outcome,) = compare([broken(Square.apply)], DEVICE)
    assert outcome.agrees


def test_a_kernel_that_takes_the_device_with_it_ends_the_process(monkeypatch):
    """An illegal memory access leaves nothing to go on with: the message says what to switch off."""

    def synchronize(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("torch.cuda.synchronize", synchronize)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA Z1")
    from vlsi_fast.self_test import probe

    with pytest.raises(DeviceLostError, match="crashed on NVIDIA Z1.*set impl, by which the run has chosen triton"):
        probe._require_device(broken(fails), torch.device("cuda", 0), RuntimeError("illegal memory access"))


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_rounding_is_no_error(dtype):
    truth = randn(100, 100, seed=0, dtype=torch.float64) * 10.0 ** torch.arange(-6, 4).repeat(10)
    assert error_of(truth.to(dtype), truth.to(dtype)) == 0
    assert 0 < error_of(truth.to(dtype), truth) <= torch.finfo(dtype).eps / 2 < BARS[dtype] / 10
    assert error_of(torch.zeros(0), torch.zeros(0)) == 0 == error_of(torch.zeros(3), torch.zeros(3))
    assert error_of(torch.ones(3), torch.zeros(3)) > 1
