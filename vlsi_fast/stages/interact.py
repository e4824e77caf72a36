"""Stage 2, interact (section 3.2): match student layers to teacher layers and distil between their distributions.

Trained: LoRA on the student's language model. Loss: the sum over student target layers of the operation
`interact.intermediate` at the matched pairs, times `interact.intermediate_weight` (in the course of
`interact.intermediate_schedule`), plus `interact.last` on the last layer (table 4d; default KL and KL, and 1). Layers
are matched by the forward KL of all pairs, whatever `interact.divergence` the loss is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlsi_kernels import TeacherTargets

from ..backbones import family_of
from ..config import ConfigError, MatchingConfig
from ..config_stages import InteractConfig
from ..hidden_states import VerbalizedBackbone
from ..lineage import rows_used, weights_digest
from ..losses import AnswerLoss, LogitL2, MatchedDivergence, OperatorOptions, PairwiseKL, hidden_l2_matrix, pick
from ..matching import match_layers
from ..planner.window import fitting_window
from ..ranks.sharding import gathered_objects, world_size
from ..teacher_cache.following import wait_for_cache
from ..teacher_cache.forms import unpack_targets
from ..teacher_cache.recalling import CachedTeacher, cache_folders
from ..teacher_cache.store import CacheError
from ..verbalizer import Verbalizers
from .many_teachers import ManyTeachers
from .module import StageModule
from .stage import Stage


@dataclass(frozen=True)
class Taught:
    """What the losses of one micro-batch read of the teacher; N answer tokens."""

    compared: Tensor | TeacherTargets | None = None
    """What the forward KL compares, target layers and last: [R, N, d_l], or their targets, made ahead."""
    layers: Tensor | None = None
    """[L, N, d_l] target layers, for other losses."""
    last: Tensor | None = None
    """[N, d_l] last layer, for other losses."""


@dataclass(frozen=True)
class Absent:
    """A teacher that is not here, and whose rows bring what it said (`teacher_cache`)."""

    target_layers: list[int]
    head_weight: Tensor | None
    """[V, d_l], for hidden states, or the student's [V, d_s] for translated ones; None where the rows bring targets."""
    has_last: bool
    """Whether the last layer's are behind the target layers'."""
    vocab_size: int


