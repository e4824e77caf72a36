"""Every option of a run: one class a section, a line of documentation under each field, checks that name the fix.

A run is one YAML file (`configs/*.yaml`), changed by `--section.field value` pairs on the command line:

    config = load_config("configs/demo.yaml", ["--interact.training.max_steps", "20"])

A file that begins with `extends: other.yaml` (relative to itself) holds only what differs from that file: sections are
merged field by field, lists and values replaced. `extends` is a key of files alone, not an option.

Unknown keys, wrong types and values out of range raise `ConfigError` when the file is loaded, not hours later.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from .config_data import DataConfig
from .config_files import ConfigError, apply_override, parse_overrides, read_tree
from .config_stages import InteractConfig, Section, SftConfig, VerbalizeConfig
from .named_files import require_folder

StageName = Literal["verbalize", "interact", "sft"]
STAGES: tuple[StageName, ...] = get_args(StageName)
QUANTIZED = ("int8", "nf4")
Architecture = Literal["mlp", "mlp_x2", "verb_ffn", "verb_ffn_x2", "ffn", "ffn_x2", "decoder", "decoder_x2"]
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)


NOT_EXTRA = {
    *("output_dir", "seed", "data_seed", "bf16", "fp16", "use_cpu", "remove_unused_columns", "logging_nan_inf_filter"),
    *("lr_scheduler_kwargs", "dataloader_num_workers", "ddp_find_unused_parameters"),
    *("dataloader_persistent_workers", "train_sampling_strategy", "restore_callback_states_from_checkpoint"),
    *("greater_is_better", "save_only_model", "save_safetensors", "label_smoothing_factor"),
    *("label_names", "per_device_eval_batch_size", "batch_eval_metrics", "group_by_length", "resume_from_checkpoint"),
    *("average_tokens_across_devices", "neftune_noise_alpha", "auto_find_batch_size", "torch_compile"),
    "enable_jit_checkpoint",  # max_hours, save_minutes and SIGTERM do what it does
}
"""Fields of TrainingArguments that the stages set themselves or that have no meaning for them."""


class BackboneConfig(Section):
    """One of the two vision-language models."""

    path: str
    """Folder or Hub name of a stock Hugging Face checkpoint with its processor."""
    layers: list[int] | Literal["auto"] | None = None
    """Target layers; k: the hidden state after k decoder layers, 1 <= k <= depth. null: 2, 6, 10, .. (section 4.1b).
    auto, with a student by `vlsi-fast shrink`: the student's are as with null, but below 8 layers 1 .. depth - 1; the
    teacher's are what the student's target layers were in it."""
    verbalizers: str | None = None
    """Folder of trained verbalizers of this model. null: those of this run's own verbalize stage."""
    attn_implementation: str = "auto"
    """Attention of the backbone: flash_varlen (torch's own flash-attention over packed rows, data.padding_free) or a
    transformers name (sdpa, eager, flash_attention_2, flash_attention_3). auto: on CUDA, unless dtype is float32, the
    first that runs of flash_attention_3 (on Hopper), flash_attention_2, flash_varlen; else sdpa."""
    min_pixels: int | None = Field(None, ge=1)
    """data.min_pixels for this model alone, where the two models' processors differ; default: the processor's own."""
    max_pixels: int | None = Field(None, ge=1)
    """data.max_pixels for this model alone, where the two models' processors differ; default: the processor's own."""

    @field_validator("layers", mode="before")
    @classmethod
    def _layers_kind(cls, value):
        if value in (None, "auto") or (isinstance(value, list | tuple) and all(type(k) is int for k in value)):
            return value
        raise ValueError("use a list of whole numbers such as [2, 6, 10], auto or null")

    @model_validator(mode="after")
    def _layers_rise(self):
        if isinstance(self.layers, list) and (not self.layers or sorted(set(self.layers)) != self.layers):
            raise ValueError(f"layers must be a non-empty, strictly rising list, got {self.layers}; sort it")
        return self


