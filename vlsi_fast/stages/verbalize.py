"""Stage 1, verbalize (section 3.1): each target layer of the frozen backbones learns to speak through the frozen head.

Trained: the verbalizers. Loss: the sum over models and target layers of the autoregressive loss on the answer tokens,
or of the KL from the model's own last layer, or of both (`verbalize.objective`); no gradient crosses from one layer's
verbalizer to another's.
"""

from __future__ import annotations

import dataclasses

import torch

from ..config import ConfigError
from ..hidden_states import VerbalizedBackbone
from ..losses import AnswerLoss, OperatorOptions, OwnOutputLoss
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
        self.part_names = [f"{name}_layer_{k}" for name, b in backbones.items() for k in b.target_layers]

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
            own = () if self.objective == "answers" else (last,)
            parts.append(self.heads[name](spoken, *own, batch["labels"]))
        parts = torch.cat(parts)
        return {"loss": parts.sum(), "parts": parts.detach()}


class VerbalizeStage(Stage):
    """Writes `verbalize/<role>/verbalizer.safetensors` and its JSON for each role trained."""

    name = "verbalize"
    sections = ("verbalizer",)

    def role_names(self) -> list[str]:
        return list(self.settings.models)

    def check_predecessors(self) -> None:
        for name, role in self.roles.items():
            if role.settings.verbalizers is not None:
                raise ConfigError(
                    f"verbalize.models names the {name}, but {name}.verbalizers has trained ones already "
                    f"({role.settings.verbalizers}); remove one of the two"
                )

    def build(self) -> VerbalizeModule:
        backbones, needs_last = {}, self.settings.needs_last
        for name, role in self.roles.items():
            spec = role.spec()  # the objective is told, not compared: any verbalizers that fit may be used
            spec = dataclasses.replace(spec, made_for=spec.made_for | {"objective": self.settings.objective})
            verbalizers = Verbalizers(spec, self.config.impl)
            # where the last layer is not read, what lies above the deepest target layer has no say
            model = self.load_model(name, depth=None if needs_last else role.depth)
            backbones[name] = VerbalizedBackbone(
                model, role.layers, verbalizers, train_backbone=False, needs_last=needs_last
            )
        return VerbalizeModule(backbones, self.head_options, self.settings.objective)

    def save(self, module: VerbalizeModule) -> None:
        for name, backbone in module.backbones.items():
            backbone.verbalizers.save_pretrained(self.folder / name)
