"""Last-layer distillation across tokenizers as others do it: baselines of the studies' table `tokenizers`.

    N, N_t  answer tokens of student and teacher   V, V_t  their vocabularies   q [N, V], p [N_t, V_t]  what they say
    y, y_t  the tokens that follow                 CE = mean_n -log q_n[y_n]    K  tokens that both have, by their bytes

**ULD**, Universal Logit Distillation (arXiv 2402.12030). Positions are paired in their order, tokens by rank:

    CE + 1.5 mean_k sum_r | sort(q_k)[r] - sort(p_k)[r] |        k up to min(N, N_t) of each row; absent ranks are 0

1.5 is the factor of its authors' commands. Ranks say nothing about which token is meant: that is CE's part.

**GOLD**, the hybrid loss of TRL's experimental GOLDTrainer. The answer is cut into the shortest spans that both models
cut at both ends. A span's distribution is that in front of its last token, times the probabilities of those before:

    Q_g = q_b prod_{a <= n < b} q_n[y_n]      span g of the student's tokens a .. b; P_g is the teacher's, alike
    share mean_g sum_{v in K} P_g[v] log(P_g[v] / Q_g[v])  +  (1 - share) mean_g sum_r | sort(Q_g)[r] - sort(P_g)[r] |

with sums over ranks among the tokens outside of K, and share = K / V_t. Its other way of merging (`first`) takes the
distribution in front of the first token, times the probabilities of those behind. Not as in TRL: rows are not sampled
from the student; the end of the answer counts (the student knows none); a mean is over all spans of a micro-batch;
`first` is not shifted by a token; CE may be added.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from vlsi_fast.data.dataset import VlsiDataset
from vlsi_fast.data.encoding import encode
from vlsi_fast.data.images import load_image
from vlsi_fast.data.sources import build_source
from vlsi_fast.hidden_states import VerbalizedBackbone
from vlsi_fast.stages.interact import InteractStage
from vlsi_fast.stages.module import StageModule
from vlsi_fast.stages.role import Role
from vlsi_fast.teacher import resolve_mode

ULD_WEIGHT = 1.5


@dataclass(frozen=True)
class Vocabularies:
    """What the losses know of two byte-level tokenizers."""

    student_bytes: Tensor
    """[V] bytes of each of the student's tokens."""
    teacher_bytes: Tensor
    """[V_t]"""
    common: Tensor
    """[2, K] ids of the tokens that both have: the student's, the teacher's."""

    @classmethod
    def of(cls, student, teacher) -> Vocabularies:
        """Of two tokenizers. In a byte-level vocabulary a token's name has a character for each byte."""
        names = [each.convert_ids_to_tokens(list(range(len(each)))) for each in (student, teacher)]
        theirs = {name: i for i, name in enumerate(names[1])}
        common = [(i, theirs[name]) for i, name in enumerate(names[0]) if name in theirs]
        return cls(*(torch.tensor([len(name) for name in each]) for each in names), torch.tensor(common).T.contiguous())


# ---- losses ----


def sorted_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """[G, A], [G, B] probabilities -> [G] L1 distances between them, each sorted, the shorter followed by zeros."""
    width = max(student.shape[1], teacher.shape[1])
    pair = (each.sort(-1, descending=True).values for each in (student, teacher))
    q, p = (nn.functional.pad(each, (0, width - each.shape[1])) for each in pair)
    return (q - p).abs().sum(-1)


