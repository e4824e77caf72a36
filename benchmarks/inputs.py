"""Random inputs of each task, and the float64 truth for some of their tokens.

Inputs hold the regimes in which rounding decides: layers far apart, layers that nearly agree (KL
about 0.01), and layers that nearly agree with logits up to about 50. Padding rows of heads are NaN: no implementation
may read them, so peers get the rows before them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from shapes import Shape
from torch import Tensor

from vlsi_kernels.layer_kl import reference_layer_kl
from vlsi_kernels.linear_cross_entropy import reference_linear_cross_entropy

CHECKED_TOKENS = 16
"""Tokens, spread evenly, whose losses and gradients are compared with float64."""
SINGLE_TOKENS = 2
"""Of these, tokens whose loss is asked for alone: an operator that returns a mean must be called once for each."""
SPREAD, LARGE_SPREAD, NEAR = 2.0, 11.0, 0.14
"""Standard deviations of logits, in nats: usual, large (the largest near 50), and of the difference of near layers."""

Pair = tuple[int, int]


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth."""
    return ((value.double() - truth).norm() / truth.norm()).item()


def loss_error(value: Tensor, truth: Tensor) -> float:
    """Largest error, relative where the truth is above 1."""
    return ((value.double() - truth).abs() / truth.abs().clamp(min=1)).max().item()


def evenly(tokens: int, device: torch.device) -> Tensor:
    """[K] indices of the tokens that are checked, the first and the last among them."""
    count = min(tokens, CHECKED_TOKENS)
    return torch.linspace(0, tokens - 1, count, device=device).round().long()


def head(generator: torch.Generator, rows: int, width: int, vocab: int, scale: float, dtype: torch.dtype) -> Tensor:
    """[rows, width] language head; its padding rows, from `vocab` on, are NaN."""
    weight = torch.randn(rows, width, generator=generator, device=generator.device, dtype=dtype)
    weight.mul_(scale)
    weight[vocab:] = math.nan
    return weight


class LayerProblem:
    """S student and L teacher layers. Pairs `matched[0]` are near, `matched[1]` near with large logits; others far."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0):
        self.shape, self.device, self.dtype = shape, device, dtype
        s, l, n = shape.student_layers, shape.teacher_layers, shape.tokens
        ds, dl, self.vocab = shape.student_width, shape.teacher_width, shape.vocab
        self.matched: list[Pair] = [(i, i + (l - s) // 2) for i in range(s)]
        """One pair a student layer, ordered: what Algorithm 1 might have drawn."""
        self.candidates: list[Pair] = [(i, j) for i in range(s) for j in range(i, l - s + i + 1)]
        """Pairs that Algorithm 1 may score."""
        generator = torch.Generator(device).manual_seed(seed)
        # the teacher's head starts with the student's, so that layers of different widths can agree
        self.student_weight = head(generator, shape.student_rows, ds, self.vocab, ds**-0.5, dtype)
        self.teacher_weight = head(generator, shape.teacher_rows, dl, self.vocab, ds**-0.5, dtype)
        self.teacher_weight[: self.vocab, :ds] = self.student_weight[: self.vocab]

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device)

        student = normal(s, n, ds) * SPREAD
        narrow = (ds / dl) ** 0.5  # logits of dl terms spread as far as those of ds
        self.teacher = torch.empty(l, n, dl, dtype=dtype, device=device)
        for layer in range(l):
            self.teacher[layer] = normal(n, dl) * (SPREAD * narrow)
        for spread, (i, j) in zip((SPREAD, LARGE_SPREAD), self.matched):
            student[i] *= spread / SPREAD
            close = normal(n, dl) * (NEAR * narrow)
            close[:, :ds] += student[i]
            self.teacher[j] = close
        self.student = student.to(dtype)
        self.checked = evenly(n, device)
        self._gradients: dict[Pair, Tensor] = {}
        self._truth: Tensor | None = None

    @property
    def student_head(self) -> Tensor:
        """[V, Ds] without padding rows, for peers that know no padding."""
        return self.student_weight[: self.vocab]

    @property
    def teacher_head(self) -> Tensor:
        """[V, Dl] without padding rows."""
        return self.teacher_weight[: self.vocab]

    def one_token(self, token: int) -> Tensor:
        """[N] weights that leave a single token."""
        weight = torch.zeros(self.shape.tokens, device=self.device)
        weight[token] = 1.0
        return weight

    def checked_mask(self) -> Tensor:
        """[N] weights that leave the tokens that are checked."""
        weight = torch.zeros(self.shape.tokens, device=self.device)
        weight[self.checked] = 1.0
        return weight

    def truth(self) -> Tensor:
        """[S, L, K] float64 KL of every pair at the checked tokens."""
        if self._truth is None:
            with torch.no_grad():
                self._truth = reference_layer_kl(
                    self.student[:, self.checked], self.student_head, self.teacher[:, self.checked], self.teacher_head
                )
        return self._truth

    def true_gradients(self, pairs: Sequence[Pair]) -> dict[Pair, Tensor]:
        """Pair -> [K, Ds] float64 gradient of each checked token's own KL."""
        missing = [pair for pair in pairs if pair not in self._gradients]
        if missing:
            heads = self.student_head.double(), self.teacher_head.double()
            for i, j in missing:
                leaf = self.student[i, self.checked].double().requires_grad_()
                kl = reference_layer_kl(leaf[None], heads[0], self.teacher[j, self.checked][None], heads[1])
                (self._gradients[i, j],) = torch.autograd.grad(kl.sum(), leaf)
        return {pair: self._gradients[pair] for pair in pairs}

    def errors(
        self,
        pairs: Sequence[Pair],
        kl_of: Callable[[Tensor], Tensor],
        gradients: dict[tuple[Pair, ...], Tensor],
    ) -> dict[str, float]:
        """What `verdict` takes.

        Args:
            pairs: the P pairs that kl_of returns.
            kl_of: token weights [N] -> KLs [P], weighted means over tokens.
            gradients: pairs whose mean KLs were summed -> gradient [N, Ds] of the sum.
        """
        s, l = zip(*pairs)
        truth = self.truth()[list(s), list(l)]  # [P, K]
        found = [loss_error(kl_of(self.checked_mask()), truth.mean(1))]
        for k in range(min(SINGLE_TOKENS, len(self.checked))):
            found.append(loss_error(kl_of(self.one_token(self.checked[k].item())), truth[:, k]))
        slopes = []
        for group, gradient in gradients.items():
            whole = sum(self.true_gradients(group).values())
            slopes.append(relative_error(gradient[self.checked] * self.shape.tokens, whole))
        return {"kl": max(found), "gradient": max(slopes)}


