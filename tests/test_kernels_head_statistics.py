"""head_statistics and its merge against the dense float64 reference."""

import importlib

import pytest
import torch
from kernels_util import VOCAB, LargestTensor, MatmulSettings, randn, relative_error

from vlsi_kernels import DEFAULT_WORKSPACE_BYTES, HeadStatistics, head_statistics, merge_head_statistics
from vlsi_kernels.head_statistics import reference_head_statistics

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TINY = 1  # bytes of workspace: the smallest chunks there are


@pytest.fixture(params=[None, TINY], ids=["default", "tiny_workspace"])
def workspace(request):
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory():
    """In deterministic mode PyTorch fills fresh memory with NaN, so that reading it unwritten shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def check(stats, hidden, weight, values, atol=2e-6, **options):
    truth = reference_head_statistics(hidden, weight, values, **options)
    assert stats.logsumexp.dtype == torch.float32
    size = max(1.0, float(truth.logsumexp.abs().max())) if truth.logsumexp.numel() else 1.0
    assert torch.allclose(stats.logsumexp.double(), truth.logsumexp, rtol=0, atol=atol * size)
    assert torch.allclose(stats.mean_logit.double(), truth.mean_logit, rtol=0, atol=2 * atol * size)
    if values is None:
        assert stats.expectation is None
    elif truth.expectation.numel():
        # float32 rounding of a logit (6e-8 of its size) is a relative change of its probability
        assert relative_error(stats.expectation, truth.expectation) < max(5e-6, 1.2e-7 * size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 3, 2), (7, 999, 33, 17), (300, 1025, 16, 40), (0, 70, 8, 5)])
def test_matches_reference(shape, dtype, workspace):
    n, v, dk, dv = shape
    hidden, weight, values = (randn(*s, seed=i, dtype=dtype) for i, s in enumerate([(n, dk), (v, dk), (v, dv)]))
    stats = head_statistics(hidden, weight, values, temperature=1.7, workspace_bytes=workspace)
    assert stats.expectation.shape == (n, dv)
    check(stats, hidden, weight, values, temperature=1.7)
    check(head_statistics(hidden, weight, workspace_bytes=workspace), hidden, weight, None)


@pytest.mark.parametrize("margin", [0.0, 16.0])
@pytest.mark.parametrize("growth", [0.5, 200.0])
def test_maximum_that_rises_along_the_vocabulary(growth, margin, monkeypatch):
    """Logits that grow from chunk to chunk: sums must follow the running maximum, also far beyond exp's range.

    A margin of 0 rescales at every growth, as devices other than the CPU always do.
    """
    # importlib: the package's attribute of that name is the function
    monkeypatch.setattr(importlib.import_module("vlsi_kernels.head_statistics"), "RESCALE_MARGIN", margin)
    v = 2000
    hidden = randn(5, 8, seed=0).abs()
    weight = torch.linspace(0, growth, v)[:, None] * torch.ones(8) + randn(v, 8, seed=1)
    values = randn(v, 6, seed=2)
    check(head_statistics(hidden, weight, values, workspace_bytes=TINY), hidden, weight, values)
    falling = weight.flip(0)
    check(head_statistics(hidden, falling, values, workspace_bytes=TINY), hidden, falling, values)


def test_rows_beyond_the_vocabulary_are_never_read():
    hidden, weight, values = randn(4, 8, seed=0), randn(640, 8, seed=1), randn(700, 3, seed=2)
    weight[600:], values[600:] = float("nan"), float("nan")
    stats = head_statistics(hidden, weight, values, vocab_size=600)
    check(stats, hidden, weight, values, vocab_size=600)


def test_strided_inputs():
    hidden, weight, values = randn(8, 6, seed=0).T, randn(8, 500, seed=1).T, randn(500, 10, seed=2)[:, ::2]
    check(head_statistics(hidden, weight, values, workspace_bytes=TINY), hidden, weight, values)


def test_options_of_users_do_not_lower_precision():
    """Autocast and a lowered float32 matmul precision must neither round the logits nor be changed by the call."""
    hidden, weight, values = randn(64, 96, seed=0), randn(700, 96, seed=1), randn(700, 16, seed=2)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), MatmulSettings() as settings:
            stats = head_statistics(hidden, weight, values)
        assert settings.seen == {("ieee", "ieee")}  # a device that has no shortcut would not show it in numbers
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")
    check(stats, hidden, weight, values)


def test_reference_impl_and_float64():
    hidden, weight, values = (randn(*s, seed=3, dtype=torch.float64) for s in [(3, 4), (50, 4), (50, 2)])
    dense = head_statistics(hidden, weight, values, impl="reference")
    streamed = head_statistics(hidden, weight, values)
    for a, b in zip(dense, streamed, strict=True):
        assert a.dtype == b.dtype == torch.float64
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    assert head_statistics(hidden.float(), weight.float(), impl="reference").logsumexp.dtype == torch.float32


def test_no_gradient():
    hidden = randn(3, 4, seed=0).requires_grad_()
    assert not head_statistics(hidden, randn(9, 4, seed=1)).logsumexp.requires_grad


def test_nothing_of_size_tokens_by_vocabulary():
    hidden, weight = randn(300, 8, seed=0), randn(VOCAB, 8, seed=1)
    with LargestTensor() as largest:
        head_statistics(hidden, weight, weight)
    assert largest.numel <= max(DEFAULT_WORKSPACE_BYTES["cpu"] // 8, weight.numel()) < 300 * VOCAB // 4


@pytest.mark.parametrize("with_values", [True, False])
def test_merge_of_ragged_shards_is_the_whole(with_values):
    hidden, weight, values = randn(9, 12, seed=0, scale=3.0), randn(1000, 12, seed=1), randn(1000, 7, seed=2)
    edges = [0, 1, 300, 301, 997, 1000]
    parts = [
        head_statistics(hidden, weight[a:b], values[a:b] if with_values else None)
        for a, b in zip(edges[:-1], edges[1:], strict=True)
    ]
    check(merge_head_statistics(parts), hidden, weight, values if with_values else None)
    only = merge_head_statistics(parts[:1])
    assert torch.equal(only.logsumexp, parts[0].logsumexp)


def test_merge_errors():
    one = head_statistics(randn(2, 3, seed=0), randn(5, 3, seed=1), randn(5, 3, seed=1))
    with pytest.raises(ValueError, match="at least one"):
        merge_head_statistics([])
    with pytest.raises(ValueError, match="some have none"):
        merge_head_statistics([one, HeadStatistics(one.logsumexp, one.mean_logit, None)])
    with pytest.raises(ValueError, match="differ in shape"):
        merge_head_statistics([one, HeadStatistics(*(t[:1] for t in one))])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"impl": "cuda"}, ValueError, "choose one of 'auto', 'torch', 'reference', 'triton'"),
        ({"vocab_size": 0}, ValueError, r"outside 1\.\.20"),
        ({"vocab_size": 21}, ValueError, r"outside 1\.\.20"),
        ({"vocab_size": 3.0}, TypeError, "int or None"),
        ({"temperature": 0.0}, ValueError, "above 0"),
        ({"temperature": float("nan")}, ValueError, "above 0"),
        ({"workspace_bytes": 0}, ValueError, "positive int"),
        ({"hidden": torch.zeros(2, 3, 4)}, ValueError, r"\[N, Dk\]"),
        ({"hidden": torch.zeros(2, 5)}, ValueError, "width 5"),
        ({"hidden": torch.zeros(2, 4, dtype=torch.int64)}, TypeError, "convert it"),
        ({"hidden": [1.0]}, TypeError, "torch.Tensor"),
        ({"values": torch.zeros(20)}, ValueError, r"\[V, Dv\]"),
        ({"weight": torch.zeros(0, 4)}, ValueError, "0 rows"),
        ({"weight": torch.zeros(20, 4, device="meta")}, ValueError, "one device"),
    ],
)
def test_bad_input(change, error, match):
    call = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(20, 4), "values": torch.zeros(25, 4)} | change
    with pytest.raises(error, match=match):
        head_statistics(**call)
