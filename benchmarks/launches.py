"""What the public operators launch: calls of all of them, at sizes of real models and at ragged ones.

Tensors are on a GPU that is not there (`vlsi_fast.planner.dry_run`): they have shapes and strides and no numbers, so
that sizes cost nothing. What is launched, and how, is the operators' own doing; nothing of it is repeated here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from shapes import BACKBONES, RAGGED, Backbone
from torch import Tensor

from vlsi_fast.planner.dry_run.device import on, require_torch
from vlsi_fast.planner.dry_run.gpus import GPUS
from vlsi_fast.planner.dry_run.tape import Tape
from vlsi_kernels import (
    head_statistics,
    layer_kl_matrix,
    linear_cross_entropy,
    linear_divergence,
    linear_logsumexp,
    teacher_targets,
    verb_ffn,
)
from vlsi_kernels._resources import Build, recording

FEW = 40
"""Answer tokens of a short micro-batch: kernels take smaller tiles."""
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ODD = Backbone(100, 203, 2, 2, 2, 1003, False, (1, 2))
"""No model: widths and vocabulary that 16 does not divide."""


@dataclass(frozen=True)
class Call:
    """One call of an operator, backward included."""

    name: str
    run: Callable[[], object]
    wide: bool = True
    """Whether memory must be read or written 16 bytes at once: widths and vocabulary are those of models."""


Named = Iterator[tuple[str, Callable[[], object]]]


def empty(*size: int, dtype: torch.dtype = BF16, grad: bool = False) -> Tensor:
    """A tensor on the GPU that is not there."""
    return torch.empty(*size, dtype=dtype, device="cuda").requires_grad_(grad)


def of_heads(
    student: Backbone, teacher: Backbone, tokens: int, dtype: torch.dtype, hidden_dtype: torch.dtype | None = None
) -> Named:
    """Vocabulary operators, for every set of inputs that may ask for a gradient; heads in `dtype`."""
    vocab, hidden_dtype = min(student.vocab, teacher.vocab), hidden_dtype or dtype
    ids = torch.empty(tokens, dtype=torch.long, device="cuda")
    student_layers, teacher_layers = (len(model.target_layers) + 1 for model in (student, teacher))

    def head(model: Backbone, grad: bool = False) -> Tensor:
        return empty(model.vocab, model.width, dtype=dtype, grad=grad)

    def hidden(model: Backbone, *layers: int, grad: bool = False) -> Tensor:
        return empty(*layers, tokens, model.width, dtype=hidden_dtype, grad=grad)

    def statistics(with_values: bool) -> None:
        head_statistics(hidden(teacher), head(teacher), head(student) if with_values else None, vocab_size=vocab)

    def entropy(grads: tuple[bool, bool], labels: bool) -> None:
        x, weight = hidden(student, grad=grads[0]), head(student, grads[1])
        backward(linear_cross_entropy(x, weight, ids) if labels else linear_logsumexp(x, weight))

    def pairs(grad: bool) -> None:
        spoken, weight = hidden(teacher, teacher_layers), head(student)
        targets = teacher_targets(spoken, head(teacher), weight, vocab_size=vocab)
        backward(layer_kl_matrix(hidden(student, student_layers, grad=grad), weight, targets))

    def divergence(grads: tuple[bool, bool], beta: float) -> None:
        pair = hidden(student, grad=grads[0]), head(student, grads[1])
        backward(linear_divergence(*pair, hidden(teacher), head(teacher), beta=beta, vocab_size=vocab))

    both = list(itertools.product((True, False), repeat=2))
    for with_values in (True, False):
        yield "head_statistics", partial(statistics, with_values)
    for grads, labels in itertools.product(both, (True, False)):
        yield "linear_cross_entropy" if labels else "linear_logsumexp", partial(entropy, grads, labels)
    for grad in (True, False):
        yield "layer_kl_matrix", partial(pairs, grad)
    for grads, beta in itertools.product(both, (0.0, 0.5, 1.0)):
        yield "linear_divergence", partial(divergence, grads, beta)


TRAINED = ((1, 2, 3, 4), (0,), (3,), (4,), (0, 1, 2, 3, 4), ())
"""Which of x, gate, up, down and norm ask for a gradient: the network, what is in front of it, its last product alone,
its norm alone, all, nothing."""


def of_networks(model: Backbone, tokens: int, dtype: torch.dtype, autocast: torch.dtype | None = None) -> Named:
    """The verbalizers' network: all layers at once and one alone, with the norm in front and without."""

    def network(layers: int, trained: tuple[int, ...], norm: bool) -> None:
        sizes = [(tokens, model.width), *[(model.width, model.width)] * 3, (model.width,)]
        lead = (layers,) if layers > 1 else ()
        dtypes = [autocast or dtype, *[dtype] * 4]
        x, *weights, own = (
            empty(*lead, *size, dtype=kind, grad=i in trained) for i, (size, kind) in enumerate(zip(sizes, dtypes))
        )
        with torch.autocast("cuda", autocast) if autocast else nullcontext():
            result = verb_ffn(x, *weights, norm_weight=own if norm else None)
        backward(result)

    for layers, trained, norm in itertools.product((len(model.target_layers), 1), TRAINED, (True, False)):
        yield "verb_ffn", partial(network, layers, trained, norm)