class InteractModule(StageModule):
    """Student and teacher with their verbalizers, layer matching, and the losses of table 4d.

    Args:
        student: the backbone to train.
        teacher: the frozen one, here or not; None where no loss reads it.
        settings: of the stage.
        matching: how layers are matched.
        options: how the vocabulary operators are called.
        window: micro-batches for which the teacher runs at once (`teach`).
        teach_by: what runs the teacher, called as it is, where it is no part of the module tree; None: it is in the
            tree, and called itself.
    """

    def __init__(
        self,
        student: VerbalizedBackbone,
        teacher: VerbalizedBackbone | Absent | None,
        settings: InteractConfig,
        matching: MatchingConfig,
        options: OperatorOptions,
        window: int = 1,
        teach_by: Callable | None = None,
    ):
        super().__init__(options.heads)
        self.student, self.window = student, window
        if teach_by is None and not isinstance(teacher, Absent):
            self.teacher = teacher
        else:
            object.__setattr__(self, "teacher", teacher)  # past nn.Module's registration
        self._teach_by = teach_by
        self.settings, self.matching = settings, matching
        self.roles = ("student", "teacher") if isinstance(teacher, VerbalizedBackbone) else ("student",)
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
        self,
        student: dict,
        teacher: dict | None = None,
        taught: Taught | dict[str, Tensor] | CacheError | None = None,
        generator=None,
        intermediate_weight: float | None = None,
    ) -> dict[str, Tensor]:
        """See `StageModule`; `taught`: what `teach` found, or what a cache has of the rows, in place of `teacher`;
        `generator` is the source of this micro-batch's matching draws, `intermediate_weight` that of `schedule` (None:
        of the settings)."""
        s_layers, s_last = self.student(student["inputs"], student["index"], self._normed)
        if taught is None:
            taught = Taught() if teacher is None else self._hear(teacher["inputs"], teacher["index"])
        elif not isinstance(taught, Taught):
            taught = self.recall(taught)
        return self.learn(s_layers, s_last, taught, student["labels"], generator, intermediate_weight)

    def learn(
        self,
        s_layers: Tensor | None,
        s_last: Tensor | None,
        taught: Taught,
        labels: Tensor,
        generator=None,
        intermediate_weight: float | None = None,
    ) -> dict[str, Tensor]:
        """What `forward` returns, from the student's states: s_layers [S, N, d_s], s_last [N, d_s], labels [N]."""
        matrix, last_kl = self._divergences(s_layers, s_last, taught)
        record, parts = {}, []
        if self.matrix_shape is not None:
            matches = match_layers(matrix, **self.matching.model_dump(), generator=generator)
            record = {"kl": matrix.detach(), "matches": _counts(matches, matrix.shape[1])}
            parts.append(self._intermediate(matrix, matches, s_layers, taught.layers))
        elif self.settings.intermediate == "ce":
            parts.append(self.answer_loss(s_layers, labels))
        weight = self.settings.intermediate_weight if intermediate_weight is None else intermediate_weight
        parts = [weight * part for part in parts]
        parts += self._last(last_kl, s_last, taught.last, labels)
        parts = torch.cat(parts)
        return {"loss": parts.sum(), "parts": parts.detach(), **record}

    # ---- the teacher ----

    @property
    def _normed(self) -> bool:
        return not self.settings.headless

    @torch.no_grad()
    def _hear(self, inputs: dict[str, Tensor], index: Tensor) -> Taught:
        layers, last = (self._teach_by or self.teacher)(inputs, index, self._normed)
        return Taught(self._compared(layers, last), layers, last)

    @torch.no_grad()
    def teach(self, inputs: dict[str, Tensor], index: Tensor, counts: list[int]) -> list[Taught]:
        """Run the teacher once for several micro-batches, outside of `forward`. Collective.

        Args:
            inputs: processor tensors of all their rows.
            index: [sum of counts] answer positions, those of the first micro-batch first.
            counts: answer tokens of each.

        Returns:
            For each what `forward` takes as `taught`: where the forward KL is the loss, 1 + d_s float32 numbers an
            answer token and layer; hidden states, d_l numbers, for the losses that read those.
        """
        layers, last = (self._teach_by or self.teacher)(inputs, index, self._normed)
        nothing = [None] * len(counts)
        layers = nothing if layers is None else layers.split(counts, 1)
        last = nothing if last is None else last.split(counts)
        compared = nothing
        if self.settings.matches_by_kl or self.settings.last_by_forward_kl:
            rows = (self._compared(*each) for each in zip(layers, last))  # one at a time
            compared = self.pairwise_kl.targets(rows, self.settings.temperature)
        # copies, so that what one micro-batch keeps does not keep the others'
        layers = [each.clone() for each in layers] if self.settings.reads_teacher_layers else nothing
        last = [each.clone() for each in last] if self.settings.reads_teacher_last else nothing
        return [Taught(*each) for each in zip(compared, layers, last)]

    def recall(self, stored: dict[str, Tensor] | CacheError) -> Taught:
        """What a cache has of the micro-batch's rows (`teacher_cache.forms`), for `learn`.

        Raises:
            CacheError: it does not have one of them.
        """
        if isinstance(stored, CacheError):
            raise stored
        if "hidden" not in stored:
            return Taught(unpack_targets(stored, self.teacher.vocab_size, self.settings.temperature))
        states = stored["hidden"].transpose(0, 1).contiguous()
        count = len(states) - self.teacher.has_last
        layers = states[:count] if count else None
        last = states[-1] if self.teacher.has_last else None
        return Taught(self._compared(layers, last), layers, last)

    def _compared(self, layers: Tensor | None, last: Tensor | None) -> Tensor | None:
        """[R, N, d] of the layers, of either model, between which the forward KL is taken: in one vocabulary pass."""
        found = [layers] if self.settings.matches_by_kl else []
        found += [last[None]] if self.settings.last_by_forward_kl else []
        return torch.cat(found) if len(found) == 2 else found[0] if found else None

    # ---- losses ----

    def _divergences(self, s_layers, s_last, taught: Taught) -> tuple[Tensor | None, Tensor | None]:
        """[S, L] matrix that drives the matching, and [1] KL of the last layers (where the forward KL is the loss)."""
        matrix = last_kl = None
        if taught.compared is not None:
            # for l2 and other divergences it only drives the matching
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.settings.learns_by_forward_kl):
                compared = self._compared(s_layers, s_last)
                matrix = self.pairwise_kl(compared, taught.compared, self.settings.temperature)
            if self.settings.last_by_forward_kl:
                matrix, last_kl = matrix[:-1, :-1], matrix[-1, -1:]
        if self.settings.headless:
            matrix = hidden_l2_matrix(s_layers, taught.layers)
        return matrix, last_kl

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
        return ["student"] if self.config.teacher.mode == "cached" else self.settings.roles

    def open_caches(self) -> list[CachedTeacher]:
        if self.config.teacher.mode != "cached":
            named = [i for i, source in enumerate(self.config.data.train) if source.teacher is not None]
            if named:
                raise ConfigError(
                    f"data.train.{named[0]}.teacher names a cache, and teacher.mode is {self.config.teacher.mode}: set "
                    "it to cached, or remove the source's teacher"
                )
        if self.config.teacher.mode != "cached" or "teacher" not in self.settings.roles:
            return []
        if self.config.teacher.cache_follow:
            wait_for_cache(self.config.cache_dir, self.config.teacher.cache_timeout)
        return [CachedTeacher(self.config, folder) for folder in cache_folders(self.config)]

    def check_predecessors(self) -> None:
        if self.settings.matches_layers:
            students, matching = len(self.roles["student"].layers), self.config.matching
            for teacher in self.caches or [self.roles["teacher"]]:
                teachers = len(teacher.layers)
                if students > teachers:
                    raise ConfigError(
                        f"student has {students} target layers, teacher {teachers}: matching needs t_s <= t_l; "
                        "remove some of student.layers"
                    )
                if matching.strategy == "bottom" and matching.k > teachers:
                    raise ConfigError(
                        f"matching.k is {matching.k}, but the teacher has {teachers} target layers; lower it"
                    )
        for name in self._speakers:
            self.roles[name].require_verbalizers()

    def inputs(self) -> dict[str, str]:
        folders = {name: self.roles[name].verbalizer_folder() for name in self._speakers}
        found = {f"{name}_verbalizers": weights_digest(folder) for name, folder in folders.items()}
        if self.caches and self.caches[0].verbalizers:
            found["teacher_verbalizers"] = self.caches[0].verbalizers
        for number, cached in enumerate(self.caches[1:], 2):
            found[f"teacher_{number}"] = cached.digest
        return found

    @property
    def _speakers(self) -> list[str]:
        """Models in the job that speak through trained verbalizers."""
        return [name for name in self.config.speakers if name in self.roles]

    def data_start(self) -> int:
        return rows_used(self.config.stage_dir("verbalize"))

    def build(self) -> InteractModule | ManyTeachers:
        model = self.load_model("student")
        self.adapter = self.add_lora(model)
        if not self.settings.has_last_loss:  # nothing above the deepest target layer would get a gradient
            deepest = max(self.roles["student"].layers)
            family_of(model.config).decoder_layers(model)[deepest:].requires_grad_(False)
        self.enable_checkpointing(model)
        student = VerbalizedBackbone(model, self.roles["student"].layers, self._verbalizers("student"), True)
        settings = (self.settings, self.config.matching)
        if self.caches:
            lessons = []
            for cached in self.caches:
                options = replace(self.head_options, vocab_size=cached.identity["vocab_size"])
                lessons.append(InteractModule(student, self._absent(cached, student), *settings, options))
            names = [cached.name for cached in self.caches]
            if len(set(names)) < len(names):  # folders of one name in different places
                names = [str(cached.folder) for cached in self.caches]
            return lessons[0] if len(lessons) == 1 else ManyTeachers(student, lessons, names)
        teacher = self.load_speaking_teacher(student.head_weight) if "teacher" in self.roles else None
        window = self._window() if teacher is not None else 1
        teach_by = self.apart(teacher) if window > 1 else None
        return InteractModule(student, teacher, *settings, self.head_options, window=window, teach_by=teach_by)

    def load_speaking_teacher(self, student_head: Tensor | None = None) -> VerbalizedBackbone:
        """The frozen teacher with what its layers speak through; `student_head`: see `student_language`. Collective."""
        role, needs_last = self.roles["teacher"], self.settings.needs_teacher_last
        model = self.load_model("teacher", depth=None if needs_last else role.depth)
        layers = role.layers if self.settings.matches_layers else []
        translates = self.config.verbalizer.translates
        language = self.student_language(student_head) if translates else None
        speaking = (self._verbalizers("teacher"), False, needs_last, language, translates and needs_last)
        return VerbalizedBackbone(model, layers, *speaking)

    def _absent(self, cached: CachedTeacher, student: VerbalizedBackbone) -> Absent:
        rows, head = cached.identity["vocab_size"], None
        if cached.form == "hidden":
            translates = self.config.verbalizer.translates
            head = student.head_weight if translates else cached.head(self.args.device)
        return Absent(cached.layers, head, self.settings.needs_teacher_last, rows)

    def _window(self) -> int:
        """Micro-batches of `teacher.window`, auto resolved, at most those of a step."""
        training = self.config.stage_training(self.name)
        wanted = self.config.teacher.window
        if wanted == "auto":
            wanted = 1
            if self.args.device.type == "cuda":
                memory = torch.cuda.get_device_properties(self.args.device).total_memory
                configs = {name: role.config for name, role in self.roles.items()}
                wanted = min(gathered_objects(fitting_window(self.config, configs, world_size(), memory)))
        return min(wanted, training.gradient_accumulation_steps)

    def _verbalizers(self, name: str) -> Verbalizers | None:
        role = self.roles[name]
        if self.settings.headless:
            # Appendix D leaves open what the verb-FFNs start from and which of them learn. The teacher's stay at their
            # (seeded) start: were both trained by L2 alone, zero would solve it. The student's learn.
            width = self.roles["teacher"].config.get_text_config().hidden_size
            return Verbalizers(role.spec(width), self.config.impl).requires_grad_(name == "student")
        if name not in self.config.speakers:
            return None
        verbalizers = role.trained_verbalizers()
        return verbalizers.requires_grad_(name == "student" and self.settings.train_student_verbalizers)

    def save(self, module: InteractModule) -> None:
        self.save_student(module.student.model, self.roles["student"].folder, self.adapter)
        if self.settings.trains_verbalizers:
            module.student.verbalizers.save_pretrained(self.folder / "verbalizers")
