"""Losses between verbalized layers: every operation of table 4d, on hidden states, without ever making logits.

    S, L  student, teacher target layers        N  answer tokens        V  vocabulary        d  width

| name | intermediate layers                                    | last layer                              |
|------|--------------------------------------------------------|-----------------------------------------|
| kld  | KL(teacher's matched layer || student's layer)         | KL(teacher's output || student's)       |
| ce   | autoregressive loss of the layer's own distribution    | autoregressive loss                     |
| l2   | squared difference of the two layers' logits           | squared difference of logits            |
| none | -                                                      | -                                       |

Readings of table 4d that the paper leaves open: `ce` is the loss on the ground-truth answer (section 3.3 speaks of
avoiding the *autoregressive* loss in this stage; a cross-entropy against the teacher would have KL's own gradient);
`l2` still chooses its pairs by KL (Algorithm 1) and compares the logits of all vocabulary entries (mean over V).
`kld` may also be the reverse KL or Jensen-Shannon (`interact.divergence`); its pairs are chosen by the forward KL too.
All losses are means over the N tokens, one number a layer; the caller sums over layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vlsi_kernels import (
    FrozenHead,
    TeacherTargets,
    layer_kl_matrix,
    linear_cross_entropy,
    linear_divergence,
    teacher_targets,
)
from vlsi_kernels.frozen_head import weight_of

from .ranks.heads import FrozenHeads


@dataclass(frozen=True)
class OperatorOptions:
    """How the vocabulary operators are called."""

    vocab_size: int
    """Rows of both heads that take part: the vocabulary shared by teacher and student."""
    impl: str = "auto"
    """Implementation (`vlsi_kernels`)."""
    heads: FrozenHeads = field(default_factory=FrozenHeads)
    """How frozen heads are read; one for all losses of a stage."""


class AnswerLoss(nn.Module):
    """Autoregressive loss of several hidden states through one language head.

    A trainable head weight is registered here as well, so that ZeRO-3 gathers it for forward and for backward; a frozen
    one is read under one gather in forward and not needed after it.
    """

    def __init__(self, weight: nn.Parameter, options: OperatorOptions):
        super().__init__()
        self.options = options
        self._frozen = [weight]
        if weight.requires_grad:
            self.weight = weight
            self._frozen = []

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of each layer: hidden [L, N, d], labels [N] -> [L] float32 (0 where N is 0)."""
        layers, tokens = hidden.shape[:2]
        with self.options.heads.whole(self._frozen) as frozen:
            weight = frozen[0] if frozen else self.weight
            if torch.is_autocast_enabled(hidden.device.type):  # trained weights are float32 there; compute is not
                dtype = torch.get_autocast_dtype(hidden.device.type)
                hidden, weight = hidden.to(dtype), weight if isinstance(weight, FrozenHead) else weight.to(dtype)
            loss = linear_cross_entropy(
                hidden.flatten(0, 1),
                weight,
                labels.repeat(layers),
                reduction="none",
                vocab_size=self.options.vocab_size,
                impl=self.options.impl,
            )
        return loss.view(layers, tokens).sum(1) / max(tokens, 1)


@dataclass(frozen=True)
class OwnHead:
    """The head of a model whose layers speak through another's."""

    weight: Tensor
    """[V_own, d_own], frozen."""
    common_tokens: Tensor
    """[2, K] ids of the tokens that both vocabularies have: the other's, this one's."""


