"""Stage 1, verbalize (section 3.1): each target layer of the frozen backbones learns to speak through the frozen head.

Trained: the verbalizers. Loss: the sum over models and target layers of the autoregressive loss on the answer tokens;
no gradient crosses from one layer's verbalizer to another's.
"""

from __future__ import annotations

import torch

from ..config import ConfigError
from ..losses import AnswerLoss
from ..verbalized import VerbalizedBackbone
from ..verbalizer import Verbalizers
from .base import StageModule
from .common import Stage


class VerbalizeModule(StageModule):
    """Verbalizers of one or both models with their frozen backbones."""

    def __init__(self, backbones: dict[str, VerbalizedBackbone], options):
        super().__init__()
        self.roles = tuple(backbones)
        self.backbones = torch.nn.ModuleDict(backbones)
        self.heads = torch.nn.ModuleDict({n: AnswerLoss(b.head_weight, options) for n, b in backbones.items()})
        self.part_names = [f"{name}_layer_{k}" for name, b in backbones.items() for k in b.target_layers]

    def forward(self, **roles) -> dict[str, torch.Tensor]:
        """See `StageModule`."""
        parts = []
        for name in self.roles:
            batch = roles[name]
            spoken, _ = self.backbones[name](batch["inputs"], batch["index"])
            parts.append(self.heads[name](spoken, batch["labels"]))
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
        backbones = {}
        for name, role in self.roles.items():
            verbalizers = Verbalizers(role.spec(), self.config.impl)
            model = self.load_model(name, depth=role.depth)  # what lies above the deepest target layer has no say
            backbones[name] = VerbalizedBackbone(
                model, role.layers, verbalizers, train_backbone=False, needs_last=False
            )
        return VerbalizeModule(backbones, self.head_options)

    def save(self, module: VerbalizeModule) -> None:
        for name, backbone in module.backbones.items():
            backbone.verbalizers.save_pretrained(self.folder / name)