class TeacherConfig(BackboneConfig):
    """The large model, which is never trained."""

    mode: Literal["auto", "zero3", "replicated", "offload", "int8", "nf4", "cached"] = "auto"
    """How it is held (`vlsi_fast.teacher`): sharded over the ranks, whole on every rank, in CPU memory, quantised by
    bitsandbytes, or cached: stage interact has no teacher, but reads what one said (`vlsi-fast teacher build`). auto:
    zero3 where training.deepspeed is ZeRO stage 3, else replicated; with cached, so is a teacher that verbalize trains
    for. A run may be continued in another mode; int8, nf4 and a cache that is not exact change the numbers, so what was
    made with one of them belongs to it."""
    cache: str | None = None
    """Folder of the cache, for mode cached and for what builds it. null: teacher_cache in output_dir."""
    cache_follow: bool = False
    """With mode cached: the cache is being built meanwhile, by `vlsi-fast teacher build --follow` in a job of its own.
    Interact waits for rows that are not there yet, and tells the builder how far it is."""
    cache_timeout: float = Field(600.0, gt=0)
    """Seconds without a sign of life after which the builder that runs ahead gives a student up, and a student the
    builder. Each judges by its own clock."""
    window: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Micro-batches of one optimizer step for which it runs at once in stage interact, so that its weights are gathered
    once for all of them. auto, on CUDA with mode zero3 or offload: as many as fit on paper (`vlsi-fast plan`); else 1.
    More than there are in a step are as many as there are. Kept of each answer token and layer are 4 (1 + d) bytes, d
    the student's width; with l2 or another divergence the teacher's hidden states as well."""

    @model_validator(mode="after")
    def _follows_a_cache(self):
        if self.cache_follow and self.mode != "cached":
            raise ValueError(
                f"cache_follow waits for a cache, and mode is {self.mode}: set mode to cached, or remove it"
            )
        return self


class VerbalizerConfig(Section):
    """The small network between a target layer and the frozen final norm and language head (table 4f)."""

    architecture: Architecture = "verb_ffn"
    """One of the eight architectures of table 4f."""
    norm: bool = False
    """RMSNorm in front of every block. The paper's parameter counts are without it; recommended for decoder."""
    residual: bool = False
    """Add each block's input to its output. A decoder layer has its own residuals and takes no further one."""

    @model_validator(mode="after")
    def _decoder_has_residuals(self):
        if self.residual and self.architecture.startswith("decoder"):
            raise ValueError("a decoder verbalizer has residual connections of its own; remove verbalizer.residual")
        return self


class MatchingConfig(Section):
    """How student layers find teacher layers (Algorithm 1, table 4e). See `vlsi_fast.matching.match_layers`."""

    strategy: Literal["multinomial", "random", "uniform", "bottom"] = "multinomial"
    """multinomial is Algorithm 1; random, uniform and bottom are the baselines of appendix D."""
    k: int = Field(1, ge=1)
    """Number of lowest-KL teacher layers averaged by strategy bottom (bottom-1, bottom-3)."""
    search_range: bool = True
    """multinomial: student layer i looks no deeper than teacher layer t_l - t_s + i."""
    order_preservation: bool = True
    """multinomial: each match is deeper than the one before it."""
    adaptive_temperature: bool = True
    """multinomial: temperature = scale / (max - min + eps) of the candidates' KLs; otherwise 1."""
    scale: float = Field(2.0, gt=0)
    """Scale of the adaptive temperature (Algorithm 1: 2)."""
    eps: float = Field(1e-6, gt=0)
    """Guard of the adaptive temperature (Algorithm 1: 1e-6)."""

    @model_validator(mode="after")
    def _k_is_for_bottom(self):
        if self.k != 1 and self.strategy != "bottom":
            raise ValueError(f"k={self.k} has no meaning for strategy {self.strategy}; remove k, or set it to bottom")
        return self


