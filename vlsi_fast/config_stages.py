"""Options of each stage, and what they ask for: what a stage runs, reads and learns follows from them here alone."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, the string under a field is its documentation."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)


class StageSection(Section):
    """What all three stages have."""

    training: dict[str, Any] = {}
    """Fields of `training` that this stage overrides."""


class VerbalizeConfig(StageSection):
    """Stage 1: teach each target layer to speak through the frozen head (section 3.1)."""

    training: dict[str, Any] = {"max_grad_norm": 0.0}
    """Fields of `training` that this stage overrides. No clipping by default: a global norm would couple the layers."""
    models: list[Literal["student", "teacher"]] = ["student", "teacher"]
    """Whose verbalizers to train: both at once, or one here and the other in a run of its own (see .verbalizers)."""
    objective: Literal["answers", "own_output", "both"] = "answers"
    """What a layer learns to say: answers, the labels (autoregressive loss, the paper's); own_output, what the model's
    own last layer says at the answer positions (KL(last layer || verbalized layer), in nats a token); both: their sum.
    All but answers run the model to its last layer."""

    @property
    def needs_last(self) -> bool:
        """Whether the models' own last layers are read."""
        return self.objective != "answers"

    @model_validator(mode="after")
    def _some_model(self):
        if not self.models or len(set(self.models)) != len(self.models):
            raise ValueError(f"verbalize.models must name student, teacher or both, once each; got {self.models}")
        return self


class InteractConfig(StageSection):
    """Stage 2: match layers and distil (section 3.2); the two operations are table 4d's."""

    intermediate: Literal["kld", "ce", "l2", "none"] = "kld"
    """Loss of the target layers: KL or L2 (logits) to the matched teacher layer, or CE on the answers."""
    last: Literal["kld", "ce", "l2", "none"] = "kld"
    """Loss of the last layer: KL or L2 (logits) to the teacher's last layer, or CE on the answers."""
    intermediate_weight: float = Field(1.0, gt=0)
    """Factor of the target layers' losses beside the last layer's (the paper: 1)."""
    intermediate_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of intermediate_weight over the stage's optimizer steps: as it is, or down to 0 like a learning rate
    (whole at the first step, 0 after the last), by a line or half a cosine. metrics.jsonl has each step's."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """What kld stands for, p the teacher's and q the student's distribution: forward_kl, KL(p || q), the paper's;
    reverse_kl, KL(q || p); jsd, beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q. Layers are
    matched by the forward KL all the same; each further pair of layers then costs a pass over the vocabulary."""
    jsd_beta: float = Field(0.5, gt=0, lt=1)
    """beta of divergence jsd, the teacher's share of m (as TRL's GKD has it)."""
    headless: bool = False
    """Appendix D's ablation: no head; verb-FFN outputs matched by L2, the student's widened to the teacher's width."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of both distributions in kld; the loss is multiplied by its square."""
    train_student_verbalizers: bool = False
    """Train the student's verbalizers along with LoRA (the paper keeps them frozen)."""

    @property
    def beta(self) -> float:
        """`divergence` as `vlsi_kernels.linear_divergence` counts it: 0 forward KL, 1 reverse KL."""
        return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": self.jsd_beta}[self.divergence]

    @property
    def roles(self) -> list[str]:
        """The models that the stage runs."""
        return ["student", "teacher"] if self.matches_layers or self.needs_teacher_last else ["student"]

    @property
    def speakers(self) -> list[str]:
        """The models that speak through trained verbalizers."""
        if not self.has_layer_loss or self.headless:
            return []
        return ["student", "teacher"] if self.matches_layers else ["student"]

    @property
    def has_layer_loss(self) -> bool:
        """Whether target layers have a loss, of whatever kind."""
        return self.intermediate != "none"

    @property
    def has_last_loss(self) -> bool:
        """Whether the last layer has a loss, of whatever kind."""
        return self.last != "none"

    @property
    def needs_teacher_last(self) -> bool:
        """Whether the teacher's last layer is read."""
        return self.last in ("kld", "l2")

    @property
    def matches_layers(self) -> bool:
        """Whether each of the student's target layers learns from a teacher layer that is chosen for it."""
        return self.intermediate in ("kld", "l2")

    @property
    def matches_by_kl(self) -> bool:
        """Whether layers are chosen by the KL of what they say (headless: by the distance of hidden states)."""
        return self.matches_layers and not self.headless

    @property
    def layers_by_forward_kl(self) -> bool:
        """Whether the target layers' loss is the KL by which they are matched."""
        return self.intermediate == "kld" and self.kld_is_forward

    @property
    def layers_by_other_divergence(self) -> bool:
        """Whether pairs of layers, once matched, are compared anew for the loss."""
        return self.intermediate == "kld" and not self.kld_is_forward

    @property
    def last_by_forward_kl(self) -> bool:
        """Whether the last layer's loss comes from the same vocabulary pass as the KLs of all layers."""
        return self.last == "kld" and self.kld_is_forward

    @property
    def last_by_other_divergence(self) -> bool:
        """Whether the last layers are compared by another divergence than the forward KL."""
        return self.last == "kld" and not self.kld_is_forward

    @property
    def learns_by_forward_kl(self) -> bool:
        """Whether any layer's loss is the forward KL; where it only drives the matching, it has no gradient."""
        return self.layers_by_forward_kl or self.last_by_forward_kl

    @property
    def reads_teacher_layers(self) -> bool:
        """Whether a loss reads hidden states of the teacher's target layers, beyond what the forward KL needs."""
        return self.intermediate == "l2" or self.layers_by_other_divergence

    @property
    def reads_teacher_last(self) -> bool:
        """Whether a loss reads the teacher's last hidden state, beyond what the forward KL needs."""
        return self.last == "l2" or self.last_by_other_divergence

    @property
    def kld_is_forward(self) -> bool:
        """Whether kld stands for the forward KL, the paper's."""
        return self.divergence == "forward_kl"

    @property
    def learns_answers(self) -> bool:
        """Whether any layer learns the answers themselves."""
        return "ce" in (self.intermediate, self.last)

    @property
    def trains_verbalizers(self) -> bool:
        """Whether the student's verbalizers are trained, and so a result."""
        return self.train_student_verbalizers or self.headless

    @model_validator(mode="after")
    def _check(self):
        if self.intermediate == self.last == "none":
            raise ValueError("interact.intermediate and interact.last are both none: nothing to learn; set one")
        if not self.kld_is_forward and "kld" not in (self.intermediate, self.last):
            raise ValueError(
                f"interact.divergence {self.divergence} is what kld stands for, and neither interact.intermediate nor "
                "interact.last is kld; set one of them, or remove divergence"
            )
        if self.jsd_beta != 0.5 and self.divergence != "jsd":
            raise ValueError("interact.jsd_beta belongs to interact.divergence jsd; set that, or remove jsd_beta")
        if self.intermediate_schedule != "constant" and "none" in (self.intermediate, self.last):
            raise ValueError(
                f"interact.intermediate_schedule {self.intermediate_schedule} hands over from the target layers to the "
                "last one: it needs both interact.intermediate and interact.last; set both, or remove it"
            )
        if self.intermediate == "none" and self.intermediate_weight != 1:
            raise ValueError("interact.intermediate_weight weighs nothing with interact.intermediate none; remove it")
        if self.headless and self.intermediate != "l2":
            raise ValueError("interact.headless matches verb-FFN outputs by L2: set interact.intermediate to l2")
        if self.train_student_verbalizers and (self.headless or self.intermediate == "none"):
            raise ValueError(
                "interact.train_student_verbalizers needs verbalizers in the loss: not with headless (which always "
                "trains the student's) nor with intermediate none; remove it"
            )
        return self


class SftConfig(StageSection):
    """Stage 3: autoregressive loss on the student alone (section 3.3)."""

    start_from: Literal["interact", "base"] = "interact"
    """The distilled student of stage 2, or student.path as it is (a control, or to train a model from scratch)."""
    method: Literal["full", "lora"] = "full"
    """All of the language model (embeddings, attention, FFN, head), or LoRA on it."""
    train_vision: bool = False
    """Train the vision tower as well (only with method full)."""

    @model_validator(mode="after")
    def _vision_needs_full(self):
        if self.train_vision and self.method != "full":
            raise ValueError("sft.train_vision needs sft.method full")
        return self
