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
from .config_training import TrainingConfig
from .named_files import require_folder

StageName = Literal["verbalize", "interact", "sft"]
STAGES: tuple[StageName, ...] = get_args(StageName)
QUANTIZED = ("int8", "nf4")
Architecture = Literal["mlp", "mlp_x2", "verb_ffn", "verb_ffn_x2", "ffn", "ffn_x2", "decoder", "decoder_x2"]
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)


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
    language: Literal["own", "student"] = "own"
    """Whose words a teacher's layers speak: own, through the teacher's norm and head, which takes one tokenizer for
    both models; student, through the student's, whatever the tokenizers are (`vlsi_fast.translation`). Such
    verbalizers belong to one student. The teacher's last layer then has one, too, and its head is not read."""

    @model_validator(mode="after")
    def _decoder_has_residuals(self):
        if self.residual and self.architecture.startswith("decoder"):
            raise ValueError("a decoder verbalizer has residual connections of its own; remove verbalizer.residual")
        return self

    @model_validator(mode="after")
    def _decoder_cannot_translate(self):
        if self.translates and self.architecture.startswith("decoder"):
            raise ValueError(
                "a decoder verbalizer has the teacher's width and cannot speak the student's language; set "
                "verbalizer.architecture to verb_ffn, ffn or mlp"
            )
        return self

    @property
    def translates(self) -> bool:
        """Whether the teacher's layers speak the student's language."""
        return self.language == "student"

    @property
    def recorded(self) -> dict[str, Any]:
        """What records keep. An option that came after the first records is there where it is not its default."""
        return self.model_dump(exclude=None if self.translates else {"language"})


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
        if self.verbalizer.translates and self.interact.headless:
            raise ValueError("interact.headless compares verbalizers without a head: set verbalizer.language to own")
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
        speakers = [r for r in self.speakers if (r, self.teacher.mode) != ("teacher", "cached")]
        mute = [role for role in speakers if getattr(self, role).verbalizers is None]
        if "interact" in names and "verbalize" not in names and mute:
            raise ValueError(
                "stages has interact but not verbalize, whose verbalizers its target layers speak through: add "
                f"verbalize, name trained ones ({', '.join(f'{role}.verbalizers' for role in mute)}), or set "
                + ("interact.intermediate to none" if self.interact.speakers else "verbalizer.language to own")
            )

    @property
    def read_by_verbalize(self) -> list[str]:
        """The models whose rows stage verbalize reads: a teacher that translates learns the student's tokens."""
        names = list(self.verbalize.models)
        return ["student", "teacher"] if self.verbalizer.translates and "teacher" in names else names

    @property
    def speakers(self) -> list[str]:
        """The models that speak through trained verbalizers in stage interact."""
        last = self.verbalizer.translates and self.interact.needs_teacher_last
        return list(dict.fromkeys([*self.interact.speakers, *(["teacher"] if last else [])]))

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