def backward(result: Tensor) -> None:
    """Gradients, where any input asks for one."""
    if result.requires_grad:
        result.sum().backward()


def calls() -> Iterator[Call]:
    """Everything that the compile check looks at. To be used where tensors on `cuda` are those that are not there."""
    small, middle = BACKBONES["2b"], BACKBONES["7b"]
    for teacher, student, tokens in (("72b", "7b", 4096), ("7b", "2b", RAGGED), ("7b", "0.5b", 512)):
        models = [BACKBONES[name] for name in (student, teacher)]
        yield from named(f"{teacher}-to-{student}:{tokens} bf16", of_heads(*models, tokens, BF16))
        for name in (student, teacher):
            yield from named(f"{name}:{tokens} bf16", of_networks(BACKBONES[name], tokens, BF16))
    for dtype, name in ((FP16, "fp16"), (FP32, "fp32")):
        yield from named(f"7b-to-2b:{RAGGED} {name}", of_heads(small, middle, RAGGED, dtype))
        for tokens in (RAGGED, FEW):
            yield from named(f"2b:{tokens} {name}", of_networks(small, tokens, dtype))
    yield from named(f"2b:{FEW} bf16", of_networks(small, FEW, BF16))
    # autocast: trained weights in float32, and what a module in front left in float32
    yield from named(f"7b-to-2b:{RAGGED} fp32 by bf16", of_heads(small, middle, RAGGED, BF16, FP32))
    yield from named(f"2b:{RAGGED} autocast", of_networks(small, RAGGED, FP32, BF16))
    for tokens, dtype, name in ((7, BF16, "bf16"), (1, FP32, "fp32")):
        yield from named(f"odd:{tokens} {name}", of_heads(ODD, ODD, tokens, dtype), wide=False)
        yield from named(f"odd:{tokens} {name}", of_networks(ODD, tokens, dtype), wide=False)


def named(where: str, found: Named, wide: bool = True) -> Iterator[Call]:
    """The same calls, with sizes in their names."""
    for name, run in found:
        yield Call(f"{name} {where}", run, wide)


@dataclass(frozen=True)
class Recorded:
    """What was launched for one compute capability."""

    builds: dict[Build, Call]
    """Build -> the call that launched it first."""
    stopped: dict[str, str]
    """Call -> what stopped it: a kernel that does not compile, or wants more shared memory than there is."""


def record(capability: int, found: Callable[[], Iterator[Call]] = calls, only: str = "") -> Recorded:
    """Make all calls whose name contains `only`, for a GPU of that compute capability.

    Raises:
        ValueError: no GPU of that capability is known.
        RuntimeError: TRITON_INTERPRET is set.
        TorchChangedError: this torch lacks what tensors on a GPU that is not there rest on.
    """
    require_torch()
    gpu = next((gpu for gpu in GPUS.values() if gpu.target == capability), None)
    if gpu is None:
        raise ValueError(f"no GPU of compute capability {capability} is known: add one to dry_run/gpus.py")
    first: dict[Build, Call] = {}
    stopped: dict[str, str] = {}
    here: Call | None = None
    with recording(capability, lambda build, _: first.setdefault(build, here)), on(gpu, Tape()):
        for here in found():
            if only not in here.name:
                continue
            try:
                here.run()
            except Exception as error:  # whatever the compiler raises: the other calls are still worth a look
                stopped[here.name] = f"{type(error).__name__}: {error}"
    return Recorded(first, stopped)
