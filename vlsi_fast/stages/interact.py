"""Stage 2, interact (section 3.2): match student layers to teacher layers and distil between their distributions.

Trained: LoRA on the student's language model. Loss: the sum over student target layers of the operation
`interact.intermediate` at the matched pairs, times `interact.intermediate_weight` (in the course of
`interact.intermediate_schedule`), plus `interact.last` on the last layer (table 4d; default KL and KL, and 1). Layers
are matched by the forward KL of all pairs, whatever `interact.divergence` the loss is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..backbones import family_of
from ..config import ConfigError, MatchingConfig
from ..config_stages import InteractConfig
from ..hidden_states import VerbalizedBackbone
from ..lineage import rows_used, weights_digest
from ..losses import AnswerLoss, LogitL2, MatchedDivergence, OperatorOptions, PairwiseKL, hidden_l2_matrix, pick
from ..matching import match_layers
from ..verbalizer import Verbalizers
from .module import StageModule
from .stage import Stage


class InteractModule(StageModule):
    """Student and teacher with their verbalizers, layer matching, and the losses of table 4d."""

    def __init__(
        self,
        student: VerbalizedBackbone,
        teacher: VerbalizedBackbone | None,
        settings: InteractConfig,
        matching: MatchingConfig,
        options: OperatorOptions,
    ):
        super().__init__()
        self.student, self.teacher = student, teacher
        self.settings, self.matching = settings, matching
        self.roles = ("student",) if teacher is None else ("student", "teacher")
        self.part_names = [f"student_layer_{k}" for k in student.target_layers]
        self.part_names += ["last"] if settings.has_last_loss else []
        if settings.matches_layers:
            self.matrix_shape = (len(student.target_layers), len(teacher.target_layers))
            self.layer_names = (student.target_layers, teacher.target_layers)
        if settings.learns_answers:
            self.answer_loss = AnswerLoss(student.head_weight, options)
        if teacher is not None:
            heads = (student.head_weight, teacher.head_weight, options)
            self.pairwise_kl = PairwiseKL(*heads)
            self.logit_l2 = LogitL2(*heads)
        self.divergence = None  # of pairs already matched; None: the forward KL, which the matrix holds
        if not settings.kld_is_forward:
            self.divergence = MatchedDivergence(*heads, settings.beta)

    def schedule(self, progress: float) -> dict[str, float]:
        """See `StageModule`: the factor of the target layers' losses."""
        settings = self.settings
        if not settings.has_layer_loss:
            return {}
        course = {"constant": 1.0, "linear": 1.0 - progress, "cosine": (1.0 + math.cos(math.pi * progress)) / 2}
        return {"intermediate_weight": settings.intermediate_weight * course[settings.intermediate_schedule]}

    def forward(
        self, student: dict, teacher: dict | None = None, generator=None, intermediate_weight: float | None = None
    ) -> dict[str, Tensor]:
        """See `StageModule`; `generator` is the source of this micro-batch's matching draws, `intermediate_weight` that
        of `schedule` (None: of the settings)."""
        normed = not self.settings.headless
        s_layers, s_last = self.student(student["inputs"], student["index"], normed)
        t_layers = t_last = None
        if teacher is not None:
            with torch.no_grad():
                t_layers, t_last = self.teacher(teacher["inputs"], teacher["index"], normed)
        matrix, last_kl = self._divergences(s_layers, s_last, t_layers, t_last)
        record, parts = {}, []
        if self.matrix_shape is not None:
            matches = match_layers(matrix, **self.matching.model_dump(), generator=generator)
            record = {"kl": matrix.detach(), "matches": _counts(matches, matrix.shape[1])}
            parts.append(self._intermediate(matrix, matches, s_layers, t_layers))
        elif self.settings.intermediate == "ce":
            parts.append(self.answer_loss(s_layers, student["labels"]))
        weight = self.settings.intermediate_weight if intermediate_weight is None else intermediate_weight
        parts = [weight * part for part in parts]
        parts += self._last(last_kl, s_last, t_last, student["labels"])
        parts = torch.cat(parts)
        return {"loss": parts.sum(), "parts": parts.detach(), **record}

    def _divergences(self, s_layers, s_last, t_layers, t_last) -> tuple[Tensor | None, Tensor | None]:
        """[S, L] matrix that drives the matching, and [1] KL of the last layers (where the forward KL is the loss): one
        vocabulary pass for both."""
        last = self.settings.last_by_forward_kl
        if not self.settings.matches_by_kl:
            matrix = hidden_l2_matrix(s_layers, t_layers) if self.settings.headless else None
            return matrix, self._kl(s_last[None], t_last[None])[0] if last else None
        if not last:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.settings.layers_by_forward_kl):
                return self._kl(s_layers, t_layers), None  # for l2 and other divergences it only drives the matching
        both = self._kl(torch.cat([s_layers, s_last[None]]), torch.cat([t_layers, t_last[None]]))
        return both[:-1, :-1], both[-1, -1:]

    def _kl(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.pairwise_kl(student, teacher, self.settings.temperature)

    def _intermediate(self, matrix: Tensor, matches: Tensor, s_layers: Tensor, t_layers: Tensor) -> Tensor:
        if self.settings.headless:
            return pick(matrix, matches)
        if self.settings.layers_by_forward_kl:
            return pick(matrix, matches) * self.settings.temperature**2
        chosen = matches if matches.dim() == 2 else matches[:, None]
        compare = self._diverge if self.settings.layers_by_other_divergence else self.logit_l2
        return torch.stack([compare(s_layers, t_layers[column]) for column in chosen.T]).mean(0)

    def _diverge(self, student: Tensor, teacher: Tensor) -> Tensor:
        temperature = self.settings.temperature
        return self.divergence(student, teacher, temperature) * temperature**2

    def _last(self, last_kl, s_last, t_last, labels) -> list[Tensor]:
        if self.settings.last_by_forward_kl:
            return [last_kl * self.settings.temperature**2]
        if self.settings.last_by_other_divergence:
            return [self._diverge(s_last[None], t_last[None])]
        if self.settings.last == "ce":
            return [self.answer_loss(s_last[None], labels)]
        if self.settings.last == "l2":
            return [self.logit_l2(s_last[None], t_last[None])]
        return []


def _counts(matches: Tensor, teachers: int) -> Tensor:
    """[S] or [S, k] chosen layers -> [S, L] float32 counts."""
    index = matches if matches.dim() == 2 else matches[:, None]
    return torch.zeros(index.shape[0], teachers, device=index.device).scatter_add_(
        1, index, torch.ones_like(index, dtype=torch.float32)
    )


class InteractStage(Stage):
    """Writes `interact/student` (stock checkpoint, LoRA merged) and `interact/adapter` (the LoRA alone)."""

    name = "interact"
    sections = ("verbalizer", "matching", "lora")

    def role_names(self) -> list[str]:
        return self.settings.roles

    def check_predecessors(self) -> None:
        if self.settings.matches_layers:
            students, teachers = (len(self.roles[n].layers) for n in ("student", "teacher"))
            if students > teachers:
                raise ConfigError(
                    f"student has {students} target layers, teacher {teachers}: matching needs t_s <= t_l; "
                    "remove some of student.layers"
                )
            matching = self.config.matching
            if matching.strategy == "bottom" and matching.k > teachers:
                raise ConfigError(f"matching.k is {matching.k}, but the teacher has {teachers} target layers; lower it")
        for name in self.settings.speakers:
            self.roles[name].require_verbalizers()

    def inputs(self) -> dict[str, str]:
        folders = {name: self.roles[name].verbalizer_folder() for name in self.settings.speakers}
        return {f"{name}_verbalizers": weights_digest(folder) for name, folder in folders.items()}

    def data_start(self) -> int:
        return rows_used(self.config.stage_dir("verbalize"))

    def build(self) -> InteractModule:
        model = self.load_model("student")
        self.adapter = self.add_lora(model)
        if not self.settings.has_last_loss:  # nothing above the deepest target layer would get a gradient
            deepest = max(self.roles["student"].layers)
            family_of(model.config).decoder_layers(model)[deepest:].requires_grad_(False)
        self.enable_checkpointing(model)
        student = VerbalizedBackbone(model, self.roles["student"].layers, self._verbalizers("student"), True)
        teacher = None
        if "teacher" in self.roles:
            role = self.roles["teacher"]
            needs_last = self.settings.needs_teacher_last
            model = self.load_model("teacher", depth=None if needs_last else role.depth)
            teacher = VerbalizedBackbone(model, role.layers, self._verbalizers("teacher"), False, needs_last)
        return InteractModule(student, teacher, self.settings, self.config.matching, self.head_options)

    def _verbalizers(self, name: str) -> Verbalizers | None:
        role = self.roles[name]
        if self.settings.headless:
            # Appendix D leaves open what the verb-FFNs start from and which of them learn. The teacher's stay at their
            # (seeded) start: were both trained by L2 alone, zero would solve it. The student's learn.
            width = self.roles["teacher"].config.get_text_config().hidden_size
            return Verbalizers(role.spec(width), self.config.impl).requires_grad_(name == "student")
        if name not in self.settings.speakers:
            return None
        verbalizers = role.trained_verbalizers()
        return verbalizers.requires_grad_(name == "student" and self.settings.train_student_verbalizers)

    def save(self, module: InteractModule) -> None:
        self.save_student(module.student.model, self.roles["student"].folder, self.adapter)
        if self.settings.trains_verbalizers:
            module.student.verbalizers.save_pretrained(self.folder / "verbalizers")
