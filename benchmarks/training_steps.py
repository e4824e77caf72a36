"""What profile_throughput runs: Qwen2-VL-shaped models with random weights, synthetic batches, the three stages' steps.

Steps are put together from the trainer's own modules as `vlsi_fast.stages` does; the stages themselves are not used,
since reading their configs needs packages that a bare machine lacks. LoRA is written out for the same reason: peft's
arithmetic, y + up(down(x)) at rank = alpha.
"""

from __future__ import annotations

import re
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from shapes import Backbone, Vision
from torch import Tensor, nn

from vlsi_fast.backbones import family_of
from vlsi_fast.hidden_states import VerbalizedBackbone, answer_positions, checkpoint_activations
from vlsi_fast.losses import AnswerLoss, OperatorOptions, PairwiseKL, pick
from vlsi_fast.matching import draw_generator, match_layers
from vlsi_fast.verbalizer import Verbalizers, VerbalizerSpec

LORA_RANK = 64
LEARNING_RATE = 1e-4
SPECIAL = 4
"""Ids at the end of the shared vocabulary: image, video, start and end of vision."""


@dataclass(frozen=True)
class Setting:
    """Models and the batch of one micro-step."""

    teacher: Backbone
    student: Backbone
    vision: Vision
    rows: int
    side: int  # patches a side of an image, one image a row
    prompt_tokens: int  # a row's text before the answer
    answer_tokens: int

    @property
    def vocab(self) -> int:
        """Rows of both heads that take part."""
        return min(self.teacher.vocab, self.student.vocab)

    @property
    def text_ids(self) -> int:
        """Ids below this are text, the SPECIAL ones from here on mean the same to both models."""
        return self.vocab - SPECIAL

    @property
    def image_tokens(self) -> int:
        """Of one row."""
        return (self.side // self.vision.merge) ** 2

    @property
    def positions(self) -> int:
        """Of one row."""
        return self.image_tokens + 2 + self.prompt_tokens + self.answer_tokens


# ---- time by parts ----


class Parts:
    """Exclusive time of named parts of a step: a part inside another is not counted in the outer one."""

    def __init__(self, device: torch.device):
        self.device, self.stack, self.marks = device, [], []

    @contextmanager
    def __call__(self, name: str):
        self.enter(name)
        yield
        self.leave()

    def enter(self, name: str) -> None:
        self.stack.append(name)
        self._mark(name)

    def leave(self) -> None:
        self.stack.pop()
        self._mark(self.stack[-1] if self.stack else None)

    def watch(self, module: nn.Module, name: str) -> None:
        """Counts the module's forward as a part."""
        module.register_forward_pre_hook(lambda *_: self.enter(name))
        module.register_forward_hook(lambda *_: self.leave())

    def _mark(self, name: str | None) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        else:
            event = time.perf_counter()
        self.marks.append((name, event))

    def seconds(self) -> dict[str, float]:
        """Part -> seconds since the last call."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, float] = {}
        for (name, began), (_, ended) in zip(self.marks, self.marks[1:]):
            if name is not None:
                spent = began.elapsed_time(ended) / 1e3 if self.device.type == "cuda" else ended - began
                found[name] = found.get(name, 0.0) + spent
        self.marks.clear()
        return found


# ---- models and batches ----


def build_model(setting: Setting, backbone: Backbone, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A stock model with random weights, frozen, in eval mode."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    half, vision, special = backbone.width // backbone.heads // 2, setting.vision, setting.text_ids
    temporal = half // 4
    height = (half - temporal) // 2
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": backbone.vocab,
            "hidden_size": backbone.width,
            "intermediate_size": backbone.ffn,
            "num_hidden_layers": backbone.depth,
            "num_attention_heads": backbone.heads,
            "num_key_value_heads": backbone.kv_heads,
            "rope_parameters": {"rope_type": "default", "mrope_section": [temporal, height, half - temporal - height]},
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={
            "depth": vision.depth,
            "embed_dim": vision.width,
            "hidden_size": backbone.width,
            "num_heads": vision.heads,
            "mlp_ratio": vision.mlp_ratio,
            "patch_size": vision.patch,
            "spatial_merge_size": vision.merge,
        },
        image_token_id=special,
        video_token_id=special + 1,
        vision_start_token_id=special + 2,
        vision_end_token_id=special + 3,
        tie_word_embeddings=backbone.tied,
    )
    with torch.device(device):  # made where it is used: filling billions of weights on a CPU takes minutes
        model = Qwen2VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.requires_grad_(False).eval()


def make_batch(setting: Setting, device: torch.device, seed: int = 0) -> dict[str, object]:
    """Rows of one length: an image, a prompt, an answer. As `StageModule.forward` takes them."""
    generator = torch.Generator().manual_seed(seed)
    text = setting.text_ids
    ids = torch.randint(text, (setting.rows, setting.positions), generator=generator)
    image = slice(1, 1 + setting.image_tokens)
    ids[:, 0], ids[:, image], ids[:, image.stop] = text + 2, text, text + 3
    kinds = torch.zeros_like(ids)
    kinds[:, image] = 1
    labels = torch.full_like(ids, -100)
    labels[:, -setting.answer_tokens :] = ids[:, -setting.answer_tokens :]
    patches, values = setting.rows * setting.side**2, 3 * 2 * setting.vision.patch**2
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": kinds,
        "pixel_values": torch.randn(patches, values, generator=generator),
        "image_grid_thw": torch.tensor([[1, setting.side, setting.side]] * setting.rows),
    }
    index, answers = answer_positions(labels)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    return {"inputs": inputs, "index": index.to(device), "labels": answers.to(device)}


class LoRA(nn.Module):
    """A frozen linear layer and its trained low-rank update, kept in float32."""

    def __init__(self, base: nn.Linear, rank: int = LORA_RANK):
        super().__init__()
        self.base = base
        options = {"dtype": torch.float32, "device": base.weight.device}
        self.down = nn.Parameter(torch.randn(rank, base.in_features, **options) * base.in_features**-0.5)
        self.up = nn.Parameter(torch.randn(base.out_features, rank, **options) * 1e-4)

    def forward(self, x: Tensor) -> Tensor:
        update = nn.functional.linear(nn.functional.linear(x.to(self.down.dtype), self.down), self.up)
        y = self.base(x)
        return y + update.to(y.dtype)


def add_lora(model: nn.Module) -> list[nn.Parameter]:
    """LoRA on every linear layer of the language model. Returns what is trained."""
    wanted = re.compile(family_of(model.config).lora_targets)
    trained = []
    for name, module in list(model.named_modules()):
        if wanted.fullmatch(name):
            parent, _, child = name.rpartition(".")
            layer = LoRA(module)
            setattr(model.get_submodule(parent), child, layer)
            trained += [layer.down, layer.up]
    return trained


def speak(model: nn.Module, backbone: Backbone, train_backbone: bool, verbalize: bool) -> VerbalizedBackbone:
    """A model with verb-FFN verbalizers in float32, as trained ones are."""
    verbalizers = None
    if verbalize:
        spec = VerbalizerSpec("verb_ffn", backbone.target_layers, backbone.width, backbone.ffn, 1e-6)
        with torch.device(next(model.parameters()).device):
            verbalizers = Verbalizers(spec)
    return VerbalizedBackbone(model, list(backbone.target_layers), verbalizers, train_backbone)


# ---- steps ----


class Step:
    """One stage: calling it makes a micro-step and its optimizer step."""

    max_grad_norm = 1.0
    """The stage's default; 0: no clipping."""

    def __init__(self, setting: Setting, device: torch.device, dtype: torch.dtype):
        self.setting, self.device, self.dtype = setting, device, dtype
        self.parts, self.batch = Parts(device), make_batch(setting, device)
        self.options = OperatorOptions(setting.vocab)
        self.count = 0

    def model(self, role: str) -> nn.Module:
        """A role's stock model, its forward watched."""
        model = build_model(self.setting, getattr(self.setting, role), self.device, self.dtype)
        family = family_of(model.config)
        self.parts.watch(family.backbone(model), f"{role} language model")
        (tower,) = family.vision(model)
        self.parts.watch(tower, f"{role} vision")
        return model

    def autocast(self):
        """bfloat16 products over float32 trained weights; nothing where the run is float32."""
        low = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype) if low else nullcontext()

    def train(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
        self.trained = parameters
        self.optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=0.0)

    def loss(self) -> Tensor:
        raise NotImplementedError

    def __call__(self) -> None:
        with self.parts("other"):
            with self.autocast():
                loss = self.loss()
            with self.parts("backward"):
                loss.backward()
            with self.parts("optimizer"):
                if self.max_grad_norm:
                    nn.utils.clip_grad_norm_(self.trained, self.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
        self.count += 1

    def spoken(self, role: str, backbone: VerbalizedBackbone) -> tuple[Tensor | None, Tensor]:
        """What a model says at its target layers; the time beyond its own forward is the verbalizers' and norm's."""
        with self.parts(f"{role} verbalizers"):
            return backbone(self.batch["inputs"], self.batch["index"])


class VerbalizeStep(Step):
    """Stage verbalize: verbalizers of both models against the answers."""

    max_grad_norm = 0.0

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.backbones, self.heads, trained = {}, {}, []
        for role in ("teacher", "student"):
            one = speak(self.model(role), getattr(self.setting, role), False, True)
            self.backbones[role], self.heads[role] = one.train(), AnswerLoss(one.head_weight, self.options)
            trained += list(one.verbalizers.parameters())
        self.train(trained)

    def loss(self) -> Tensor:
        losses = []
        for role, backbone in self.backbones.items():
            said, _ = self.spoken(role, backbone)
            with self.parts("head statistics"):
                losses.append(self.heads[role](said, self.batch["labels"]).sum())
        return sum(losses)


class InteractStep(Step):
    """Stage interact: LoRA on the student by the KLs of matched layers and of the last one."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        model = self.model("student")
        trained = add_lora(model)
        checkpoint_activations(model)
        self.student = speak(model, self.setting.student, True, True)
        self.teacher = speak(self.model("teacher"), self.setting.teacher, False, True)
        for backbone in (self.student, self.teacher):
            backbone.verbalizers.requires_grad_(False)
            backbone.train()
        self.pairwise_kl = PairwiseKL(self.student.head_weight, self.teacher.head_weight, self.options)
        self.train(trained)

    def loss(self) -> Tensor:
        said, last = self.spoken("student", self.student)
        with torch.no_grad():
            teacher_said, teacher_last = self.spoken("teacher", self.teacher)
        with self.parts("head statistics"):
            student, teacher = torch.cat([said, last[None]]), torch.cat([teacher_said, teacher_last[None]])
            both = self.pairwise_kl(student, teacher)
        with self.parts("matching"):
            matches = match_layers(both[:-1, :-1], generator=draw_generator(0, self.count, 0))
            return pick(both[:-1, :-1], matches).sum() + both[-1, -1]


class SftStep(Step):
    """Stage sft: all of the student's language model against the answers."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        model = self.model("student")
        (tower,) = family_of(model.config).vision(model)
        frozen = {id(p) for p in tower.parameters()}
        trained = [p for p in model.parameters() if id(p) not in frozen]
        checkpoint_activations(model)
        self.train(trained)
        self.student = speak(model, self.setting.student, True, False).train()
        self.head = AnswerLoss(self.student.head_weight, self.options)

    def loss(self) -> Tensor:
        with self.parts("student verbalizers"):  # there are none: what is left is taking the answers' positions
            _, last = self.student(self.batch["inputs"], self.batch["index"])
        with self.parts("head statistics"):
            return self.head(last[None], self.batch["labels"]).sum()


STEPS = {"verbalize": VerbalizeStep, "interact": InteractStep, "sft": SftStep}
