"""Stage 1, verbalize (section 3.1): each target layer of the frozen backbones learns to speak through the frozen head.

Trained: the verbalizers. Loss: the sum over models and target layers of the autoregressive loss on the answer tokens,
or of the KL from the model's own last layer, or of both (`verbalize.objective`); no gradient crosses from one layer's
verbalizer to another's.
"""

from __future__ import annotations

import dataclasses

import torch
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..config import ConfigError
from ..data.alignment import common_tokens
from ..hidden_states import VerbalizedBackbone
from ..losses import AnswerLoss, OperatorOptions, OwnOutputLoss
from ..ranks.sharding import rank
from ..translation import start_between
from ..verbalizer import Verbalizers
from .module import StageModule
from .stage import Stage


class VerbalizeModule(StageModule):
    """Verbalizers of one or both models with their frozen backbones."""

    def __init__(self, backbones: dict[str, VerbalizedBackbone], options: OperatorOptions, objective: str = "answers"):
        super().__init__(options.heads)
        self.roles, self.objective = tuple(backbones), objective
        self.backbones = torch.nn.ModuleDict(backbones)
        self.heads = torch.nn.ModuleDict({n: self._loss(b.head_weight, options) for n, b in backbones.items()})
        self.part_names = [part for name, b in backbones.items() for part in _parts(name, b)]

    def _loss(self, weight: torch.nn.Parameter, options: OperatorOptions) -> torch.nn.Module:
        if self.objective == "answers":
            return AnswerLoss(weight, options)
        return OwnOutputLoss(weight, options, with_answers=self.objective == "both")

    def forward(self, **roles) -> dict[str, torch.Tensor]:
        """See `StageModule`."""
        parts = []
        for name in self.roles:
            batch = roles[name]
            spoken, last = self.backbones[name](batch["inputs"], batch["index"])
            if self.backbones[name].language is not None:
                spoken, last = torch.cat([spoken, last[None]]), None
            own = () if self.objective == "answers" else (last,)
            parts.append(self.heads[name](spoken, *own, batch["labels"]))
        parts = torch.cat(parts)
        return {"loss": parts.sum(), "parts": parts.detach()}


def _parts(name: str, backbone: VerbalizedBackbone) -> list[str]:
    """Names of a model's parts of the loss; a last layer has one where it speaks through a verbalizer."""
    found = [f"{name}_layer_{k}" for k in backbone.target_layers]
    return found if backbone.language is None else [*found, f"{name}_last"]


class VerbalizeStage(Stage):
    """Writes `verbalize/<role>/verbalizer.safetensors` and its JSON for each role trained."""

    name = "verbalize"
    sections = ("verbalizer",)

    def role_names(self) -> list[str]:
        return self.config.read_by_verbalize

    @property
    def _translates(self) -> bool:
        return self.config.verbalizer.translates and "teacher" in self.settings.models

    def check_predecessors(self) -> None:
        for name in self.settings.models:
            role = self.roles[name]
            if role.settings.verbalizers is not None:
                raise ConfigError(
                    f"verbalize.models names the {name}, but {name}.verbalizers has trained ones already "
                    f"({role.settings.verbalizers}); remove one of the two"
                )

    def build(self) -> VerbalizeModule:
        backbones = {}
        for name in self.settings.models:
            role, translates = self.roles[name], name == "teacher" and self._translates
            needs_last = self.settings.needs_last or translates
            spec = role.spec()  # the objective is told, not compared: any verbalizers that fit may be used
            spec = dataclasses.replace(spec, made_for=spec.made_for | {"objective": self.settings.objective})
            verbalizers = Verbalizers(spec, self.config.impl)
            if translates:
                verbalizers.start_at(self._translation())
            # where the last layer is not read, what lies above the deepest target layer has no say
            model = self.load_model(name, depth=None if needs_last else role.depth)
            language = None
            if translates:
                language = self.student_language(backbones["student"].head_weight if "student" in backbones else None)
            backbones[name] = VerbalizedBackbone(
                model, role.layers, verbalizers, train_backbone=False, needs_last=needs_last, language=language
            )
        return VerbalizeModule(backbones, self.head_options, self.settings.objective)

    def _translation(self) -> torch.Tensor | None:
        """Where the translation starts, on rank 0 (None on others under ZeRO-3)."""
        if rank() > 0 and is_deepspeed_zero3_enabled():
            return None
        student, teacher = (self.roles[name] for name in ("student", "teacher"))
        tokens = common_tokens(student.processor.tokenizer, teacher.processor.tokenizer)
        sides = ((role.folder, role.config) for role in (teacher, student))
        return start_between(*sides, tokens, self.args.device)

    def save(self, module: VerbalizeModule) -> None:
        for name, backbone in module.backbones.items():
            backbone.verbalizers.save_pretrained(self.folder / name)
