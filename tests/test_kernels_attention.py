"""Attention over packed rows: the formula against sdpa with a mask, the adapter against the formula by every signature
that torch has had, and on a GPU torch's own kernel against both."""

import inspect

import pytest
import torch
import varlen_standin
from kernels_util import randn, relative_error
from torch.nn.attention import varlen
from varlen_standin import reference_varlen

from vlsi_fast.attention import VARLEN, attend, varlen_attention

LENGTHS = [5, 1, 13, 129, 2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
cuda_only = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")


def problem(heads, kv_heads, width, dtype=torch.float64, device="cpu"):
    """query, key, value as slices of one tensor, as from one projection; bounds; a gradient of the result."""
    count = sum(LENGTHS)
    joined = randn(count, heads + 2 * kv_heads, width, seed=1).to(device, dtype)
    inputs = [part.detach().requires_grad_() for part in joined.split([heads, kv_heads, kv_heads], dim=1)]
    bounds = torch.tensor([0, *LENGTHS], device=device).cumsum(0, dtype=torch.int32)
    return inputs, bounds, randn(count, heads, width, seed=2).to(device, dtype)


def with_gradients(function, inputs, *arguments, gradient):
    """[result, gradients of the inputs]."""
    out = function(*inputs, *arguments)
    return [out, *torch.autograd.grad(out, inputs, gradient)]


SHAPES = [(4, 4, 8), (4, 2, 16), (6, 1, 12)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_formula_is_sdpa_with_a_mask(shape, causal):
    inputs, bounds, gradient = problem(*shape)
    ours = with_gradients(reference_varlen, inputs, bounds, causal, 0.3, gradient=gradient)
    mask = torch.block_diag(*(torch.ones(n, n) for n in LENGTHS)).bool()
    mask = mask.tril() if causal else mask

    def stock(query, key, value):
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
        return out[0].transpose(0, 1)

    for one, other in zip(ours, with_gradients(stock, inputs, gradient=gradient)):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("standin", varlen_standin.SIGNATURES.values())
def test_every_signature_that_torch_had(monkeypatch, standin, shape, causal, scale):
    calls = varlen_standin.install(monkeypatch, standin)
    inputs, bounds, gradient = problem(*shape)
    ours = with_gradients(varlen_attention, inputs, bounds, max(LENGTHS), causal, scale, gradient=gradient)
    truth = with_gradients(reference_varlen, inputs, bounds, causal, scale, gradient=gradient)
    for one, other in zip(ours, truth):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    repeats = "enable_gqa" not in inspect.signature(standin).parameters
    assert [call.heads for call in calls] == [(shape[0], shape[0] if repeats else shape[1])]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_installed_torch_takes_the_call(shape, causal):
    """Its own operator, forward and backward, on the meta device: arguments and shapes, without a GPU."""
    known = inspect.signature(varlen.varlen_attn).parameters
    assert list(known)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert "window_size" in known or "is_causal" in known, "a signature that the adapter does not know: teach it"
    inputs, bounds, gradient = problem(*shape, torch.bfloat16, "meta")
    parts = with_gradients(varlen_attention, inputs, bounds, max(LENGTHS), causal, gradient=gradient)
    assert [part.shape for part in parts] == [inputs[0].shape, *(part.shape for part in inputs)]


# ---- as transformers calls it ----


class Layer(torch.nn.Module):
    is_causal = True


def heads_first(batch, length, seed=1):
    return [randn(batch, 2, length, 8, seed=seed + i) for i in range(3)]


def test_sequences_of_one_length_are_rows(monkeypatch):
    """As in SigLIP, which passes no bounds."""
    calls = varlen_standin.install(monkeypatch)
    query, key, value = heads_first(3, 7)
    out, weights = attend(Layer(), query, key, value, None, is_causal=False, scaling=0.5, dropout=0.0)
    stock = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.5).transpose(1, 2)
    torch.testing.assert_close(out, stock)
    assert weights is None and calls[0].lengths.tolist() == [7, 7, 7]


def test_autocast_keeps_half_precision(monkeypatch):
    """Queries and keys that rotary embeddings of float32 hidden states widened."""
    varlen_standin.install(monkeypatch)
    query, key, value = heads_first(1, 7)
    bounds = {"cu_seq_lens_q": torch.tensor([0, 3, 7], dtype=torch.int32), "max_length_q": 4}
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attend(Layer(), query, key, value.bfloat16(), None, **bounds)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "options, said",
    [
        ({"attention_mask": torch.ones(1, 7)}, "was given padded ones or a cache: set data.padding_free to auto"),
        ({}, "takes packed rows with their bounds"),
        ({"cached": 1, "is_causal": False}, "padded ones or a cache"),
        ({"dropout": 0.1}, "has no dropout: set it to sdpa"),
        ({"softcap": 30.0, "sliding_window": 4}, "has no sliding_window and no softcap"),
        ({"s_aux": torch.zeros(2)}, "has no s_aux"),
    ],
)
def test_what_it_cannot_do_is_refused(monkeypatch, options, said):
    varlen_standin.install(monkeypatch)
    query, key, value = heads_first(1, 7)
    cached = options.pop("cached", 0)
    with pytest.raises(ValueError, match=f"{VARLEN} .*{said}"):
        attend(Layer(), query[:, :, cached:], key, value, **({"attention_mask": None} | options))


# ---- on a GPU only: torch's own kernel ----


@cuda_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [(4, 4, 64), (28, 4, 128), (16, 16, 80), (16, 16, 72), (6, 1, 12)])
def test_the_kernel_is_the_formula(shape, causal, dtype):
    """Result and gradients at most twice as far from float64 as the plain formula of the same dtype."""
    inputs, bounds, gradient = problem(*shape, dtype, DEVICE)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    truth = with_gradients(reference_varlen, wide, bounds, causal, gradient=gradient.double())
    plain = with_gradients(reference_varlen, inputs, bounds, causal, gradient=gradient)
    ours = with_gradients(varlen_attention, inputs, bounds, max(LENGTHS), causal, gradient=gradient)
    for one, other, true in zip(ours, plain, truth):
        assert relative_error(one, true) <= 2 * relative_error(other, true)


@cuda_only
def test_the_host_does_not_wait():
    inputs, bounds, gradient = problem(4, 2, 64, torch.bfloat16, DEVICE)
    with_gradients(varlen_attention, inputs, bounds, max(LENGTHS), True, gradient=gradient)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradients(varlen_attention, inputs, bounds, max(LENGTHS), True, gradient=gradient)
    finally:
        torch.cuda.set_sync_debug_mode("default")
