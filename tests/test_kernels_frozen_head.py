"""`FrozenHead`: the same results to the last bit, one conversion, and never the copy of another state of the head."""

import gc
import weakref

import pytest
import torch
from kernels_util import randn

from vlsi_kernels import (
    FrozenHead,
    head_statistics,
    layer_kl_matrix,
    linear_cross_entropy,
    linear_divergence,
    linear_logsumexp,
    teacher_targets,
)
from vlsi_kernels import frozen_head as module

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
V, DS, DL, S, L, N = 700, 12, 20, 2, 3, 5


def numbers(*shape, seed, dtype=torch.bfloat16):
    return randn(*shape, seed=seed, dtype=dtype).to(DEVICE)


def results(frozen, impl, dtype, **options):
    """All operators that take a student's head, and their gradients."""
    student, teacher = (numbers(*shape, seed=i, dtype=dtype) for i, shape in enumerate(((S, N, DS), (L, N, DL))))
    heads = [numbers(V, width, seed=width, dtype=dtype) for width in (DS, DL)]
    student_head = FrozenHead(heads[0]) if frozen else heads[0]
    labels = torch.arange(S * N, device=DEVICE) * 7 % 600
    options = {"impl": impl, "vocab_size": 650, "workspace_bytes": 1} | options
    student.requires_grad_()
    flat = student.flatten(0, 1)
    targets = teacher_targets(teacher, heads[1], student_head, **options)
    taught = [*head_statistics(teacher.flatten(0, 1), heads[1], student_head, **options), *targets[:2]]
    losses = [
        layer_kl_matrix(student, student_head, targets, **options).sum(),
        linear_logsumexp(flat, student_head, **options).sum(),
        linear_cross_entropy(flat, student_head, labels, **options),
        *(linear_divergence(flat[:5], student_head, teacher[0], heads[1], beta=b, **options) for b in (0.0, 0.4, 1.0)),
    ]
    gradients = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in losses]
    return [t.detach() for t in (*taught, *losses, *gradients)], student_head


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_results_are_the_same_to_the_last_bit(impl, dtype):
    plain, _ = results(False, impl, dtype)
    frozen, head = results(True, impl, dtype)
    assert len(plain) == 17
    for one, other in zip(plain, frozen, strict=True):
        assert torch.equal(one, other)
    assert (head._copy is not None) == (impl == "triton" and dtype == torch.bfloat16)


def test_one_conversion_for_all_passes(monkeypatch):
    """Of teacher and student, over several row blocks; as tensors each pass looks for a scale of its own."""
    made = []
    scale_of = module.scale_of
    monkeypatch.setattr(module, "scale_of", lambda *a: made.append(1) or scale_of(*a))
    results(True, "triton", torch.bfloat16)
    assert len(made) == 1
    results(False, "triton", torch.bfloat16)
    assert len(made) > 6


def test_the_copy_is_the_head_times_its_scale():
    weight = numbers(40, 6, seed=3) * 1e-20
    copy, scale = FrozenHead(weight).scaled(30)
    assert copy.dtype == torch.float16 and copy.shape == (30, 6)
    assert 2**9 <= float(copy.abs().max()) < 2**10 and float(torch.frexp(scale).mantissa) == 0.5
    torch.testing.assert_close(copy.double() / scale.double(), weight[:30].double(), rtol=0, atol=float(2**-12 / scale))


# ---- nothing stale ----


def changes():
    """What may happen to a head, by name: a function that changes `parameter` in place, or puts another there."""

    def add(parameter):
        parameter.add_(1.0)

    def of_a_view(parameter):
        parameter[3].mul_(-1.0)

    def through_detached(parameter):
        parameter.detach().neg_()

    def another_storage(parameter):
        parameter.data = parameter.data.flip(0)

    def emptied_and_filled(parameter):  # as ZeRO-3 does: the new storage may lie where the old one was
        wanted = -parameter.data
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=DEVICE)
        parameter.data = wanted

    def shape(parameter):
        parameter.data = parameter.data.repeat(2, 1)[5:]

    def step(parameter):
        torch.optim.SGD([parameter], lr=1.0).step()

    return [add, of_a_view, through_detached, another_storage, emptied_and_filled, shape, step]


