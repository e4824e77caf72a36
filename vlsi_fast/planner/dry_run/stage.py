"""A stage of the config without checkpoints or rows: its own module at real sizes, and one step of it.

The stage's `build` runs as it is; only what reads a folder is replaced. The step is a forward and a backward of the
longest micro-batch and the optimizer step behind it, in the state of a run under way: moments exist, and so do
gradients of earlier micro-batches. It takes one of two forms:

* training.deepspeed set: weights in `dtype`, without autocast; float32 masters, moments and gradients beside them,
  stepped a sub-group at a time as DeepSpeed's stage3.py does. Nothing is sharded or gathered: one rank has it all
* else: trained weights in float32 under autocast, `torch.optim.AdamW`
"""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from vlsi_kernels import TeacherTargets

from ...acceleration import attention_name, use_packing
from ...attention import VARLEN, set_varlen
from ...backbones import family_of
from ...config import RunConfig
from ...data.collate import Collator
from ...data.packing import Packer
from ...hidden_states import Held, VerbalizedBackbone
from ...loading import cut_config
from ...losses import AnswerLoss, LogitL2, MatchedDivergence, OwnOutputLoss, PairwiseKL
from ...matching import draw_generator
from ...ranks.shard_loading import empty_model, model_class
from ...stages import STAGE_CLASSES
from ...stages import stage as stages
from ...stages.batches import StageCollator, restore_shared, to_device
from ...stages.interact import InteractStage
from ...stages.verbalize import VerbalizeStage
from ...teacher import drop_head, held
from ...teacher_cache.forms import pack_targets
from ...teacher_cache.recalling import Said
from ...verbalizer import Verbalizers
from ..build import Models
from ..memory import Batch, Setup
from ..recalled import recalled_of
from ..report import Rows
from ..shapes import ModelShape
from .device import DEVICE
from .optimizers import Masters, Plain, tensors_of
from .rows import row_of, shorter, vision_inputs
from .tape import Tape

LOSSES = (AnswerLoss, LogitL2, MatchedDivergence, OwnOutputLoss, PairwiseKL)


class UnloadedRole(stages.Role):
    """A role whose checkpoint is not there. Its processor holds what collating rows asks of one."""

    facts: dict[str, Any] = {}

    def __init__(self, name: str, config: RunConfig, models: Models):
        self.name, self.run, self.settings = name, config, getattr(config, name)
        self.folder = Path(self.settings.path)
        self.config, self.layers = models.configs[name], models.layers[name]
        self.processor = SimpleNamespace(
            tokenizer=SimpleNamespace(pad_token_id=0),
            image_processor=SimpleNamespace(model_input_names=vision_inputs(self.config)),
        )

        self._models = models

    @property
    def _student(self) -> UnloadedRole:
        return UnloadedRole("student", self.run, self._models)

    def trained_verbalizers(self) -> Verbalizers:
        """Theirs in shape."""
        return Verbalizers(self.spec(), self.run.impl).requires_grad_(False)


def stock_model(config, dtype: str, attention: str, depth: int | None = None) -> nn.Module:
    """A model of a transformers config as `load_backbone` returns one, but as initialised, on the default device."""
    config = copy.deepcopy(config)
    if depth is not None:
        cut_config(config, depth)
    stock = "sdpa" if attention == VARLEN else attention
    model = model_class(config)._from_config(config, dtype=getattr(torch, dtype), attn_implementation=stock)
    model.tie_weights()
    if attention == VARLEN:
        set_varlen(model)
    return model.requires_grad_(False).eval()


def backbones_of(module: nn.Module) -> dict[str, VerbalizedBackbone]:
    """Role -> its backbone in a stage's module."""
    found = getattr(module, "backbones", None)
    return {role: found[role] if found is not None else getattr(module, role) for role in module.roles}


class _Cache:
    """A teacher's cache that is not there; one stands for several."""

    folder = Path("cache")
    name = "cache"

    def __init__(self, models: Models):
        self._recalled, self._dtype = recalled_of(models), getattr(torch, models.config.dtype)
        self.config = models.configs["teacher"]
        self.layers = list(range(1, self._recalled.layers + 1))
        self.identity = {"vocab_size": min(self._recalled.rows, models.shapes["student"].vocab)}
        self.form = self._recalled.form
        self.weight: Tensor | None = None

    def head(self, device: torch.device) -> Tensor:
        """On the device, beside hidden states."""
        self.weight = torch.empty(self._recalled.rows, self._recalled.width, dtype=self._dtype, device=device)
        return self.weight

    def row(self, labels: Tensor) -> Said:
        """What is kept of a row."""
        found, tokens = self._recalled, int((labels[:, 1:] != -100).sum())
        if found.has_states:
            return Said(0, 1, {"hidden": torch.zeros(tokens, found.read, found.width, dtype=self._dtype)})
        zeros = torch.zeros(found.read, tokens, found.student_width)
        return Said(0, 1, pack_targets(TeacherTargets(zeros[:, :, 0], zeros, found.rows, 1.0), found.numbers))


