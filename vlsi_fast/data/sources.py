"""Where rows come from: the config's `data` section, and its sources as one list of samples.

Sources are concatenated in the order of the config; how often and in which order their rows are read says mixing.py.
What is wrong with a file or a field is an error at load; what is wrong with one row is an `UnusableRow` when that row
is read.
"""

from __future__ import annotations

import bisect
import os
import sys
from itertools import accumulate
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vlsi_fast.data.images import PILLOW_MAX_IMAGE_PIXELS
from vlsi_fast.data.messages import Sample
from vlsi_fast.data.mixfile import expand, split_sample
from vlsi_fast.data.readers import READERS, Reader
from vlsi_fast.data.skipped import UnusableRow, row_boundary
from vlsi_fast.evaluation.metrics import METRICS, check_metric_name


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
    type_column: str | None = None
    """Column of the question's type, e.g. its category, by which `vlsi-fast eval` splits its table; default: the type
    follows from the answer (yes/no, choice, number, other)."""
    metric: str | list[str] | None = None
    """How `vlsi-fast eval`, `report` and the demo score answers: exact_match, relaxed_accuracy, or a function of your
    own, package.module:function (prediction, answer) -> 0 to 1, or a bool; several: the first is the headline, the
    second shades the report's cells; default: both built-in ones. Training does not read it."""

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics, the headline first."""
        return list(METRICS) if self.metric is None else [self.metric] if isinstance(self.metric, str) else self.metric

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
            "images_column": ("hf", "qa"), "messages_column": ("hf",), "placeholder": ("llava", "messages", "hf"),
            "question_column": ("qa",), "answer_column": ("qa",), "options_column": ("qa",),
            "type_column": ("llava", "messages", "hf", "qa"),
            "images_under": ("llava", "messages"), "images_not_under": ("llava", "messages"),
        }  # fmt: skip
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
    """Sources to measure on, by `vlsi-fast eval` and the demo; training does not read them."""
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
    padding_free: Literal["auto", True, False] = False
    """Join a micro-batch's rows end to end instead of padding them to the longest. auto: for a model that runs with
    flash-attention (not the default yet, since no GPU has run it). true: also with sdpa and eager, whose mask then
    grows with the square of the micro-batch's tokens. The loss is the same; a run may be continued with another value.
    """
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


class ConcatSource:
    """Sources one after another, as one list of samples.

    Attributes:
        parts: the sources.
        weights: each one's share of an epoch, or None: every row once.
    """

    def __init__(self, parts: list[Reader], weights: list[float] | None = None):
        self.parts, self.weights = parts, weights
        self._ends = list(accumulate(len(part) for part in parts))
        names = [part.name for part in parts]
        self._prefix = [f"{i}:" if names.count(name) > 1 else "" for i, name in enumerate(names)]

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def sizes(self) -> list[int]:
        """Rows of each source."""
        return [len(part) for part in self.parts]

    def part_of(self, index: int) -> int:
        """Number of the source that row `index` is of."""
        return self._locate(index)[0]

    def row_id(self, index: int) -> str:
        """Id of row `index`: the source's name and the row's number there, unique among all rows."""
        part, row = self._locate(index)
        return f"{self._prefix[part]}{self.parts[part].name}#{self.parts[part].number(row)}"

    def __getitem__(self, index: int) -> Sample:
        """Row `index`.

        Raises:
            UnusableRow: the row is malformed, or reading it failed in any other way.
        """
        part, row = self._locate(index)
        with row_boundary():
            return self.parts[part].read(row, self.row_id(index))

    def skip_record(self, index: int, error: UnusableRow) -> dict[str, Any]:
        """What is written of row `index`, which cannot be used: `id`, `cause`, `detail`, `file`, `line` if known."""
        part, row = self._locate(index)
        found = {"id": self.row_id(index), "cause": error.cause, "detail": error.detail}
        return found | self.parts[part].where(row)

    def _locate(self, index: int) -> tuple[int, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        part = bisect.bisect_right(self._ends, index)
        return part, index - (self._ends[part - 1] if part else 0)


def build_source(configs: list[SourceConfig], field: str = "data.train") -> ConcatSource:
    """Opens sources and concatenates them in order.

    Args:
        configs: the sources.
        field: where they stand in the config, for messages.

    Raises:
        FileNotFoundError: a path does not exist; the message names the field.
        ValueError: a file is not of the reader's format, or has no rows.
        ImportError: a reader's package is missing; the message names the install command.
    """
    if not configs:
        raise ValueError(f"{field} is empty; add at least one source, e.g. {{reader: easy_vqa}}")
    parts = [open_part(config, f"{field}[{i}]") for i, config in enumerate(configs)]
    weights = [config.weight for config in configs]
    return ConcatSource(parts, weights if None not in weights else None)


def open_part(config: SourceConfig, field: str) -> Reader:
    """Opens one source; `field` is where it stands. Raises as `build_source`."""
    part = READERS[config.reader](config, field)
    if len(part) == 0:
        raise ValueError(f"{field} ({part.name}) has no rows")
    _check_count(config, part, field)
    return part


def _check_count(config: SourceConfig, part: Reader, field: str) -> None:
    """Compares the rows found with those expected. Raises ValueError where they differ by more than the tolerance."""
    found, expected = part.rows, config.count
    if expected is None or found == expected:
        return
    message = f"{field} ({part.name}): {found} rows found, {expected} expected ({found / expected - 1:+.2%})"
    if abs(found - expected) > config.count_tolerance * expected:
        raise ValueError(
            f"{message}. Complete the download or correct path and images_under; if these are the rows you want, set "
            f"{field}.count to {found}, or raise count_tolerance (now {config.count_tolerance:g})"
        )
    if os.environ.get("RANK", "0") == "0":
        print(f"vlsi-fast: {message}; within count_tolerance {config.count_tolerance:g}", file=sys.stderr)