class OwnOutputLoss(nn.Module):
    """KL of a frozen model's layers from its own last layer; with the answers' loss if asked.

    All speak through one head, of weight W. Both losses are columns of one KL matrix then: an answer y is a teacher
    that is sure of it, neg_entropy 0 and expectation W[y]. So there is one pass over the vocabulary for the last layer
    and one a target layer, whatever is asked for.

    Layers that translate speak through another head than the last layer does (`own`). They are compared on the tokens
    that both vocabularies have, both distributions normalised there; with the answers' loss they pass over the whole
    vocabulary besides.
    """

    def __init__(self, weight: nn.Parameter, options: OperatorOptions, with_answers: bool, own: OwnHead | None = None):
        super().__init__()
        self.options, self.with_answers = options, with_answers
        self._frozen = [weight]
        self.answers = None
        if own is not None:
            self._frozen.append(own.weight)
            self._tokens = own.common_tokens
            self.answers = AnswerLoss(weight, options) if with_answers else None

    def forward(self, hidden: Tensor, last: Tensor, labels: Tensor) -> Tensor:
        """hidden [L, N, d], last [N, d_own] after the model's own final norm, labels [N] -> [L] float32 means over
        tokens (0: N is 0).

        Differentiable in hidden.
        """
        if len(self._frozen) == 2:
            translated = self._translated(hidden, last)
            return translated if self.answers is None else translated + self.answers(hidden, labels)
        options = {"vocab_size": self.options.vocab_size, "impl": self.options.impl}
        if torch.is_autocast_enabled(hidden.device.type):  # as in AnswerLoss
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        with self.options.heads.whole(self._frozen) as (head,):
            weight = weight_of(head)
            targets = teacher_targets(last[None], weight, head, **options)
            if self.with_answers:
                neg_entropy, expectation = targets.neg_entropy, targets.expectation
                rows = self.options.vocab_size  # a label beyond them is no token of this head: NaN stops the stage
                sure = torch.zeros_like(neg_entropy).masked_fill(labels >= rows, torch.nan)
                answers = weight[labels.clamp(max=rows - 1)][None].to(expectation.dtype)
                targets = targets._replace(
                    neg_entropy=torch.cat([neg_entropy, sure]), expectation=torch.cat([expectation, answers])
                )
            return layer_kl_matrix(hidden, head, targets, **options).sum(1)

    def _translated(self, hidden: Tensor, last: Tensor) -> Tensor:
        """[L] KL of the layers from the last one, on the common tokens."""
        if torch.is_autocast_enabled(hidden.device.type):  # as in AnswerLoss
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        self._tokens = tokens = self._tokens.to(hidden.device)
        with self.options.heads.whole(self._frozen) as heads:
            weight, own = (weight_of(head)[ids] for head, ids in zip(heads, tokens))
            options = {"vocab_size": tokens.shape[1], "impl": self.options.impl}
            targets = teacher_targets(last[None].to(own.dtype), own, weight, **options)
            return layer_kl_matrix(hidden, weight, targets, **options)[:, 0]


class PairwiseKL(nn.Module):
    """KL of every (student layer, teacher layer) pair in one pass over the vocabulary a layer.

    The teacher's passes can be made ahead (`targets`), for several micro-batches under one gather of both heads.
    """

    def __init__(self, student_weight: nn.Parameter, teacher_weight: nn.Parameter, options: OperatorOptions):
        super().__init__()
        self.options = options
        self._weights = [student_weight, teacher_weight]

    def forward(self, student: Tensor, teacher: Tensor | TeacherTargets, temperature: float = 1.0) -> Tensor:
        """student [S, N, d_s], teacher [L, N, d_l] or its targets -> [S, L] float32 mean over tokens.

        Differentiable in student.
        """
        options = self._options(temperature)
        if isinstance(teacher, TeacherTargets):
            with self.options.heads.whole(self._weights[:1]) as (head,):
                return layer_kl_matrix(student, head, teacher, **options)
        with self.options.heads.whole(self._weights) as (head, teacher_head):
            targets = teacher_targets(teacher, weight_of(teacher_head), head, **options)
            return layer_kl_matrix(student, head, targets, **options)

    def targets(self, teachers: Iterable[Tensor], temperature: float = 1.0) -> list[TeacherTargets]:
        """What `forward` needs of each micro-batch's teacher [L, N_i, d_l]: neg_entropy [L, N_i] and expectation
        [L, N_i, d_s], float32."""
        with self.options.heads.whole(self._weights) as (head, teacher_head):
            weight, options = weight_of(teacher_head), self._options(temperature)
            return [teacher_targets(t, weight, head, **options) for t in teachers]

    def _options(self, temperature: float) -> dict:
        return {"vocab_size": self.options.vocab_size, "temperature": temperature, "impl": self.options.impl}


