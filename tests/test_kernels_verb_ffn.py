"""verb_ffn against the float64 reference, for single and stacked weights, with and without a norm in front.

Triton's kernels run on CUDA where there is one, else on the CPU in Triton's interpreter.
"""

import importlib

import pytest
import torch
from kernels_util import randn, relative_error
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from vlsi_kernels import _common, rms_norm, verb_ffn
from vlsi_kernels._launch import launch_kernel
from vlsi_kernels._triton import triton
from vlsi_kernels.rms_norm import NormOptions, RMSNorm
from vlsi_kernels.verb_ffn import reference_verb_ffn

operator = importlib.import_module("vlsi_kernels.verb_ffn")  # the package's attribute of that name is the function

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
needs_triton = pytest.mark.skipif(triton is None, reason="Triton is not installed")
IMPLS = ["torch", pytest.param("triton", marks=needs_triton)]
NAMES = ("x", "gate", "up", "down", "norm_weight")

SINGLE = ((5, 12), (20, 12), (20, 12), (7, 20))
CASES = {
    "one_layer": SINGLE,
    "vector": ((12,), *SINGLE[1:]),
    "batch": ((2, 3, 12), *SINGLE[1:]),
    "no_tokens": ((0, 12), *SINGLE[1:]),
    "stacked": ((3, 5, 12), (3, 20, 12), (3, 20, 12), (3, 7, 20)),
    "stacked_batch": ((3, 2, 4, 12), (3, 20, 12), (3, 20, 12), (3, 7, 20)),
    "stacked_no_tokens": ((3, 0, 12), (3, 20, 12), (3, 20, 12), (3, 7, 20)),
    "stack_of_one_row": ((1, 1, 12), (1, 20, 12), (1, 20, 12), (1, 7, 20)),
    "even": ((19, 48), (80, 48), (80, 48), (32, 80)),  # multiples of 16: the tiles of real models
}
# Least error that is asked for: half a unit in the last place, but two for float32, which is what exp and division are
# good to on a GPU and in NumPy. It matters for tensors of a few numbers, where plain PyTorch may be exact by luck.
FLOOR = {dtype: torch.finfo(dtype).eps * (2 if dtype == torch.float32 else 0.5) for dtype in DTYPES}


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def launches(monkeypatch):
    """Every launch of a kernel: (kernel, grid, arguments, launch)."""
    seen = []

    def record(kernel, grid, arguments, config, device):
        seen.append((kernel, grid, arguments, config))
        launch_kernel(kernel, grid, arguments, config, device)

    for module in (operator, rms_norm):
        monkeypatch.setattr(module, "launch_kernel", record)
    return seen


def make(shapes, dtype, device="cpu", norm=None):
    """x, gate, up, down and, with norm "shared" or "own" (one a layer), the norm's weight; all leaves."""
    tensors = [randn(*s, seed=i, dtype=dtype, scale=1.0 if i == 0 else s[-1] ** -0.5) for i, s in enumerate(shapes)]
    if norm is not None:
        stacked = norm == "own" and len(shapes[1]) == 3
        size = (shapes[1][0], shapes[1][-1]) if stacked else shapes[1][-1:]
        tensors.append((1 + randn(*size, seed=5, scale=0.3)).to(dtype))
    return [t.to(device).requires_grad_() for t in tensors]


def tensors(case, dtype, device="cpu", norm=None):
    return make(CASES[case], dtype, device, norm)


def call(function, inputs, **options):
    x, gate, up, down, *norm = inputs
    return function(x, gate, up, down, norm_weight=norm[0] if norm else None, **options)


def qwen_norm(x, weight):
    """transformers' own, with one weight, or one a layer of axis 0."""
    if weight.dim() == 2:
        return torch.stack([qwen_norm(a, b) for a, b in zip(x, weight)])
    module = Qwen2RMSNorm(len(weight), eps=1e-6)
    del module.weight
    module.weight = weight
    return module(x)


def plain_verb_ffn(x, gate, up, down, norm_weight=None):
    """What one would write in PyTorch, in the dtype of the inputs."""
    x = x if norm_weight is None else qwen_norm(x, norm_weight)
    rows = x.flatten(1, -2) if gate.dim() == 3 else x
    y = (torch.nn.functional.silu(rows @ gate.mT) * (rows @ up.mT)) @ down.mT
    return y.reshape(*x.shape[:-1], -1) if y.numel() else y.reshape(*x.shape[:-1], down.shape[-2])