@pytest.mark.parametrize("change", changes(), ids=lambda f: f.__name__)
def test_a_changed_head_is_converted_again(change):
    weight = torch.nn.Parameter(numbers(V, DS, seed=1), requires_grad=False)
    weight.grad = torch.ones_like(weight)
    head, teacher, hidden = FrozenHead(weight), numbers(V, DL, seed=2), numbers(L, N, DL, seed=3)
    before = teacher_targets(hidden, teacher, head, impl="triton")
    with torch.no_grad():
        change(weight)
    after = teacher_targets(hidden, teacher, head, impl="triton")
    expected = teacher_targets(hidden, teacher, weight, impl="triton")
    assert torch.equal(after.expectation, expected.expectation)
    assert not torch.equal(after.expectation, before.expectation)


def test_another_vocabulary_is_another_copy():
    """The scale is that of the rows that take part."""
    weight = numbers(V, DS, seed=1)
    weight[600:] *= 1e4
    head, hidden = FrozenHead(weight), numbers(N, DS, seed=2)
    for size in (600, V, 600):
        found = head_statistics(hidden, weight, head, vocab_size=size, impl="triton")
        expected = head_statistics(hidden, weight, weight, vocab_size=size, impl="triton")
        assert torch.equal(found.expectation, expected.expectation)
        assert head.scaled(size)[0].shape[0] == size


def test_storage_at_the_same_address_is_another():
    """Freed and allocated again at once, memory has the same address; the fingerprint tells the two apart."""
    weight = torch.nn.Parameter(numbers(V, DS, seed=1), requires_grad=False)
    head = FrozenHead(weight)
    head.scaled(V)
    before, address = head._made_of, weight.data_ptr()
    for _ in range(50):
        weight.data = torch.empty(0, dtype=torch.bfloat16, device=DEVICE)
        weight.data = torch.ones(V, DS, dtype=torch.bfloat16, device=DEVICE)
        if weight.data_ptr() == address:
            break
    copy, scale = head.scaled(V)
    assert head._made_of != before and torch.equal(copy, torch.full_like(copy, float(scale)))


def test_inference_tensors_are_converted_each_time():
    """PyTorch keeps no version of them."""
    with torch.inference_mode():
        head = FrozenHead(numbers(V, DS, seed=1))
        first, _ = head.scaled(V)
        head.weight.neg_()
        again, _ = head.scaled(V)
    assert torch.equal(again, -first)


def test_a_trained_head_is_refused():
    head = FrozenHead(torch.nn.Parameter(numbers(V, DS, seed=1)))
    hidden = numbers(N, DS, seed=2)
    for impl in ("torch", "triton", "reference"):
        for call in (
            lambda impl: head_statistics(hidden, head.weight.detach(), head, impl=impl),
            lambda impl: linear_logsumexp(hidden, head, impl=impl),
            lambda impl: linear_divergence(hidden, head, hidden, head.weight.detach(), impl=impl),
            lambda impl: teacher_targets(hidden[None], head.weight.detach(), head, impl=impl),
        ):
            with pytest.raises(ValueError, match="requires a gradient, so it is trained; pass the weight itself"):
                call(impl)
    with pytest.raises(TypeError, match="torch.Tensor, got list"):
        FrozenHead([1.0])


# ---- how long it lives ----


def test_memory_is_given_back():
    """By `clear` and with the object, also while a graph of its losses waits for backward."""
    weight, hidden = numbers(V, DS, seed=1), numbers(N, DS, seed=2).requires_grad_()
    head = FrozenHead(weight)
    copy = weakref.ref(head.scaled(V)[0])
    losses = [linear_cross_entropy(hidden, head, torch.arange(N, device=DEVICE), impl="triton")]
    losses.append(linear_divergence(hidden, head, hidden.detach(), weight, beta=0.5, impl="triton"))
    targets = teacher_targets(hidden.detach()[None], weight, head, impl="triton")
    losses.append(layer_kl_matrix(hidden[None], head, targets, impl="triton").sum())
    assert copy() is not None
    head.clear()
    gc.collect()
    assert copy() is None
    again = weakref.ref(head.scaled(V)[0])
    del head
    gc.collect()
    assert again() is None
    sum(losses).backward()


def test_frozen_heads_in_compiled_code():
    """The operators are graph breaks; a FrozenHead goes through like the tensor that it stands for."""
    weight, hidden = numbers(V, DS, seed=1), numbers(N, DS, seed=2)
    head, labels = FrozenHead(weight), torch.arange(N, device=DEVICE)

    def step(head):
        return linear_cross_entropy(hidden * 2, head, labels, impl="triton")

    assert torch.equal(torch.compile(step, backend="aot_eager")(head), step(weight))