class MatchedDivergence(nn.Module):
    """Divergence of matched layers where it is not the forward KL: a pass over both heads for each pair, no targets.

    `beta` 1: KL(student || teacher); between 0 and 1: generalized Jensen-Shannon, two passes (`linear_divergence`).
    """

    def __init__(
        self, student_weight: nn.Parameter, teacher_weight: nn.Parameter, options: OperatorOptions, beta: float
    ):
        super().__init__()
        self.options, self.beta = options, beta
        self._weights = [student_weight, teacher_weight]

    def forward(self, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        """student [S, N, d_s], teacher [S, N, d_l], already matched -> [S] float32 mean over tokens.

        Differentiable in student.
        """
        layers, tokens = student.shape[:2]
        with self.options.heads.whole(self._weights) as (head, teacher_head):
            loss = linear_divergence(
                student.flatten(0, 1),
                head,
                teacher.detach().flatten(0, 1),
                weight_of(teacher_head),
                beta=self.beta,
                reduction="none",
                temperature=temperature,
                vocab_size=self.options.vocab_size,
                impl=self.options.impl,
            )
        return loss.view(layers, tokens).sum(1) / max(tokens, 1)


class LogitL2(nn.Module):
    """Squared difference of logits through Gram matrices, with no pass over the vocabulary after the first call.

    ||W_l h_l - W_s h_s||^2 = h_l' (W_l'W_l) h_l - 2 h_l' (W_l'W_s) h_s + h_s' (W_s'W_s) h_s. Both heads are frozen, so
    the three matrices, [d_l, d_l], [d_l, d_s] and [d_s, d_s] in float32, are made once.
    """

    def __init__(self, student_weight: nn.Parameter, teacher_weight: nn.Parameter, options: OperatorOptions):
        super().__init__()
        self.options = options
        self._weights = [student_weight, teacher_weight]
        self._grams: tuple[Tensor, Tensor, Tensor] | None = None

    @torch.no_grad()
    def _make_grams(self) -> tuple[Tensor, Tensor, Tensor]:
        with self.options.heads.whole(self._weights) as heads:
            ws, wl = (weight_of(head)[: self.options.vocab_size] for head in heads)
            pairs = ((wl, wl), (wl, ws), (ws, ws))
            grams = [wl.new_zeros(a.shape[1], b.shape[1], dtype=torch.float32) for a, b in pairs]
            for start in range(0, self.options.vocab_size, 16384):
                l, s = wl[start : start + 16384].float(), ws[start : start + 16384].float()
                for gram, a, b in zip(grams, (l, l, s), (l, s, s)):
                    gram.addmm_(a.T, b)
        return tuple(grams)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """student [S, N, d_s], teacher [S, N, d_l], already matched -> [S] float32 mean over tokens and vocabulary."""
        if self._grams is None:
            self._grams = self._make_grams()
        ll, ls, ss = self._grams
        s, l = student.float(), teacher.float()
        with torch.autocast(student.device.type, enabled=False):
            squares = ((l @ ll) * l).sum(-1) - 2 * ((l @ ls) * s).sum(-1) + ((s @ ss) * s).sum(-1)
        return squares.clamp_min(0).sum(1) / (max(student.shape[1], 1) * self.options.vocab_size)


def hidden_l2_matrix(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of every pair, for the headless ablation of appendix D.

    Args:
        student: [S, N, d_l] outputs of the student's widened verb-FFNs.
        teacher: [L, N, d_l] outputs of the teacher's verb-FFNs; no gradient.

    Returns:
        [S, L] float32, mean over tokens and width; differentiable in student.
    """
    s, l = student.float(), teacher.detach().float()
    size = max(s.shape[1], 1) * s.shape[2]
    return torch.stack([(s - layer).square().sum((1, 2)) / size for layer in l], dim=1)


def pick(matrix: Tensor, matches: Tensor) -> Tensor:
    """Loss of each student layer at its chosen pairs: matrix [S, L], matches [S] or [S, k] -> [S] (mean over k)."""
    index = matches if matches.dim() == 2 else matches[:, None]
    return matrix.gather(1, index).mean(1)
