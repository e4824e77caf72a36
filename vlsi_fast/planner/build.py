"""From a run's config to what the planner walks: which role is frozen, adapted or trained whole, stage by stage."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import RunConfig
from ..loading import needed_depth, target_layers
from ..named_files import read_deepspeed
from ..ranks.secondary import KEY, ranks_per_node, resolved
from ..shrinking.record import SHRINK_NAME
from ..teacher import mode_under
from .memory import Batch, Setup, Spoken, check_zero, compute_bytes
from .recalled import recalled_of, teacher_beside
from .shapes import ModelShape, model_shape, read_config, verbalizer_sizes
from .walk import Step


class Models:
    """Both models of a run, built once without weights."""

    def __init__(
        self,
        config: RunConfig,
        paths: dict[str, str | None] | None = None,
        configs: dict[str, Any] | None = None,
    ):
        """`paths`: role -> a config.json to read in place of the checkpoint's. `configs`: those read already; then only
        these roles are built."""
        self.config = config
        self.configs, self.shapes, self.layers = {}, {}, {}
        beside = _student_beside(config, (paths or {}).get("student"))
        for role in configs or ("student", "teacher"):
            settings = getattr(config, role)
            path = (paths or {}).get(role) or (teacher_beside(config) if role == "teacher" else None)
            found = configs[role] if configs else read_config(settings, role, path)
            self.configs[role] = found
            self.shapes[role] = model_shape(found, role, config.lora)
            self.layers[role] = target_layers(settings, found, role, beside)

    def image_tokens(self, pixels: int) -> int:
        """Tokens of the student's language model for an image of so many pixels."""
        shape: ModelShape = self.shapes.get("student") or next(iter(self.shapes.values()))
        return shape.fixed_image or pixels // (shape.image_size**2 * shape.merge)


def _student_beside(config: RunConfig, path: str | None) -> RunConfig:
    """The config with the student in the folder of its config.json, where `vlsi_shrink.json` lies as well."""
    folder = Path(path).parent if path is not None and Path(path).is_file() else Path(path or "")
    if path is None or not (folder / SHRINK_NAME).is_file():
        return config
    return config.model_copy(update={"student": config.student.model_copy(update={"path": str(folder)})})


def setup_of(config: RunConfig, stage: str, ranks: int, device: str = "cuda", node: int | None = None) -> Setup:
    """How a stage of the config runs on so many ranks, `node` of them on each machine (None: as launched, or all on
    one). `teacher.window` auto is 1 here, and `training.persist_heads` auto is false; see `window.resolved_setup`."""
    training, window = config.stage_training(stage), config.teacher.window
    deepspeed = read_deepspeed(training.deepspeed)
    if deepspeed is not None:
        here = min(ranks, ranks_per_node()) if "WORLD_SIZE" in os.environ else ranks
        deepspeed = resolved(deepspeed, ranks, node or here)
    kind = ((deepspeed or {}).get("data_types") or {}).get("grad_accum_dtype")
    width, zero = compute_bytes(config), check_zero(deepspeed)
    return Setup(
        ranks=ranks,
        zero=zero,
        teacher_mode=stage_mode(config, stage, zero is not None),
        compute_bytes=width,
        accumulation=training.gradient_accumulation_steps,
        checkpointing=training.gradient_checkpointing,
        device=device,
        accumulate_bytes={"fp32": 4, "bf16": 2, "fp16": 2}.get(kind, width),
        secondary=(zero or {}).get(KEY, 1),
        window=1 if stage != "interact" or window == "auto" else min(window, training.gradient_accumulation_steps),
        persist_heads=training.persist_heads is True,
    )


def stage_mode(config: RunConfig, stage: str, zero3: bool) -> str:
    """`teacher.mode` of a stage, auto resolved; cached only where a stage reads the cache."""
    mode = "auto" if stage == "sft" else config.teacher.mode  # sft has no teacher
    return mode if (mode, stage) == ("cached", "interact") else mode_under(mode, zero3)


