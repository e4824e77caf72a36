"""Options of the config's `data` section: sources of rows, and how rows become model inputs."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .config_mix import expand, split_sample

PILLOW_MAX_IMAGE_PIXELS = 178956970
"""Pixels above which Pillow itself refuses to open an image (twice its warning limit)."""
METRIC_NAMES = ("exact_match", "relaxed_accuracy")
"""Built-in metrics (`vlsi_fast.evaluation.metrics`)."""
_OWN = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


class SourceConfig(BaseModel):
    """One set of rows."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    reader: Literal["qa", "llava", "messages", "hf", "easy_vqa"]
    """Format: llava, messages (JSON or JSONL), hf (saved dataset or parquet), qa (question and answer columns)."""
    path: str | list[str] | None = None
    """File, or several; for hf and qa also a folder or a glob. `path#N`: N rows, taken from all parts of the file."""
    name: str | None = None
    """What to call the source in row ids and messages; default: the file's name."""
    weight: float | None = Field(default=None, gt=0)
    """Share of an epoch's rows, in any unit; give every source one or none (none: each row once)."""
    count: int | None = Field(default=None, ge=1)
    """Rows that the source should have, before `#N` and limit; another number is an error, see count_tolerance."""
    count_tolerance: float = Field(default=0.01, ge=0.0, le=1.0)
    """Share of `count` by which the rows found may differ; within it there is a notice only."""
    image_root: str | None = None
    """Folder that image paths start from and must stay under; default: the folder of `path`."""
    images_under: list[str] = []
    """Keep only rows whose images lie in one of these folders (of the paths as written in a JSON file)."""
    images_not_under: list[str] = []
    """Leave out rows with an image in one of these folders (of the paths as written in a JSON file)."""
    split: str = "train"
    """Name of the split, for hf, qa and easy_vqa (train or test)."""
    limit: int | None = Field(default=None, ge=1)
    """Rows to use, counted from the first; default: all."""
    placeholder: str = Field(default="<image>", min_length=1)
    """What stands for an image in the users' text, for llava, messages and hf."""
    images_column: str = "images"
    """Column of the images, for hf and qa; a list, or a single image. Where it is absent, a column `image` is used."""
    messages_column: str = "messages"
    """Column of the messages, for hf; role / content or from / value."""
    question_column: str = "instruction"
    """Column of the question, for qa."""
    answer_column: str = "output"
    """Column of the answer, for qa."""
    options_column: str | None = None
    """Column of the choices of a question, for qa; they are lettered behind it."""
    answered: bool | None = None
    """Whether a model wrote the answers, which metrics then count apart. Default: rows that say so themselves, in a
    column `answered_by`, as those of `vlsi-fast data answer` do; true or false: all of the rows, or none."""
    teacher: str | None = None
    """Folder of the cache (`vlsi-fast teacher build`) whose teacher the rows learn from, with teacher.mode cached;
    default: teacher.cache. So each source may have a teacher of its own."""
    type_column: str | None = None
    """Column of the question's type, e.g. its category, by which `vlsi-fast eval` splits its table; default: the type
    follows from the answer (yes/no, choice, number, other)."""
    metric: str | list[str] | None = None
    """How `vlsi-fast eval`, `report` and the demo score answers: exact_match, relaxed_accuracy, or a function of your
    own, package.module:function (prediction, answer) -> 0 to 1, or a bool; several: the first is the headline, the
    second shades the report's cells; default: both built-in ones. Training does not read it."""

    @property
    def paths(self) -> list[str]:
        """The paths, without `#N`."""
        return [split_sample(path)[0] for path in ([self.path] if isinstance(self.path, str) else self.path or [])]

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics, the headline first."""
        if self.metric is None:
            return list(METRIC_NAMES)
        return [self.metric] if isinstance(self.metric, str) else self.metric

    @model_validator(mode="after")
    def _check(self):
        if not self.metrics:
            raise ValueError("metric is an empty list; name a metric, or remove it")
        for name in self.metrics:
            check_metric_name(name)
        if self.reader == "easy_vqa":
            if self.path is not None or self.image_root is not None:
                raise ValueError("reader easy_vqa brings its own rows and images; remove path and image_root")
            if self.split not in ("train", "test"):
                raise ValueError(f"split is {self.split!r}; reader easy_vqa has the splits train and test")
        elif not self.path:
            what = "a saved dataset's folder, parquet or a glob" if self.reader == "hf" else "a JSON or JSONL file"
            raise ValueError(f"reader {self.reader} needs path: {what}")
        fields = type(self).model_fields
        readers_of = {
            "images_column": ("hf", "qa"),
            "messages_column": ("hf",),
            "placeholder": ("llava", "messages", "hf"),
            "question_column": ("qa",),
            "answer_column": ("qa",),
            "options_column": ("qa",),
            "type_column": ("llava", "messages", "hf", "qa"),
            "images_under": ("llava", "messages"),
            "images_not_under": ("llava", "messages"),
        }
        for name in ("split",) if self.reader in ("llava", "messages") else ():
            if getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} has no meaning for reader {self.reader}; name the file of that split in path")
        for name, readers in readers_of.items():
            if self.reader not in readers and getattr(self, name) != fields[name].default:
                known = " and ".join(readers)
                raise ValueError(f"{name} is for reader {known}; remove it here, where the reader is {self.reader}")
        self._check_sample()
        return self

    def _check_sample(self) -> None:
        """`path#N` stands alone."""
        paths = self.path if isinstance(self.path, list) else [self.path or ""]
        samples = [split_sample(path)[1] for path in paths]
        if any(sample is not None for sample in samples):
            if len(paths) > 1:
                raise ValueError("`#N` is for a source of one path; make each path with `#N` a source of its own")
            if self.limit is not None or samples[0] == 0:
                raise ValueError(f"{paths[0]}: use either limit (the first rows) or `#N` (rows from all parts), N >= 1")


class DataConfig(BaseModel):
    """The rows to train on and how they become model inputs."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    train: list[SourceConfig]
    """Sources to train on: a list of them, a mix file (configs/data/vlsi_mix.yaml is one), or a list with mix files."""
    eval: list[SourceConfig] = []
    """Sources to measure on, by `vlsi-fast eval` and the demo; training reads them where training.eval_steps is set."""
    root: str | None = None
    """Folder that sources' relative paths start from; default: the working directory. Joined to them at load."""
    stopping_strategy: Literal["all_exhausted", "first_exhausted"] = "all_exhausted"
    """With weights, an epoch has every row of every source at least once, or (first_exhausted) no row twice."""
    min_pixels: int | None = Field(default=None, ge=1)
    """Pixels that a smaller image is enlarged to; default: the processor's own."""
    max_pixels: int | None = Field(default=None, ge=1)
    """Pixels that a larger image is reduced to; default: the processor's own."""
    max_length: int = Field(default=2048, ge=2)
    """Tokens, image tokens included, that a row may have in each model; a longer row is skipped."""
    padding_free: Literal["auto", True, False] = "auto"
    """Join a micro-batch's rows end to end instead of padding them to the longest. auto: for a model that runs with
    flash-attention, torch's own included. true: also with sdpa and eager, whose mask then grows with the square of the
    micro-batch's tokens. The loss is the same; a run may be continued with another value."""
    max_image_pixels: int = Field(default=PILLOW_MAX_IMAGE_PIXELS, ge=1)
    """Pixels that an image file may announce; a larger one is skipped before it is decoded."""
    max_row_pixels: int = Field(default=PILLOW_MAX_IMAGE_PIXELS, ge=1)
    """Pixels that the images of a row may announce together, one that is shown twice counted twice; a row with more is
    skipped before any of them is decoded."""
    special_tokens: Literal["text", "skip", "error"] = "text"
    """Special tokens that a row's text spells, e.g. <|im_end|>. text: they are tokenized as text and mean nothing.
    skip: the row is skipped. error: the run stops there. Only the chat template's own are special in any case."""
    max_skipped_share: float = Field(default=0.01, ge=0.0, le=1.0)
    """Share of the rows (0 to 1) that may be unusable; more of them stop the run."""
    num_workers: int = Field(default=0, ge=0)
    """Processes that decode and encode rows ahead of the training process, on each rank; raise it where metrics.jsonl's
    data_wait_share is not near 0. 0: the training process does it itself, and the GPU waits."""

    @model_validator(mode="before")
    @classmethod
    def _read_mix_files(cls, values):
        if not isinstance(values, dict) or not isinstance(values.get("root"), str | None):
            return values  # for the checks of the fields to name
        values = dict(values)
        root = values.pop("root", None)  # joined to the paths here and once, so that a config read back stays the same
        return {k: expand(value, root) if k in ("train", "eval") else value for k, value in values.items()}

    @model_validator(mode="after")
    def _check(self):
        if not self.train:
            raise ValueError("train is empty; add at least one source, e.g. {reader: easy_vqa}")
        if 0 < sum(source.weight is not None for source in self.train) < len(self.train):
            first = next(i for i, source in enumerate(self.train) if source.weight is None)
            raise ValueError(f"train.{first} has no weight, others have one; give every source a weight, or none")
        if any(source.weight is not None for source in self.eval):
            raise ValueError("weight is for sources in train; rows of eval are read once each, so remove it there")
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} > max_pixels {self.max_pixels}; swap or widen them")
        if self.max_image_pixels > PILLOW_MAX_IMAGE_PIXELS:
            raise ValueError(
                f"max_image_pixels {self.max_image_pixels} is above {PILLOW_MAX_IMAGE_PIXELS}, where Pillow itself "
                f"refuses an image; use at most that"
            )
        return self


def check_metric_name(name: str) -> None:
    """Raise ValueError where a name is neither a built-in metric nor written as `package.module:function`."""
    if name not in METRIC_NAMES and not _OWN.fullmatch(name):
        raise ValueError(
            f"{name!r} is no metric; use {' or '.join(METRIC_NAMES)}, or a function of your own, "
            "package.module:function"
        )