class HeadProblem:
    """L verbalized layers of one model and the answer tokens. In layer 0 the model is sure of the answers."""

    LEAD = 4.0
    """Nats by which the answer's logit leads all others' together in layer 0: a probability of 0.98."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0):
        self.shape, self.device, self.dtype, self.vocab = shape, device, dtype, shape.vocab
        layers, n, d = shape.teacher_layers, shape.tokens, shape.teacher_width
        generator = torch.Generator(device).manual_seed(seed)
        self.weight = head(generator, shape.teacher_rows, d, self.vocab, d**-0.5, dtype)
        self.labels = torch.randint(self.vocab, (n,), generator=generator, device=device)
        self.hidden = torch.empty(layers, n, d, dtype=dtype, device=device)
        for layer in range(layers):
            self.hidden[layer] = torch.randn(n, d, generator=generator, device=device) * SPREAD
        others = math.log(self.vocab) + SPREAD**2 / 2  # expected logsumexp of normal logits
        self.hidden[0] += (others + self.LEAD) * self.weight[self.labels]  # rows of a head have length 1
        self.checked = evenly(n, device)

    @property
    def flat(self) -> Tensor:
        """[L * N, D]."""
        return self.hidden.flatten(0, 1)

    @property
    def flat_labels(self) -> Tensor:
        """[L * N]."""
        return self.labels.repeat(self.shape.teacher_layers)

    def errors(self, loss_and_gradient: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> dict[str, float]:
        """What `verdict` takes. loss_and_gradient: hidden [R, D], labels [R] -> mean loss over labels, gradient [R, D].

        A label of -100 is to be ignored.
        """
        rows = self.shape.teacher_layers * self.shape.tokens
        _, gradient = loss_and_gradient(self.flat, self.flat_labels)
        gradient = gradient.view_as(self.hidden)[:, self.checked] * rows
        weight = self.weight[: self.vocab].double()
        found, slopes = [], []
        for layer in range(self.shape.teacher_layers):
            leaf = self.hidden[layer, self.checked].double().requires_grad_()
            truth = reference_linear_cross_entropy(leaf, weight, self.labels[self.checked])
            (slope,) = torch.autograd.grad(truth.sum(), leaf)
            slopes.append(relative_error(gradient[layer], slope))
            if layer < 2:  # the sure one and one of the others
                for k in range(min(SINGLE_TOKENS, len(self.checked))):
                    only = torch.full_like(self.labels, -100)
                    only[self.checked[k]] = self.labels[self.checked[k]]
                    loss, _ = loss_and_gradient(self.hidden[layer], only)
                    found.append(loss_error(loss, truth.detach()[k]))
        return {"loss": max(found), "gradient": max(slopes)}


class PairProblem:
    """One student and one teacher layer. Thirds of the tokens: near, near with large logits, far."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype):
        third = -(-shape.tokens // 3)
        parts = LayerProblem(replace(shape, student_layers=3, teacher_layers=3, tokens=third), device, dtype)
        self.shape, self.device, self.dtype, self.vocab = shape, device, dtype, shape.vocab
        self.student = parts.student.flatten(0, 1)[: shape.tokens]  # [N, Ds]
        self.teacher = parts.teacher.flatten(0, 1)[: shape.tokens]  # [N, Dl]
        self.student_weight, self.teacher_weight = parts.student_weight, parts.teacher_weight
        self.student_head, self.teacher_head = parts.student_head, parts.teacher_head
        self.checked = evenly(shape.tokens, device)
        self.regime = self.checked // third  # [K]

    def errors(self, beta: float, loss: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> dict[str, float]:
        """What `verdict` takes. loss: student [N, Ds], teacher [N, Dl], labels [N] -> mean loss, gradient [N, Ds].

        A label of -100 is to be ignored.
        """
        from vlsi_kernels.linear_divergence import reference_linear_divergence

        leaf = self.student[self.checked].double().requires_grad_()
        truth = reference_linear_divergence(
            leaf, self.student_head, self.teacher[self.checked], self.teacher_head, beta=beta
        )
        (slope,) = torch.autograd.grad(truth.sum(), leaf)
        labels = torch.zeros(self.shape.tokens, dtype=torch.long, device=self.device)
        _, gradient = loss(self.student, self.teacher, labels)
        gradient = gradient[self.checked] * self.shape.tokens
        slopes = [relative_error(gradient[self.regime == r], slope[self.regime == r]) for r in self.regime.unique()]
        found = []
        for k in {0, len(self.checked) // 2, len(self.checked) - 1}:
            only = torch.full_like(labels, -100)
            only[self.checked[k]] = 0
            found.append(loss_error(loss(self.student, self.teacher, only)[0], truth.detach()[k]))
        return {"loss": max(found), "gradient": max(slopes)}
