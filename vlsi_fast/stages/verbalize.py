"""Stage 1, verbalize (section 3.1): each target layer of the frozen backbones learns to speak through the frozen head.

Trained: the verbalizers. Loss: the sum over models and target layers of the autoregressive loss on the answer tokens,
or of the KL from the model's own last layer, or of both (`verbalize.objective`); no gradient crosses from one layer's
verbalizer to another's.

A teacher that is to speak the student's language (`verbalizer.language`) learns the student's answer tokens, through
the student's norm and head, at its own positions that are aligned to them; its last layer does so, too.
"""

from __future__ import annotations

import dataclasses

import torch
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..config import ConfigError
from ..data.alignment import common_tokens
from ..data.encoding import end_of_turn
from ..data.tokens import shared_tokens
from ..hidden_states import VerbalizedBackbone
from ..losses import AnswerLoss, OperatorOptions, OwnHead, OwnOutputLoss
from ..ranks.sharding import rank
from ..terminal import say
from ..translation import answer_counts, some_answers, start_between, token_weights
from ..verbalizer import Verbalizers
from .module import StageModule
from .stage import Stage


class VerbalizeModule(StageModule):
    """Verbalizers of one or both models with their frozen backbones."""

    def __init__(
        self,
        backbones: dict[str, VerbalizedBackbone],
        options: OperatorOptions,
        objective: str = "answers",
        common_tokens: torch.Tensor | None = None,
    ):
        super().__init__(options.heads)
        self.roles, self.objective, self.common_tokens = tuple(backbones), objective, common_tokens
        self.backbones = torch.nn.ModuleDict(backbones)
        self.heads = torch.nn.ModuleDict({name: self._loss(b, options) for name, b in backbones.items()})
        self.part_names = [f"{name}_layer_{k}" for name, b in backbones.items() for k in b.target_layers]

    def _loss(self, backbone: VerbalizedBackbone, options: OperatorOptions) -> torch.nn.Module:
        if self.objective == "answers":
            return AnswerLoss(backbone.head_weight, options)
        own = None
        if backbone.language is not None:
            own = OwnHead(backbone.own_head_weight, self.common_tokens)
        return OwnOutputLoss(backbone.head_weight, options, with_answers=self.objective == "both", own=own)

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
        return self.config.read_by_verbalize

    @property
    def _translates(self) -> bool:
        return self.config.verbalizer.translates and "teacher" in self.settings.models

    def check_predecessors(self) -> None:
        if self._translates and self.settings.needs_last and rank() == 0:
            tokenizers = (self.roles[name].processor.tokenizer for name in ("student", "teacher"))
            if shared_tokens(*tokenizers).problem is not None:
                say(
                    f"verbalize.objective {self.settings.objective} with another tokenizer: where the teacher cuts "
                    "words into pieces, its own output is the first piece, and the student learns to say that; answers "
                    "is safer"
                )
        for name in self.settings.models:
            role = self.roles[name]
            if role.settings.verbalizers is not None:
                raise ConfigError(
                    f"verbalize.models names the {name}, but {name}.verbalizers has trained ones already "
                    f"({role.settings.verbalizers}); remove one of the two"
                )

    def build(self) -> VerbalizeModule:
        backbones, needs_last = {}, self.settings.needs_last
        for name in self.settings.models:
            role, translates = self.roles[name], name == "teacher" and self._translates
            spec = role.spec()  # the objective is told, not compared: any verbalizers that fit may be used
            spec = dataclasses.replace(spec, made_for=spec.made_for | {"objective": self.settings.objective})
            verbalizers = Verbalizers(spec, self.config.impl)
            if translates:
                verbalizers.start_at(self._translation())
            # where the last layer is not read, what lies above the deepest target layer has no say
            model = self.load_model(name, depth=None if needs_last or translates else role.depth)
            language = None
            if translates:
                language = self.student_language(backbones["student"].head_weight if "student" in backbones else None)
            backbones[name] = VerbalizedBackbone(
                model, list(spec.layers), verbalizers, train_backbone=False, needs_last=needs_last, language=language
            )
        tokens = self._common_tokens() if self._translates and needs_last else None
        return VerbalizeModule(backbones, self.head_options, self.settings.objective, tokens)

    def _common_tokens(self) -> torch.Tensor:
        """[2, K] ids of the tokens that both vocabularies have: the student's, the teacher's."""
        both = [self.roles[name].processor for name in ("student", "teacher")]
        return common_tokens(*(each.tokenizer for each in both), ends=tuple(map(end_of_turn, both)))

    def _translation(self) -> torch.Tensor | None:
        """Where the translation starts, on rank 0 (None on others under ZeRO-3)."""
        if rank() > 0 and is_deepspeed_zero3_enabled():
            return None
        sides = ((self.roles[name].folder, self.roles[name].config) for name in ("teacher", "student"))
        tokens = self._common_tokens()
        counts = answer_counts(some_answers(self.sources), self.roles["student"].processor, self.shared_rows)
        weight = token_weights(counts, tokens[0])
        return start_between(*sides, tokens, weight, self.args.device)

    def save(self, module: VerbalizeModule) -> None:
        for name, backbone in module.backbones.items():
            backbone.verbalizers.save_pretrained(self.folder / name)