class DryStage:
    """One stage of a config on the device.

    Args:
        models: the planner's, whose configs are those of the models that are built.
        name: of the stage.
        setup: how it runs, as the planner sees it.
        rows: lengths of a row.
    """

    def __init__(self, models: Models, name: str, setup: Setup, rows: Rows):
        self.config, self.models, self.setup, self.rows = models.config, models, setup, rows
        self.training = self.config.stage_training(name)
        self.notes: list[str] = []
        if name == "interact" and self.config.teacher.window not in ("auto", 1):
            self._note("teacher.window is 1 here: the teacher runs for each micro-batch")
        if self.training.persist_heads is True:
            self._note("training.persist_heads is false here: one micro-batch is a whole optimizer step")
        self.planned: dict[str, Batch] = {}
        """Role -> its micro-batch, for the planner."""
        stage = self.stage = STAGE_CLASSES[name](self.config)
        stage.roles = {role: UnloadedRole(role, self.config, models) for role in stage.role_names()}
        stage.args = SimpleNamespace(device=DEVICE, deepspeed=self.training.deepspeed)
        stage.teacher_mode = setup.teacher_mode
        self.cache = None
        if setup.teacher_mode == "cached" and "teacher" in self.config.interact.roles:
            self.cache = _Cache(models)
            stage.caches = [self.cache]
        self.packed = {
            name: use_packing(self.config.data.padding_free, self._attention(name), role.config)
            for name, role in stage.roles.items()
        }

    def _attention(self, name: str) -> str:
        """As the stage chooses it on a machine without flash-attn, whose operators take no tensors without storage."""
        asked, role = self.stage.roles[name].settings.attn_implementation, self.stage.roles[name]
        if asked.startswith("flash_attention"):
            self._note(f"{name}: flash_varlen in place of {asked}")
            asked = "auto"
        with (
            mock.patch("transformers.utils.is_flash_attn_2_available", lambda: False),
            mock.patch("transformers.utils.is_flash_attn_3_available", lambda: False),
        ):
            return attention_name(asked, self.config.dtype, DEVICE, self.config.data.padding_free, role.config)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    # ---- what is built ----

    def build(self, tape: Tape) -> nn.Module:
        """The stage's module on the device, and its optimizer."""
        with (
            mock.patch.object(stages, "load_backbone", self._student),
            mock.patch.object(stages, "load_teacher", self._teacher),
            mock.patch.object(stages, "read_head", self._head),
            mock.patch.object(stages, "final_norm_of", self._norm),
            mock.patch.object(VerbalizeStage, "_translation", self._translation),
            mock.patch.object(VerbalizeStage, "_common_tokens", self._common_tokens),
            mock.patch.object(stages.Stage, "_attention", lambda stage, name: self._attention(name)),
            mock.patch.object(InteractStage, "_window", lambda stage: 1),
            mock.patch.object(stages.Stage, "_persists_heads", lambda stage: False),
            torch.device("meta"),
        ):
            module = self.module = self.stage.build()
        if self.setup.zero is not None:
            for parameter in module.parameters():  # as DeepSpeed does
                parameter.data = parameter.data.to(getattr(torch, self.config.dtype))
        else:
            stages._keep_master_weights(module)
        module.train()
        self._hold(tape)
        self._watch(tape)
        trained = [p for p in module.parameters() if p.requires_grad]
        lone = self.setup.zero is None
        self.optimizer = (Plain if lone else Masters)(trained, self.setup, self.training, tape)
        return module

    def _student(self, folder, dtype: str, attention: str, depth: int | None = None) -> nn.Module:
        return self._empty("student", dtype, attention, depth)

    def _teacher(
        self, folder, mode: str, dtype: str, attention: str, depth: int | None, args, has_head: bool
    ) -> nn.Module | Held:
        model = self._empty("teacher", dtype, attention, depth)
        if not has_head:
            drop_head(model)
        if mode == "zero3":
            return model
        if mode != "replicated":
            self._note(f"the teacher is on the GPU in {dtype}, as in teacher.mode replicated and not {mode}")
        return held(model)

    def _empty(self, role: str, dtype: str, attention: str, depth: int | None) -> nn.Module:
        with torch.device("meta"), no_init_weights():
            return stock_model(self.models.configs[role], dtype, attention, depth)

    # what translating verbalizers start from and speak through

    def _head(self, folder, config, dtype: str) -> Tensor:
        text = config.get_text_config()
        return torch.empty(text.vocab_size, text.hidden_size, dtype=getattr(torch, dtype), device="meta")

    def _norm(self, folder, config, dtype: torch.dtype, device) -> nn.Module:
        return copy.deepcopy(family_of(config).final_norm(empty_model(config))).to(dtype).requires_grad_(False)

    def _translation(self) -> Tensor:
        widths = (self.models.shapes[name].width for name in ("student", "teacher"))
        return torch.empty(*widths, device="meta")

    def _common_tokens(self) -> Tensor:
        vocabulary = min(shape.vocab for shape in self.models.shapes.values())  # at most
        return torch.empty(2, vocabulary, dtype=torch.long, device="meta")

    def _hold(self, tape: Tape) -> None:
        """Weights to the columns of the planner."""
        languages = [backbone.language for backbone in backbones_of(self.module).values()]
        for language in filter(None, languages):  # a head that is the student's own is moved to its column below
            for tensor in (*language.final_norm.parameters(), language.head_weight):
                tape.hold(tensor, "teacher")
        for role, backbone in backbones_of(self.module).items():
            for tensor in (*backbone.model.parameters(), *backbone.model.buffers(), *backbone.parameters()):
                frozen = role == "teacher" and not tensor.requires_grad
                tape.hold(tensor, "teacher" if frozen else "parameters")
        if self.cache is not None and self.cache.weight is not None:
            tape.hold(self.cache.weight, "teacher")
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            if not tape.holds(tensor):
                tape.hold(tensor, "parameters")

    def _watch(self, tape: Tape) -> None:
        """Name the parts of a step by the modules that run."""
        for role, backbone in backbones_of(self.module).items():
            family = backbone.family
            _part(tape, family.backbone(backbone.model), f"{role} forward")
            for part in family.vision(backbone.model):
                if isinstance(part, nn.Module):
                    _part(tape, part, f"{role} vision")
            if backbone.verbalizers is not None:
                _part(tape, backbone.verbalizers, f"{role} verbalizers")
        for module in self.module.modules():
            if isinstance(module, LOSSES):
                _part(tape, module, "heads")

    # ---- what is read ----

    def batch(self, tape: Tape) -> dict[str, Any]:
        """The longest micro-batch on the device, as `StageModule.forward` takes it. All those of an optimizer step are
        there at once; the others are `self.waiting`."""
        count = self.training.per_device_train_batch_size
        made: dict[tuple, list[dict]] = {}
        rows: list[dict] = [{"id": str(i), "skipped": []} for i in range(count)]
        roles = {name: self.stage.roles[name] for name in self.module.roles}
        for name, role in roles.items():
            found = row_of(role.config, self.rows)
            self.planned[name] = self._planned(found, self.models.shapes[name], count, self.packed[name])
            key = (role.config.model_type, *(tuple(value.shape) for value in found.values()))
            # padded rows of one length would need no mask, and hardly ever are
            others = found if self.packed[name] else shorter(found)
            same = made.setdefault(key, [found] + [dict(others) for _ in range(count - 1)])
            for row, encoded in zip(rows, same):
                row[name] = encoded
                if self.cache is not None:
                    row["taught"] = self.cache.row(encoded["labels"])
        packers = {name: Packer(role.config) for name, role in roles.items() if self.packed[name]}
        processors = {name: role.processor for name, role in roles.items()}
        collate = Collator(processors, packers=packers)
        whole = StageCollator(collate, self.module.roles)(rows)
        batch = to_device(whole["batch"], DEVICE)
        restore_shared(batch, whole["facts"])
        own = list({id(tensor): tensor for tensor in tensors_of(batch)}.values())
        self.waiting = [torch.empty_like(tensor) for tensor in own for _ in range(self.setup.accumulation - 1)]
        for tensor in (*own, *self.waiting):
            tape.hold(tensor, "inputs")
        self.answers = whole["facts"]["answer_tokens"]
        return batch

    @staticmethod
    def _planned(row: dict[str, Tensor], shape: ModelShape, rows: int, packed: bool) -> Batch:
        """The same micro-batch for the planner."""
        tokens, answers = row["input_ids"].shape[1], int((row["labels"][:, 1:] != -100).sum())
        patches = row["pixel_values"].shape[0]
        if row["pixel_values"].dim() > 2:  # whole pictures or tiles, one row's
            patches = row["pixel_values"].shape[:-3].numel() * (row["pixel_values"].shape[-1] // shape.image_size) ** 2
        return Batch(rows, tokens, rows * answers, rows * patches, masked=rows > 1 and not packed or shape.masked)

    # ---- the step ----

    def micro_step(self, batch: dict[str, Any], tape: Tape) -> None:
        """Forward and backward."""
        options = dict(self.module.schedule(0.0))
        if self.module.matrix_shape is not None:
            options["generator"] = draw_generator(self.config.seed, 0, 0)
        low = self.setup.zero is None and self.config.dtype != "float32"
        with torch.autocast("cuda", torch.bfloat16) if low else contextlib.nullcontext():
            output = self.module(**batch, **options)
        loss = output["loss"] * (self.answers / (self.answers * self.setup.accumulation))
        del output
        with tape.backward():
            loss.backward()

    def step(self, tape: Tape) -> None:
        """The optimizer's."""
        with tape.inside("optimizer", column="optimizer"):
            self.optimizer.step()


def _part(tape: Tape, module: nn.Module, name: str) -> None:
    """What a module's forward runs is a part of its own."""
    open_: list[contextlib.ExitStack] = []

    def enter(*_):
        stack = contextlib.ExitStack()
        stack.enter_context(tape.inside(name))
        open_.append(stack)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(lambda *_: open_.pop().close(), always_call=True)
