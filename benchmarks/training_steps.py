"""What profile_throughput runs: the trainer's own stages on models of real configs with random weights.

A stage is built by its own `make_trainer` and trained by its own Trainer: forward, backward, clipping, optimizer,
schedule, and the step's record. What differs from a run: no checkpoint is read or written, and rows are made up. They
go through the stage's own collator.
"""

from __future__ import annotations

import copy
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from shapes import Backbone, Vision
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from vlsi_fast.config import RunConfig, load_config
from vlsi_fast.loading import cut_config
from vlsi_fast.planner.build import Models
from vlsi_fast.planner.dry_run.rows import row_of
from vlsi_fast.planner.dry_run.stage import LOSSES, UnloadedRole, backbones_of, stock_model
from vlsi_fast.planner.report import Rows
from vlsi_fast.planner.shapes import read_config
from vlsi_fast.stages import STAGE_CLASSES
from vlsi_fast.stages import stage as stages
from vlsi_fast.stages.stage import Stage
from vlsi_fast.stages.trainer import StageTrainer
from vlsi_fast.teacher import drop_head, held, resolve_mode

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 2
"""Optimizer steps before those that are timed."""


@dataclass(frozen=True)
class Setting:
    """Models and rows of a step."""

    config: str  # of which run, in configs/
    rows: int  # of a micro-batch
    tokens: int  # of a row, all of one length
    image_tokens: int  # of them of its one image
    answer_tokens: int
    accumulation: int = 1  # micro-batches of an optimizer step
    small: tuple[Backbone, Backbone, Vision] | None = (
        None  # sizes of student, teacher and towers in place of the config's
    )


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
        module.register_forward_hook(lambda *_: self.leave(), always_call=True)

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