class LoraSettings(Section):
    """LoRA on the student's language model (section 4.1c), by peft."""

    rank: int = Field(64, ge=1)
    """Rank of the update."""
    alpha: float = Field(64.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout probability in front of the update."""
    target_modules: str | None = None
    """Regular expression over module names. null: every linear layer of the language model (the family's own list)."""


class TrainingConfig(Section):
    """Optimisation; names are those of `transformers.TrainingArguments`. Defaults are the paper's (section 4.1c)."""

    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate of AdamW."""
    min_learning_rate: float = Field(1e-6, ge=0)
    """Learning rate at the end of the cosine."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Schedule from learning_rate to min_learning_rate (linear ends at 0, constant stays)."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps of linear warm-up."""
    num_train_epochs: float = Field(1.0, gt=0)
    """Passes over data.train; used where max_steps is -1."""
    max_steps: int = -1
    """Optimizer steps; -1: as many as num_train_epochs give."""
    per_device_train_batch_size: int = Field(4, ge=1)
    """Rows of one micro-batch on one rank."""
    gradient_accumulation_steps: int = Field(16, ge=1)
    """Micro-batches of one optimizer step on one rank."""
    balance_batch: bool = False
    """Deal the rows of each optimizer step into all micro-batches of all ranks by cost, so that no rank waits for
    another; rows of like length together where there is padding. per_device_train_batch_size is then a mean. The rows
    of a step stay, and so does the loss in verbalize and sft; interact matches layers by micro-batch, so its matches
    differ."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay (matrices only)."""
    adam_beta2: float = Field(0.999, gt=0, lt=1)
    """AdamW's second-moment decay."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip the global gradient norm to this; 0: no clipping (stage verbalize's default, see verbalize.training)."""
    gradient_checkpointing: bool = True
    """Recompute the student's decoder layers in backward (only where its backbone is trained)."""
    optim: str = "adamw_torch"
    """Optimizer, by its transformers name."""
    logging_steps: int = Field(1, ge=1)
    """Optimizer steps between reports to report_to; metrics.jsonl has every step."""
    save_steps: int = Field(500, ge=1)
    """Optimizer steps between checkpoints for --resume."""
    save_minutes: float | None = Field(30, gt=0)
    """Minutes after which a checkpoint is saved at the end of the step, whatever save_steps says; null: never."""
    save_total_limit: int | None = Field(2, ge=1)
    """Checkpoints kept, the newest, and the best beside them (load_best_model_at_end); null: all."""
    eval_steps: int | None = Field(None, ge=1)
    """Optimizer steps between evaluations on data.eval, and one at the end, into eval.jsonl: the loss of every layer,
    and in interact and sft exact match; null: never."""
    max_eval_samples: int | None = Field(None, ge=1)
    """Rows of an evaluation while training, taken evenly from all of data.eval; null: all rows."""
    load_best_model_at_end: bool = False
    """The stage's result has the weights of the best evaluation instead of the last. A new best is saved where it is
    found, whatever save_steps says, and its checkpoint stays."""
    metric_for_best_model: str = "loss"
    """What decides which evaluation is best, for load_best_model_at_end and early stopping: loss, loss/PART (as in
    eval.jsonl, such as loss/last), or exact_match. Of losses the lowest is best, of exact_match the highest."""
    early_stopping_patience: int | None = Field(None, ge=1)
    """The stage ends after so many evaluations in a row that are no better than the best; null: never early."""
    early_stopping_threshold: float = Field(0.0, ge=0)
    """By how much an evaluation must be better for early_stopping_patience to count it so."""
    report_to: list[str] = ["tensorboard"]
    """Trackers, by their transformers names: tensorboard, wandb, mlflow, ..; []: none."""
    deepspeed: str | dict | None = None
    """DeepSpeed JSON (path or mapping), used where a launcher started the ranks; null: plain data parallelism."""
    extra: dict[str, Any] = {}
    """Any further field of transformers.TrainingArguments, by its own name."""

    @property
    def evaluations_decide(self) -> bool:
        """Whether evaluations change what a stage makes."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None

    @property
    def greater_is_better(self) -> bool:
        """Of `metric_for_best_model`."""
        return not self.metric_for_best_model.startswith("loss")

    @model_validator(mode="before")
    @classmethod
    def _no_grouping(cls, values):
        """Records of older runs have it as false."""
        if not isinstance(values, dict) or "group_by_length" not in values:
            return values
        values = dict(values)
        if values.pop("group_by_length"):
            raise ValueError(
                "group_by_length is no more: set balance_batch, which does the same over all ranks and also saves time "
                "where nothing is padded"
            )
        return values

    @model_validator(mode="after")
    def _check(self):
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps must be positive, or -1 for num_train_epochs, got {self.max_steps}")
        if self.lr_scheduler_type == "cosine" and self.min_learning_rate > self.learning_rate:
            raise ValueError("min_learning_rate is above learning_rate; lower it")
        self._check_evaluation()
        if set(self.report_to) - {"tensorboard"}:  # as below: seconds of import that most configs do not need
            from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

            for name in self.report_to:
                if name not in (known := {*INTEGRATION_TO_CALLBACK, "all", "none"}):
                    raise ValueError(f"report_to: transformers has no tracker {name!r}{nearest(name, known)}")
        if self.extra:
            from transformers import TrainingArguments  # seconds of import that most configs do not need

            known = set(TrainingArguments.__dataclass_fields__)
        for name in self.extra:
            if name in type(self).model_fields:
                raise ValueError(f"extra.{name}: set training.{name} itself")
            if name in NOT_EXTRA or name.startswith(("eval_", "do_", "hub_", "push_to_hub")):
                raise ValueError(f"extra.{name} is set by the stage, or has no meaning for it; remove it")
            if name not in known:
                raise ValueError(f"extra.{name} is no field of transformers.TrainingArguments{nearest(name, known)}")
        return self

    def _check_evaluation(self) -> None:
        """What needs evaluations has them, and what decides by them has a metric."""
        metric = self.metric_for_best_model
        for name in ("load_best_model_at_end", "early_stopping_patience", "max_eval_samples"):
            if getattr(self, name) and self.eval_steps is None:
                raise ValueError(f"{name} needs evaluations; set eval_steps (steps between them), or remove it")
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise ValueError("early_stopping_threshold belongs to early_stopping_patience; set that, or remove it")
        if metric not in ("loss", "exact_match") and not metric.startswith("loss/"):
            raise ValueError(
                f"metric_for_best_model is {metric!r}; use loss, loss/PART (the names in eval.jsonl) or exact_match"
            )
        if metric != "loss" and not self.evaluations_decide:
            raise ValueError(
                "metric_for_best_model decides nothing without load_best_model_at_end or early_stopping_patience; set "
                "one of them, or remove it"
            )


class RunConfig(Section):
    """A whole run."""

    output_dir: str
    """Folder of the run; each stage writes a folder of its own name into it."""
    seed: int = Field(0, ge=0)
    """Seed of initialisation, data order and layer matching."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of backbones and compute; trained weights keep a float32 master copy."""
    impl: Literal["auto", "torch", "triton", "reference"] = "auto"
    """Implementation of the operators (`vlsi_kernels`): auto is triton on CUDA where it is installed and agrees with
    plain PyTorch (see preflight), else torch."""
    liger: Literal["auto", True, False] = "auto"
    """liger-kernel's RMSNorm and SwiGLU in both language models; auto: on CUDA, where it is installed and agrees with
    plain PyTorch (see preflight)."""
    stages: list[StageName] = list(STAGES)
    """What --stage all runs, in this order; plan and check look at these. [verbalize, interact] where sft on few labels
    costs points; [interact, sft] where interact.intermediate is none, or verbalizers are trained already."""
    max_hours: float | None = Field(None, gt=0)
    """Hours after which the run saves a checkpoint at the end of the step and ends with exit code 75, for --resume;
    null: no limit. SIGTERM does the same at once."""
    preflight: bool = True
    """Check heads, image tokens, disk space and GPU memory before each stage (`vlsi-fast check` looks at more). On CUDA
    also compare operators, liger-kernel's modules and attention with plain PyTorch (`vlsi-fast check --device`): what
    disagrees is switched off where its option is auto, and refused where it was asked for by name."""
    teacher: TeacherConfig
    """The large model."""
    student: BackboneConfig
    """The small model."""
    verbalizer: VerbalizerConfig = VerbalizerConfig()
    """Verbalizers of both models."""
    matching: MatchingConfig = MatchingConfig()
    """Layer matching of the interact stage."""
    lora: LoraSettings = LoraSettings()
    """LoRA of interact, and of sft with method lora."""
    data: DataConfig
    """Training rows, and how they are read."""
    training: TrainingConfig = TrainingConfig()
    """Optimisation of every stage."""
    verbalize: VerbalizeConfig = VerbalizeConfig()
    """Stage 1."""
    interact: InteractConfig = InteractConfig()
    """Stage 2."""
    sft: SftConfig = SftConfig()
    """Stage 3."""

    @model_validator(mode="after")
    def _check(self):
        s, t = (each.layers if isinstance(each.layers, list) else None for each in (self.student, self.teacher))
        if self.teacher.layers == "auto":
            t = s  # one for each of the student's
        if s and t and len(s) > len(t):
            raise ValueError(
                f"student.layers has {len(s)} target layers, teacher.layers {len(t)}: matching needs t_s <= t_l; "
                "remove student layers or add teacher layers"
            )
        if self.interact.headless and (self.verbalizer.architecture != "verb_ffn" or self.verbalizer.residual):
            raise ValueError("interact.headless needs verbalizer.architecture verb_ffn without verbalizer.residual")
        if self.matching.strategy == "bottom" and t and self.matching.k > len(t):
            raise ValueError(f"matching.k is {self.matching.k}, but the teacher has {len(t)} target layers; lower it")
        for name in ("min_pixels", "max_pixels"):
            for role in ("student", "teacher"):
                if getattr(self.data, name) is not None and getattr(getattr(self, role), name) is not None:
                    raise ValueError(f"data.{name} is for both models, {role}.{name} for one: remove one of the two")
        self._check_stages()
        for stage in STAGES:
            if self.stage_training(stage).eval_steps is not None and not self.data.eval:
                raise ValueError("training.eval_steps needs rows to evaluate on: add data.eval, or remove eval_steps")
        return self

    def _check_stages(self) -> None:
        """Known, once each, in order; and each finds what it starts from."""
        names = list(self.stages)
        if not names or names != [name for name in STAGES if name in names]:
            raise ValueError(f"stages must name some of {', '.join(STAGES)}, once each, in this order; got {names}")
        if "sft" in names and "interact" not in names and self.sft.start_from == "interact":
            raise ValueError(
                "stages has sft but not interact, whose student sft starts from: add interact, or set sft.start_from "
                "to base (to continue a finished interact stage leave stages as it is, and run --stage sft)"
            )
        mute = [role for role in self.interact.speakers if getattr(self, role).verbalizers is None]
        if "interact" in names and "verbalize" not in names and mute:
            raise ValueError(
                "stages has interact but not verbalize, whose verbalizers its target layers speak through: add "
                f"verbalize, name trained ones ({', '.join(f'{role}.verbalizers' for role in mute)}), or set "
                "interact.intermediate to none"
            )

    def stage_training(self, stage: str) -> TrainingConfig:
        """`training` with the overrides of one stage. Raises ConfigError where an override is wrong."""
        default = VerbalizeConfig.model_fields["training"].default if stage == "verbalize" else {}
        merged = {**self.training.model_dump(), **default, **getattr(self, stage).training}
        try:
            return TrainingConfig(**merged)
        except ValidationError as error:
            raise ConfigError(explain(error, TrainingConfig, f"{stage}.training.")) from None

    def stage_dir(self, stage: str) -> Path:
        """Folder of one stage's results."""
        return Path(self.output_dir) / stage

    @property
    def cache_dir(self) -> Path:
        """Folder of the teacher's cache."""
        return Path(self.teacher.cache or Path(self.output_dir) / "teacher_cache")


def nearest(name: str, known) -> str:
    """'; did you mean X?' for the closest of `known`, or the list of them where none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(known)}" if len(known) <= 40 else ""


def field_names(section: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Dotted name -> pydantic FieldInfo of every option, in file order."""
    names = {}
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            names.update(field_names(info.annotation, f"{prefix}{name}."))
        else:
            names[prefix + name] = info
    return names


def _siblings(location: tuple, section: type[BaseModel]) -> dict[str, str]:
    """Name -> dotted name of the options of the section that `location` is in, elements of lists included."""
    prefix = ""
    for part in location[:-1]:
        prefix += f"{part}."
        if isinstance(part, str):
            annotation = section.model_fields[part].annotation
            kinds = (annotation, *get_args(annotation))
            section = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return {name: prefix + name for name in section.model_fields}


def _hint(location: tuple, section: type[BaseModel], prefix: str) -> str:
    """The option nearest to an unknown one: beside it first, then anywhere; else a list of those beside it."""
    leaf, name = str(location[-1]), ".".join(str(part) for part in location)
    beside = _siblings(location, section)
    anywhere = {dotted.rsplit(".", 1)[-1]: dotted for dotted in field_names(section)}
    close = [beside[c] for c in difflib.get_close_matches(leaf, beside, n=1, cutoff=0.6)]
    close = close or difflib.get_close_matches(name, anywhere.values(), n=1, cutoff=0.75)
    close = close or [anywhere[c] for c in difflib.get_close_matches(leaf, anywhere, n=1, cutoff=0.6)]
    if close:
        return f"; did you mean {prefix}{close[0]}?"
    return f"; known: {', '.join(prefix + dotted for dotted in beside.values())}"


def explain(error: ValidationError, section: type[BaseModel], prefix: str = "") -> str:
    """Pydantic's findings as lines that name the field, what was found and the nearest valid key."""
    lines = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"{prefix}{name}: no such option{_hint(item['loc'], section, prefix)}")
        elif item["type"] == "missing":
            lines.append(f"{prefix}{name}: required; add it to the config or pass --{prefix}{name} VALUE")
        else:
            message = item["msg"].removeprefix("Value error, ")
            found = "" if isinstance(item["input"], (dict, BaseModel)) else f" (found {item['input']!r})"
            lines.append(f"{prefix}{name}: {message}{found}" if name else f"{prefix}{message}")
    return "\n".join(lines)


def load_config(path: str | Path, overrides: list[str] | dict[str, Any] = ()) -> RunConfig:
    """Read a YAML file with what it `extends`, apply overrides, check everything that needs no model.

    Args:
        path: YAML file.
        overrides: `["--section.field", "value", ..]` as on the command line, or `{"section.field": value}`.

    Raises:
        FileNotFoundError: no such file, or one that it extends.
        ConfigError: unknown option (with the nearest valid one), wrong type, or options that contradict each other.
    """
    path = Path(path)
    tree = read_tree(path)
    pairs = overrides if isinstance(overrides, dict) else parse_overrides(list(overrides))
    for name, value in pairs.items():
        apply_override(tree, name, value)
    try:
        config = RunConfig(**tree)
    except ValidationError as error:
        raise ConfigError(f"{path}:\n{explain(error, RunConfig)}") from None
    require_folder(config.output_dir)
    return config
