"""Stage 3, sft (section 3.3): the student alone, autoregressive loss on the answers.

Trained: all of the language model (embeddings, attention, FFN, head), or LoRA on it. With `start_from: base` the same
stage is the control without distillation, and, with `train_vision`, it trains a model from scratch.
"""

from __future__ import annotations

import torch

from ..backbones import family_of, require_dense
from ..hidden_states import VerbalizedBackbone
from ..lineage import checkpoint_digest, require_predecessor, rows_used
from ..losses import AnswerLoss, OperatorOptions
from .module import StageModule
from .stage import Stage


class SftModule(StageModule):
    """The student and the loss of its own last layer."""

    roles = ("student",)
    part_names = ["answer"]

    def __init__(self, student: VerbalizedBackbone, options: OperatorOptions):
        super().__init__(options.heads)
        self.student = student
        self.head = AnswerLoss(student.head_weight, options)

    def forward(self, student: dict) -> dict[str, torch.Tensor]:
        """See `StageModule`."""
        _, last = self.student(student["inputs"], student["index"])
        parts = self.head(last[None], student["labels"])
        return {"loss": parts.sum(), "parts": parts.detach()}


class SftStage(Stage):
    """Writes `sft/student`, a stock checkpoint with its processor."""

    name = "sft"
    sections = ("lora",)

    def role_names(self) -> list[str]:
        return ["student"]

    @property
    def source(self):
        """Folder of the checkpoint that training starts from."""
        return self.config.stage_dir("interact") / "student" if self._distilled else self.roles["student"].folder

    @property
    def _distilled(self) -> bool:
        return self.settings.start_from == "interact"

    def check_predecessors(self) -> None:
        if self._distilled:
            facts = self.roles["student"].facts
            needs = {name: facts[name] for name in ("path", "checkpoint", "tokenizer")}
            require_predecessor(self.config.stage_dir("interact"), "interact", {"student": needs})

    def inputs(self) -> dict[str, str]:
        return {"student": checkpoint_digest(self.source)} if self._distilled else {}

    def data_start(self) -> int:
        return rows_used(self.config.stage_dir("interact")) if self._distilled else 0

    def build(self) -> SftModule:
        model = self.load_model("student", self.source)
        if self.settings.method == "lora":
            self.adapter = self.add_lora(model)
        else:
            family = family_of(model.config)
            require_dense(family, "sft.method")
            model.requires_grad_(True)
            for part in family.vision(model):
                part.requires_grad_(self.settings.train_vision)
        self.enable_checkpointing(model)
        backbone = VerbalizedBackbone(model, self.roles["student"].layers, None, train_backbone=True)
        return SftModule(backbone, self.head_options)

    def save(self, module: SftModule) -> None:
        self.save_student(module.student.model, self.source, self.adapter)