class Clock(TrainerCallback):
    """Seconds of each optimizer step and of its parts: from the end of the step before to its own."""

    def __init__(self, parts: Parts, finished):
        """`finished(step)` is called after each step with its number, from 1 on; its time is no step's."""
        self.parts, self.finished = parts, finished
        self.seconds: list[float] = []
        self.by_part: list[dict[str, float]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self._begin()

    def on_step_end(self, args, state, control, **kwargs):
        self.parts.leave()
        self.by_part.append(self.parts.seconds())  # waits for the device
        self.seconds.append(time.perf_counter() - self._began)
        self.finished(state.global_step)
        self._begin()

    def _begin(self) -> None:
        self._began = time.perf_counter()
        self.parts.enter("other")


def watch(trainer: StageTrainer, parts: Parts) -> None:
    """Name the parts of a trainer's step."""
    for role, backbone in backbones_of(trainer.module).items():
        family = backbone.family
        parts.watch(family.backbone(backbone.model), f"{role} language model")
        for part in family.vision(backbone.model):
            if isinstance(part, nn.Module):
                parts.watch(part, f"{role} vision")
        if backbone.verbalizers is not None:
            parts.watch(backbone.verbalizers, f"{role} verbalizers")
    for module in trainer.module.modules():
        if isinstance(module, (*LOSSES, EagerKL)):
            parts.watch(module, "head statistics")
    backward = trainer.accelerator.backward

    def watched(*arguments, **options):
        with parts("backward"):
            return backward(*arguments, **options)

    trainer.accelerator.backward = watched
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(lambda *_: parts.enter("optimizer"))
    trainer.optimizer.register_step_post_hook(lambda *_: parts.leave())


# ---- a peer ----


class EagerKL(nn.Module):
    """`losses.PairwiseKL` as one would write it first: both models' logits, and the KLs of all pairs from them."""

    def __init__(self, student_weight: Tensor, teacher_weight: Tensor, vocab_size: int):
        super().__init__()
        self._weights, self.vocab_size = (student_weight, teacher_weight), vocab_size

    def forward(self, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        """student [S, N, d_s], teacher [L, N, d_l] -> [S, L] float32 mean over tokens."""
        student_weight, teacher_weight = (weight[: self.vocab_size] for weight in self._weights)

        def log_softmax(hidden: Tensor, weight: Tensor) -> Tensor:
            return ((hidden.to(weight.dtype) @ weight.T).float() / temperature).log_softmax(-1)

        log_q, columns = [log_softmax(layer, student_weight) for layer in student], []
        for layer in teacher:
            with torch.no_grad():
                log_p = log_softmax(layer, teacher_weight)
                p = log_p.exp()
            columns.append(torch.stack([(p * (log_p - q)).sum(-1).mean() for q in log_q]))
        return torch.stack(columns, 1)


def make_eager(trainer: StageTrainer) -> None:
    """Put EagerKL in place of the trainer's own operators."""
    module = trainer.module
    module.pairwise_kl = EagerKL(
        module.student.head_weight, module.teacher.head_weight, module.pairwise_kl.options.vocab_size
    )


# ---- models and rows ----


def config_of(setting: Setting, out: Path, steps: int, dtype: str) -> RunConfig:
    """The setting's config, for so many optimizer steps of one process."""
    training = {
        "per_device_train_batch_size": setting.rows,
        "gradient_accumulation_steps": setting.accumulation,
        "max_steps": steps,
        "deepspeed": None,
        "report_to": [],
        "balance_batch": False,  # all rows are of one size
    }
    changes = {f"training.{name}": value for name, value in training.items()}
    changes |= {"output_dir": str(out), "dtype": dtype, "data.num_workers": 0, "sft.start_from": "base"}
    if setting.small is not None:
        for role, sizes in zip(("student", "teacher"), setting.small):
            changes[f"{role}.layers"] = list(sizes.target_layers)
    return load_config(ROOT / "configs" / setting.config, changes)


def models_of(config: RunConfig, setting: Setting) -> Models:
    """Both models' configs, the real ones or such of the setting's sizes."""
    configs = {role: read_config(getattr(config, role), role) for role in ("student", "teacher")}
    if setting.small is not None:
        for role, sizes in zip(configs, setting.small):
            configs[role] = resized(configs[role], sizes, setting.small[2])
    return Models(config, configs=configs)


def resized(config, sizes: Backbone, vision: Vision):
    """A Qwen2-VL config with other sizes. Its special tokens are the last ids of its vocabulary."""
    config = copy.deepcopy(config)
    cut_config(config, sizes.depth)
    text, tower = config.get_text_config(), config.vision_config
    text.hidden_size, text.intermediate_size, text.vocab_size = sizes.width, sizes.ffn, sizes.vocab
    text.num_attention_heads, text.num_key_value_heads = sizes.heads, sizes.kv_heads
    half = sizes.width // sizes.heads // 2
    temporal, height = half // 4, (half - half // 4) // 2
    text.rope_parameters = text.rope_parameters | {"mrope_section": [temporal, height, half - temporal - height]}
    tower.depth, tower.embed_dim, tower.num_heads = vision.depth, vision.width, vision.heads
    tower.hidden_size, tower.mlp_ratio = sizes.width, vision.mlp_ratio
    tower.patch_size, tower.spatial_merge_size = vision.patch, vision.merge
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    for i, name in enumerate(names):
        setattr(config, name, SMALL_VOCABULARY - len(names) + i)
    return config


SMALL_VOCABULARY = 4096
"""Of both models that `resized` makes: rows beyond it are padding."""


class MadeUpRows(torch.utils.data.Dataset):
    """Rows of an image, a question and an answer, as `data.VlsiDataset` gives them, with random contents."""

    def __init__(self, stage: Stage, setting: Setting, count: int):
        self.count, self.sources = count, SimpleNamespace(sizes=[count], weights=None)
        tokens, answers = setting.tokens, setting.answer_tokens
        rows = Rows(tokens, answers, tokens, answers, setting.image_tokens)
        generator = torch.Generator().manual_seed(0)
        self.row: dict[str, dict[str, Tensor]] = {}
        for name, role in stage.roles.items():
            row = row_of(role.config, rows)
            first = next(iter(self.row.values()), None)  # of one tokenizer and one image processor: the same row
            self.row[name] = row if first is None else first
            if first is None:
                special = role.config.image_token_id, role.config.vision_start_token_id, role.config.vision_end_token_id
                text = ~torch.isin(row["input_ids"], torch.tensor(special))
                row["input_ids"][text] = torch.randint(min(special), (int(text.sum()),), generator=generator)
                row["labels"] = torch.where(row["labels"] != -100, row["input_ids"], -100)
                row["pixel_values"].normal_(generator=generator)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"id": str(index), "skipped": [], "answered": False, **{n: dict(row) for n, row in self.row.items()}}


def build(name: str, config: RunConfig, models: Models, setting: Setting) -> tuple[Stage, StageTrainer]:
    """A stage, and its own trainer on models with random weights."""
    stage = STAGE_CLASSES[name](config)
    stage.args = stages.training_arguments(config, name)
    stage.args.save_strategy, stage.args.disable_tqdm = SaveStrategy.NO, True
    stage.roles = {role: UnloadedRole(role, config, models) for role in stage.role_names()}
    if "teacher" in stage.roles:
        stage.teacher_mode = resolve_mode(config.teacher.mode, stage.args.device)
    collator, own = stage._collator(), stage.build

    def student(folder: Path, dtype: str, attention: str, depth: int | None = None) -> nn.Module:
        return stock_model(models.configs["student"], dtype, attention, depth)

    def teacher(folder, mode: str, dtype: str, attention: str, depth: int | None, args, has_head: bool) -> nn.Module:
        model = stock_model(models.configs["teacher"], dtype, attention, depth)
        if not has_head:
            drop_head(model)
        return held(model)

    def build_there() -> nn.Module:
        with (
            mock.patch.object(stages, "load_backbone", student),
            mock.patch.object(stages, "load_teacher", teacher),
            torch.device(stage.args.device),  # filling billions of weights on a CPU takes minutes
        ):
            return own()

    stage.build = build_there
    count = setting.rows * setting.accumulation * config.stage_training(name).max_steps
    return stage, stage.make_trainer(MadeUpRows(stage, setting, count), collator)