def uld(student: Tensor, teacher: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
    """ULD without its factor and CE.

    Args:
        student, teacher: log-probabilities [N, V] and [N_t, V_t].
        rows: [N] and [N_t], the row of the micro-batch that each token is of; rising.

    Returns:
        Scalar, differentiable in `student`.
    """
    order = [_number_in_row(each) for each in rows]
    count = int(rows[0].max()) + 1
    shorter = torch.minimum(*(torch.bincount(each, minlength=count) for each in rows))
    kept = (own < shorter[row] for own, row in zip(order, rows))
    q, p = (each[mask].exp() for each, mask in zip((student, teacher), kept))
    return sorted_distance(q, p).mean()


def gold(
    student: Tensor,
    teacher: Tensor,
    labels: tuple[Tensor, Tensor],
    rows: tuple[Tensor, Tensor],
    vocabularies: Vocabularies,
    merge: str = "last",
) -> Tensor:
    """GOLD's hybrid loss.

    Args:
        student, teacher: log-probabilities [N, V] and [N_t, V_t].
        labels: [N] and [N_t] tokens that follow.
        rows: as in `uld`.
        vocabularies: of both.
        merge: "last" or "first": whose distribution stands for a span.

    Returns:
        Scalar, differentiable in `student`.
    """
    lengths = (vocabularies.student_bytes[labels[0]], vocabularies.teacher_bytes[labels[1]])
    spans = spans_of(lengths, rows)
    q, p = (merged(*side, merge) for side in zip((student, teacher), labels, spans))
    ours, theirs = vocabularies.common
    matched = (p[:, theirs].exp() * (p[:, theirs] - q[:, ours])).sum(-1).mean()
    rest = [_without(each, ids).exp() for each, ids in ((q, ours), (p, theirs))]
    share = len(theirs) / teacher.shape[1]
    if not all(each.shape[1] for each in rest):  # as in TRL: nothing to compare with
        return share * matched
    return share * matched + (1 - share) * sorted_distance(*rest).mean()


def spans_of(lengths: tuple[Tensor, Tensor], rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The shortest spans of text that both models cut at both ends.

    Args:
        lengths: [N] and [N_t] bytes of each answer token.
        rows: as in `uld`; in each row both sides have the same number of bytes.

    Returns:
        [N] and [N_t] number of the span that each token is of, rising by at most 1.

    Raises:
        ValueError: the answers of a row are not the same bytes.
    """
    ends = []
    for length, row in zip(lengths, rows):
        total = torch.zeros(int(row.max()) + 1, dtype=torch.long).index_add_(0, row, length)
        ends.append((length.cumsum(0), total))
    if not torch.equal(ends[0][1], ends[1][1]):
        raise ValueError("teacher and student read answers of different bytes; give both one chat template")
    shared = ends[0][0][torch.isin(ends[0][0], ends[1][0])]
    return tuple(torch.searchsorted(shared, end) for end, _ in ends)


def merged(said: Tensor, labels: Tensor, span: Tensor, merge: str) -> Tensor:
    """Log-probabilities [N, V] of tokens -> [G, V] of spans; labels [N], span [N]."""
    own = said.gather(1, labels[:, None])[:, 0]
    edge = span.diff().bool()
    true = edge.new_ones(1)
    base = torch.cat([edge, true] if merge == "last" else [true, edge]).nonzero()[:, 0]
    others = own.new_zeros(len(base)).index_add(0, span, own) - own[base]
    return said[base] + others[:, None]


def _without(said: Tensor, ids: Tensor) -> Tensor:
    keep = torch.ones(said.shape[1], dtype=torch.bool)
    keep[ids] = False
    return said[:, keep]


def _number_in_row(rows: Tensor) -> Tensor:
    """[N] rising row numbers -> [N] how many tokens of the same row stand before."""
    return torch.arange(len(rows)) - torch.searchsorted(rows, rows)


# ---- the stage ----


class BaselineModule(StageModule):
    """Student and teacher, each with its own tokenizer and head.

    Args:
        student, teacher: of which only the last layers are heard.
        vocabularies: of both.
        kind: uld; or gold, its merging (last, first) and, where that loss is added, ce: "gold last ce".
    """

    def __init__(self, student: VerbalizedBackbone, teacher: VerbalizedBackbone, vocabularies: Vocabularies, kind: str):
        super().__init__()
        self.student, self.teacher, self.vocabularies = student, teacher, vocabularies
        self.roles, self.part_names = ("student", "teacher"), ["last"]
        self.kind = kind.split()

    def forward(self, student: dict, teacher: dict, generator=None) -> dict[str, Tensor]:
        """See `StageModule`."""
        q = self._say(self.student, student, self.vocabularies.student_bytes)
        with torch.no_grad():
            p = self._say(self.teacher, teacher, self.vocabularies.teacher_bytes)
        labels = (student["labels"], teacher["labels"])
        rows = tuple(each["index"] // each["inputs"]["input_ids"].shape[1] for each in (student, teacher))
        loss = nn.functional.nll_loss(q, labels[0]) if "ce" in self.kind or "uld" in self.kind else 0.0
        if "uld" in self.kind:
            loss = loss + ULD_WEIGHT * uld(q, p, rows)
        else:
            loss = loss + gold(q, p, labels, rows, self.vocabularies, "first" if "first" in self.kind else "last")
        return {"loss": loss, "parts": loss.detach()[None]}

    def _say(self, backbone: VerbalizedBackbone, batch: dict, tokens: Tensor) -> Tensor:
        """[N, V] log-probabilities, float32; rows of the head behind the tokenizer's tokens take no part."""
        _, last = backbone(batch["inputs"], batch["index"])
        return (last @ backbone.head_weight[: len(tokens)].T).float().log_softmax(-1)


class WholeAnswers(VlsiDataset):
    """Rows of two models, each with all of its own answer tokens: nothing is aligned or compared."""

    def _encode(self, sample):
        loader = partial(load_image, max_image_pixels=self.data_config.max_image_pixels)
        return {role: encode(sample, each, self.data_config, loader) for role, each in self.processors.items()}


class BaselineStage(InteractStage):
    """Stage interact with a baseline's loss; one process, no cache."""

    def __init__(self, config, kind: str):
        super().__init__(config)
        self.kind = kind

    def read_models(self) -> None:
        self.roles = {name: Role(name, self.config) for name in ("student", "teacher")}
        self.teacher_mode = resolve_mode(self.config.teacher.mode, self.args.device)

    def _check_inputs(self):
        self.read_models()
        processors = {name: role.processor for name, role in self.roles.items()}
        return WholeAnswers(build_source(self.config.data.train), processors, self.config.data), self._collator()

    def build(self) -> BaselineModule:
        model = self.load_model("student")
        self.adapter = self.add_lora(model)
        student = VerbalizedBackbone(model, [], None, True)
        tokenizers = (self.roles[name].processor.tokenizer for name in ("student", "teacher"))
        return BaselineModule(student, self.load_speaking_teacher(), Vocabularies.of(*tokenizers), self.kind)