def step_of(models: Models, stage: str, setup: Setup, batch: Callable[[ModelShape], Batch]) -> Step:
    """What one stage of the config does; `batch` gives a micro-batch for a model."""
    config = models.config
    if stage == "interact" and setup.teacher_mode == "cached":
        make, recalled = _cached_roles, recalled_of(models) if "teacher" in config.interact.roles else None
    else:
        make, recalled = {"verbalize": _verbalize_roles, "interact": _interact_roles, "sft": _sft_roles}[stage], None
    roles = {role: _placed(spoken, role, setup) for role, spoken in make(models).items()}
    vocab = min([spoken.voice.vocab for spoken in roles.values()] + ([recalled.rows] if recalled else []))
    batches = {role: batch(spoken.shape) for role, spoken in roles.items()}
    return Step(stage, roles, batches, setup, vocab, getattr(config, stage), config.matching.k, recalled)


def _placed(spoken: Spoken, role: str, setup: Setup) -> Spoken:
    """The teacher held outside the module tree, where `teacher.mode` says so."""
    if role != "teacher" or setup.teacher_mode == "zero3":
        return spoken
    return dataclasses.replace(spoken, placement=setup.teacher_mode)


def _spoken(models: Models, role: str, mode: str, verbalized: bool, trained: bool, **extra: Any) -> Spoken:
    """A role; `verbalized`: whether its target layers speak."""
    shape, settings, layers = models.shapes[role], models.config.verbalizer, models.layers[role]
    depth, needs_last = shape.depth, extra.get("needs_last", True)
    output = models.shapes["teacher"].width if extra.pop("headless", False) else None
    language = models.shapes["student"] if role == "teacher" and settings.translates else None
    if language is not None:
        shape, output = shape.without_head(), language.width
    if not needs_last:  # layers that nothing reads are never built
        shape = shape.cut(needed_depth(models.configs[role], layers))
    there = layers if language is None else sorted({*layers, depth})
    heard = {*(layers if verbalized else ()), *([depth] if language is not None and needs_last else ())}
    if not heard:
        return Spoken(shape, mode, **extra)
    sizes = dict(zip(there, verbalizer_sizes(models.configs[role], there, settings, output, language is not None)))
    return Spoken(
        shape,
        mode,
        layers=len(layers) if verbalized else 0,
        verbalizer=settings.architecture,
        verbalizers=[sizes[k] for k in there if k in heard],
        silent=[sizes[k] for k in there if k not in heard],
        verbalizers_trained=trained,
        norm=settings.norm,
        inner=shape.inner if settings.architecture.startswith(("ffn", "decoder")) else output or shape.width,
        output=output or shape.width,
        language=language,
        **extra,
    )


def _verbalize_roles(models: Models) -> dict[str, Spoken]:
    config = models.config
    reaches = {role: config.verbalize.needs_last for role in config.verbalize.models}
    if config.verbalizer.translates and "teacher" in reaches:  # its last layer gets a verbalizer
        reaches["teacher"] = True
    return {role: _spoken(models, role, "frozen", True, True, needs_last=last) for role, last in reaches.items()}


def _cached_roles(models: Models) -> dict[str, Spoken]:
    s = models.config.interact
    kept = None if s.has_last_loss else max(models.layers["student"])
    student = {"headless": s.headless, "trained_layers": kept}
    return {"student": _spoken(models, "student", "lora", s.has_layer_loss, s.trains_verbalizers, **student)}


def _interact_roles(models: Models) -> dict[str, Spoken]:
    s, roles = models.config.interact, _cached_roles(models)
    return roles | ({"teacher": _speaking_teacher(models)} if "teacher" in s.roles else {})


def _speaking_teacher(models: Models) -> Spoken:
    s = models.config.interact
    options = {"headless": s.headless, "needs_last": s.needs_teacher_last}
    return _spoken(models, "teacher", "frozen", s.matches_layers, False, **options)


def teacher_role(models: Models, setup: Setup) -> Spoken:
    """The teacher of stage interact, by itself."""
    return _placed(_speaking_teacher(models), "teacher", setup)


def _sft_roles(models: Models) -> dict[str, Spoken]:
    s = models.config.sft
    mode = "full" if s.method == "full" else "lora"
    return {"student": _spoken(models, "student", mode, False, False, train_vision=s.train_vision)}
