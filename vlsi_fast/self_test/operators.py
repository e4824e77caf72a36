"""Probes of `vlsi_kernels`, against the dense float64 references beside the operators.

Widths are those of the run, since kernels are compiled for them. Tokens and vocabulary are few and ragged; the
vocabulary has two tiles or chunks, and rows behind `vocab_size` that hold NaN, since no operator may read them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlsi_kernels import layer_kl_matrix, linear_cross_entropy, linear_divergence, teacher_targets, verb_ffn
from vlsi_kernels.layer_kl import reference_layer_kl
from vlsi_kernels.linear_cross_entropy import reference_linear_cross_entropy
from vlsi_kernels.linear_divergence import reference_linear_divergence

from .probe import GATED_SLACK, Inputs, Probe

TOKENS, MANY_TOKENS = 33, 1259
"""The second is enough for verb_ffn's large tiles."""
VOCABULARY, PADDING = 9203, 5
MOST_INNER = 1040
"""Of a feed-forward network, enough for its large tiles: the rest would be more of the same."""


def layer_kl(student: int, teacher: int, dtype, impl: str, temperature: float = 1.0, vocabulary=VOCABULARY) -> Probe:
    """`teacher_targets` and `layer_kl_matrix`, of 2 student and 3 teacher layers of these widths."""
    options = {"vocab_size": vocabulary, "temperature": temperature}

    def inputs(generator: torch.Generator) -> Inputs:
        return {
            "student": _hidden(generator, 2, TOKENS, student),
            "student_head": _head(generator, vocabulary, student),
            "teacher": _hidden(generator, 3, TOKENS, teacher),
            "teacher_head": _head(generator, vocabulary, teacher),
        }

    def fast(student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
        targets = teacher_targets(teacher, teacher_head, student_head, **options, impl=impl)
        return layer_kl_matrix(student, student_head, targets, **options, impl=impl)

    def plain(student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
        return reference_layer_kl(student, student_head, teacher, teacher_head, **options).mean(-1)

    name = f"layer_kl_matrix, widths {student} and {teacher}"
    return Probe(name, "impl", impl, dtype, inputs, fast, plain, ("student",))


def cross_entropy(width: int, dtype, impl: str, trained_head: bool, vocabulary=VOCABULARY) -> Probe:
    """`linear_cross_entropy`; with the head's gradient where that is trained."""

    def inputs(generator: torch.Generator) -> Inputs:
        labels = torch.randint(vocabulary, (TOKENS,), generator=generator, device=generator.device)
        labels[::7] = -100
        head = _head(generator, vocabulary, width, 0 if trained_head else PADDING)
        return {"hidden": _hidden(generator, TOKENS, width), "head": head, "labels": labels}

    def fast(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, head, labels, reduction="none", vocab_size=vocabulary, impl=impl)

    def plain(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        return reference_linear_cross_entropy(hidden, head, labels, vocab_size=vocabulary)

    name = f"linear_cross_entropy, width {width}{', trained head' if trained_head else ''}"
    return Probe(name, "impl", impl, dtype, inputs, fast, plain, ("hidden", "head") if trained_head else ("hidden",))


def divergence(
    student: int, teacher: int, dtype, impl: str, beta: float, temperature: float = 1.0, vocabulary=VOCABULARY
) -> Probe:
    """`linear_divergence`, as `interact.divergence` asks for it."""
    options = {"beta": beta, "temperature": temperature, "vocab_size": vocabulary}

    def inputs(generator: torch.Generator) -> Inputs:
        return {
            "student": _hidden(generator, TOKENS, student),
            "student_head": _head(generator, vocabulary, student),
            "teacher": _hidden(generator, TOKENS, teacher),
            "teacher_head": _head(generator, vocabulary, teacher),
        }

    def fast(**tensors: Tensor) -> Tensor:
        return linear_divergence(*tensors.values(), **options, reduction="none", impl=impl)

    def plain(**tensors: Tensor) -> Tensor:
        return reference_linear_divergence(*tensors.values(), **options)

    name = f"linear_divergence (beta {beta:g}), widths {student} and {teacher}"
    return Probe(name, "impl", impl, dtype, inputs, fast, plain, ("student",))


def feed_forward(width: int, inner: int, out: int, dtype, impl: str, tokens: int = TOKENS) -> Probe:
    """`verb_ffn`, d -> inner -> out."""
    inner, out = min(inner, MOST_INNER), min(out, MOST_INNER)

    def inputs(generator: torch.Generator) -> Inputs:
        return {
            "x": _normal(generator, tokens, width),
            "gate": _normal(generator, inner, width, scale=width**-0.5),
            "up": _normal(generator, inner, width, scale=width**-0.5),
            "down": _normal(generator, out, inner, scale=inner**-0.5),
        }

    def fast(**tensors: Tensor) -> Tensor:
        return verb_ffn(**tensors, impl=impl)

    def plain(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    name = f"verb_ffn, width {width}{'' if out == width else f' to {out}'}, {tokens} tokens"
    learns = ("x", "gate", "up", "down")
    return Probe(name, "impl", impl, dtype, inputs, fast, plain, learns, slack=GATED_SLACK)


def _normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device) * scale


def _hidden(generator: torch.Generator, *shape: int) -> Tensor:
    return _normal(generator, *shape, scale=2.0)


def _head(generator: torch.Generator, rows: int, width: int, padding: int = PADDING) -> Tensor:
    """[rows + padding, width], logits of about the size of the hidden state's elements."""
    head = _normal(generator, rows + padding, width, scale=width**-0.5)
    head[rows:] = torch.nan
    return head