def check(inputs, **options):
    """Output and gradients: error at most twice that of plain PyTorch in the same dtype."""
    dtype = inputs[0].dtype
    ours = call(verb_ffn, inputs, **options)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    plain = [t.detach().clone().requires_grad_() for t in inputs]
    true, same = call(reference_verb_ffn, wide), call(plain_verb_ffn, plain)
    assert ours.shape == true.shape and ours.dtype == dtype
    if not ours.numel():
        gradients = torch.autograd.grad(ours.sum(), inputs)
        assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(gradients, inputs))
        return
    upstream = randn(*true.shape, seed=9, dtype=dtype).to(ours.device)
    results = [(ours, inputs, upstream), (same, plain, upstream), (true, wide, upstream.double())]
    outputs, gradients = [r[0] for r in results], [torch.autograd.grad(*r) for r in results]
    for name, value, baseline, expected in zip(("y", *NAMES), *([o, *g] for o, g in zip(outputs, gradients))):
        error, bar = relative_error(value, expected), 2 * max(relative_error(baseline, expected), FLOOR[dtype])
        assert error <= bar, f"{name}: {error:.1e}, at most {bar:.1e}"


NORMS = [(c, n) for c in CASES for n in (None, "shared", "own") if n != "own" or "stack" in c]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("case", "norm"), NORMS)
def test_value_and_gradients(case, norm, dtype, impl, device):
    check(tensors(case, dtype, device, norm), impl=impl)


# the tiles of "hopper", and those of "other" that differ
TILES = [
    (tile, dtype)
    for tile, launch in operator._GATE_UP.items()
    for dtype in DTYPES
    if dtype.itemsize == tile[0] and (tile[2] == "hopper" or launch != operator._GATE_UP[(*tile[:2], "hopper")])
]


@needs_triton
@pytest.mark.parametrize(("tile", "dtype"), TILES, ids=lambda v: "-".join(map(str, v)) if type(v) is tuple else None)
def test_every_tile(tile, dtype, device, monkeypatch):
    """Two layers of more rows, hidden units and columns than a tile has, all ragged."""
    launch = operator._GATE_UP[tile]
    if tile[2] == "hopper" and launch != operator._GATE_UP[(*tile[:2], operator._gpu_kind(device))]:
        pytest.skip("more shared memory than this GPU has")
    monkeypatch.setattr(operator, "_gate_up_launch", lambda *_: launch)
    check(make(((2, 150, 70), (2, 141, 70), (2, 141, 70), (2, 9, 141)), dtype, device), impl="triton")


@needs_triton
def test_choice_of_tile():
    """Many rows: large tiles; few, or too few tiles to fill a GPU: small ones; odd widths of 2 bytes: their own."""
    for kind in ("hopper", "other"):
        for layers, rows, even, itemsize, name in (
            (1, 4096, True, 2, "many"),
            (20, 64, True, 2, "few"),
            (1, 200, True, 2, "few"),
            (7, 200, True, 2, "many"),
            (1, 4096, False, 2, "ragged"),
            (1, 4096, False, 4, "many"),
            (1, 1, False, 4, "few"),
        ):
            chosen = operator._gate_up_launch(layers, rows, 3584, even, itemsize, kind)
            assert chosen is operator._GATE_UP[itemsize, name, kind], (kind, layers, rows, name)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_long_rows(dtype, device):
    """A row of more than one block, and more rows than one program sums."""
    x, weight = randn(66, 2100, seed=0, dtype=dtype, scale=3.0), 1 + randn(2100, seed=1, scale=0.3)
    inputs = [t.to(device, dtype).requires_grad_() for t in (x, weight)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    plain = [t.detach().clone().requires_grad_() for t in inputs]
    upstream = randn(66, 2100, seed=2, dtype=dtype).to(device).T.contiguous().T
    ours = RMSNorm.apply(*inputs, NormOptions(triton=True, eps=1e-6))
    same = qwen_norm(*plain)
    true = wide[0] * (wide[0].square().mean(-1, keepdim=True) + 1e-6).rsqrt() * wide[1]
    results = [(ours, inputs, upstream), (same, plain, upstream), (true, wide, upstream.double())]
    gradients = [torch.autograd.grad(*r) for r in results]
    again = torch.autograd.grad(RMSNorm.apply(*inputs, NormOptions(triton=True, eps=1e-6)), inputs, upstream)
    assert all(torch.equal(a, b) for a, b in zip(gradients[0], again)), "the same sums, in the same order"
    for value, baseline, expected in zip(*([r[0], *g] for r, g in zip(results, gradients))):
        assert relative_error(value, expected) <= 2 * max(relative_error(baseline, expected), FLOOR[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_norm_is_transformers_norm_bit_for_bit(impl, dtype, device):
    """For Triton with squares that sum exactly: it rounds at the same places, but sums in an order of its own."""
    options = NormOptions(impl == "triton", eps=1e-6)
    for rows, width in ((33, 64), (9, 37), (5, 2048)):
        x, weight = randn(rows, width, seed=1, scale=4.0), 1 + randn(width, seed=2, scale=0.3)
        if impl == "triton":
            if width & (width - 1):  # a mean that is no exact product: PyTorch on CPU and on CUDA differ as well
                continue
            x = (x * 4).round() / 4
        x, weight = x.to(device, dtype), weight.to(device, dtype)
        ours = RMSNorm.apply(x, weight, options)
        assert ours.dtype == dtype
        assert torch.equal(ours, qwen_norm(x, weight))


@pytest.mark.parametrize("case", ["one_layer", "stacked"])
def test_gradcheck_float64(case):
    torch.autograd.gradcheck(verb_ffn, tensors(case, torch.float64))
    for norm in ("shared", "own"):
        inputs = tensors(case, torch.float64, norm=norm)
        torch.autograd.gradcheck(lambda *t: call(verb_ffn, t, impl="torch"), inputs)


@pytest.mark.parametrize("impl", IMPLS)
def test_partial_gradients(impl, device):
    dtype = torch.float64 if impl == "torch" else torch.float32
    for wanted in range(5):
        inputs = tensors("one_layer", dtype, device, norm="shared")
        full = torch.autograd.grad(call(verb_ffn, inputs, impl=impl).square().sum(), inputs)
        alone = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(inputs)]
        call(verb_ffn, alone, impl=impl).square().sum().backward()
        assert [t.grad is not None for t in alone] == [i == wanted for i in range(5)]
        assert torch.allclose(alone[wanted].grad, full[wanted])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_and_up_are_kept_for_gradients_alone(dtype, device, launches):
    inputs = tensors("stacked", dtype, device)
    kept = verb_ffn(*inputs, impl="triton")
    with torch.no_grad():
        frozen = verb_ffn(*inputs, impl="triton")
    detached = verb_ffn(*(t.detach() for t in inputs), impl="triton")
    written = [[arguments[i] is not None for i in (3, 4, 5)] for _, _, arguments, _ in launches]
    assert written == [[True] * 3, [True, False, False], [True, False, False]]
    assert torch.equal(kept, frozen) and torch.equal(kept, detached)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_finds_the_same_a(dtype, device):
    a, g, u = operator._triton_gate_up(*(t.detach() for t in tensors("even", dtype, device)[:3]), keep=True)
    assert torch.equal(operator._triton_swiglu_backward(None, g, u, need_a=True)[2], a)


@needs_triton
def test_empty_grids_are_not_launched(device):
    config = operator._SWIGLU_BACKWARD
    launch_kernel(None, (0,), (), config, device)
    launch_kernel(None, (3, 0), (), config, device)
    with pytest.raises(TypeError):
        launch_kernel(None, (1,), (), config, device)


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
def test_strided_inputs_and_reference_impl(impl, device):
    x, gate, up, down, norm = tensors("stacked", torch.float32, device, norm="own")
    room = torch.full((3, 30, 40), float("nan"), device=device)  # what lies between the numbers must not be read
    wide_up, wide_norm = room.clone(), room[:, 0].clone()
    wide_up[:, 3:23, 5:17], wide_norm[:, ::3][:, :12] = up.detach(), norm.detach()
    strided = verb_ffn(
        x.transpose(0, 1).contiguous().transpose(0, 1),
        gate.mT.contiguous().mT,
        wide_up[:, 3:23, 5:17],
        down,
        norm_weight=wide_norm[:, ::3][:, :12],
        impl=impl,
    )
    dense = verb_ffn(x, gate, up, down, norm_weight=norm, impl="reference")
    assert dense.dtype == torch.float32
    assert torch.allclose(strided, dense, atol=1e-5)
    upstream = randn(*dense.shape, seed=3).to(device).mT.contiguous().mT
    for a, b in zip(
        torch.autograd.grad(strided, [x, gate, down], upstream), torch.autograd.grad(dense, [x, gate, down], upstream)
    ):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_that_repeat_one_row(impl, device):
    """Strides of 0, as expand makes them, in inputs and in the upstream gradient."""
    x, gate, up, down = tensors("stacked", torch.float32, device)
    spread = verb_ffn(x[:1, :1].expand(3, 5, 12), gate, up[:1].expand(3, 20, 12), down, impl=impl)
    dense = verb_ffn(x[:1, :1].repeat(3, 5, 1), gate, up[:1].repeat(3, 1, 1), down, impl=impl)
    assert torch.allclose(spread, dense, atol=1e-6)
    one = torch.ones((), device=device)
    gradients = [torch.autograd.grad(y, [x, up], one.expand(y.shape)) for y in (spread, dense)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients))


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs 5 GB of GPU memory")
def test_offsets_beyond_int32():
    apart = 2**31 + 64  # elements between two layers, then between two rows
    memory = torch.zeros(apart + 4096, dtype=torch.bfloat16, device="cuda")
    x = memory.as_strided((2, 16, 64), (apart, 64, 1))
    x.copy_(randn(2, 16, 64, seed=0))
    _, gate, up, down, norm = make(((2, 1, 64), (2, 48, 64), (2, 48, 64), (2, 32, 48)), torch.bfloat16, "cuda", "own")
    far = verb_ffn(x, gate, up, down, norm_weight=norm, impl="triton")
    assert torch.equal(far, verb_ffn(x.clone(), gate, up, down, norm_weight=norm, impl="triton"))
    rows = memory.as_strided((2, 64), (apart, 1))
    far = verb_ffn(rows, gate[0], up[0], down[0], norm_weight=norm[0], impl="triton")
    assert torch.equal(far, verb_ffn(rows.clone(), gate[0], up[0], down[0], norm_weight=norm[0], impl="triton"))


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_converts_like_a_linear_layer(impl, device):
    inputs = tensors("one_layer", torch.float32, device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = verb_ffn(*inputs, impl=impl)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in inputs)
    assert relative_error(out, reference_verb_ffn(*inputs)) < 2e-2


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLS)
def test_norm_under_autocast_is_a_module_in_front(impl, hidden_dtype, device):
    """The norm sees x and its float32 weight as they are; only its result is converted."""
    x, gate, up, down, norm = tensors("stacked", torch.float32, device, norm="shared")
    x = x.detach().mul(4).round().div(4).to(hidden_dtype).requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ours = verb_ffn(x, gate, up, down, norm_weight=norm, impl=impl)
        same = verb_ffn(qwen_norm(x, norm), gate, up, down, impl=impl)
    assert ours.dtype == torch.bfloat16
    # twelve columns: Triton's mean may differ in its last bit, and so, rarely, a bfloat16 behind it
    assert torch.equal(ours, same) if impl == "torch" else relative_error(ours, same) < 2e-3
    leaves = [x, gate, norm]
    gradients = [torch.autograd.grad(y.float().square().sum(), leaves) for y in (ours, same)]
    for a, b, leaf in zip(*gradients, leaves):
        assert a.dtype == leaf.dtype
        assert relative_error(a, b) < 1e-2  # bfloat16, rounded once more or once less


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("norm", [None, "shared"])
def test_compiled_function_is_the_eager_one(impl, norm, device):
    def function(*inputs):
        x, *rest = inputs
        return call(verb_ffn, [x * 2, *rest], impl=impl).sin()

    torch.compiler.reset()
    inputs = tensors("stacked", torch.float32, device, norm)
    results = []
    for f in (function, torch.compile(function, backend="aot_eager")):
        y = f(*inputs)
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    torch.compiler.reset()
    assert all(torch.equal(a, b) for a, b in zip(*results))


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
        ({"impl": "x"}, ValueError, "choose one of"),
        ({"norm_weight": torch.zeros(11)}, ValueError, r"must be \[12\]"),
        ({"norm_weight": torch.zeros(3, 12)}, ValueError, r"norm_weight must have shape \[Din\]"),
        ({"norm_weight": torch.zeros(12, dtype=torch.float16)}, ValueError, "norm_weight is torch.float16; convert"),
        ({"norm_weight": torch.zeros(12, device="meta")}, ValueError, "one device"),
        ({"norm_weight": torch.zeros(12), "norm_eps": 0.0}, ValueError, "above 0"),
        ({"norm_weight": torch.zeros(12), "norm_eps": float("nan")}, ValueError, "finite"),
        ({"norm_weight": [1.0] * 12}, TypeError, "norm_weight must be a torch.Tensor"),
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
    with pytest.raises(ValueError, match=r"must be \[12\] or \[3, 12\]"):
        verb_ffn(x, gate, up, down, norm_weight=torch.zeros(2, 12))


@needs_triton
def test_float64_is_not_for_triton(device, launches):
    inputs = tensors("one_layer", torch.float64, device)
    with pytest.raises(TypeError, match='impl="auto" or "torch" for float64'):
        verb_ffn(*inputs, impl="triton")
    assert verb_ffn(*inputs).dtype == torch.float64 and not launches


@needs_triton
def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setattr(_common, "interpreted", lambda: False)
    with pytest.raises(ValueError, match="CUDA device"):
        verb_ffn(*tensors("one_layer", torch.float32), impl="triton")
