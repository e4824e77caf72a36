"""Where rows come from: the config's `data` section, and its sources as one list of samples.

Sources are concatenated in the order of the config. What is wrong with a file or a field is an error at load; what is
wrong with one row is an `UnusableRow` when that row is read.
"""

from __future__ import annotations

import bisect
from itertools import accumulate
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from vlsi_fast.data.images import PILLOW_MAX_IMAGE_PIXELS
from vlsi_fast.data.messages import Sample
from vlsi_fast.data.readers import READERS, Reader


class SourceConfig(BaseModel):
    """One set of rows."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    reader: Literal["llava", "messages", "hf", "easy_vqa"]
    """Format: llava or messages (JSON or JSONL file), hf (saved dataset or parquet), easy_vqa (PyPI's easy-vqa)."""
    path: str | None = None
    """The data: a file for llava and messages; for hf a folder, a parquet file or a glob of them; none for easy_vqa."""
    image_root: str | None = None
    """Folder that image paths start from and must stay under; default: the folder of `path`."""
    split: str = "train"
    """Name of the split, for hf and easy_vqa (train or test)."""
    limit: int | None = Field(default=None, ge=1)
    """Rows to use, counted from the first; default: all."""
    images_column: str = "images"
    """Column of the images, for hf; a list, or a single image. Where it is absent, a column `image` is used."""
    messages_column: str = "messages"
    """Column of the messages, for hf; role / content or from / value."""

    @model_validator(mode="after")
    def _check(self):
        if self.reader == "easy_vqa":
            if self.path is not None or self.image_root is not None:
                raise ValueError("reader easy_vqa brings its own rows and images; remove path and image_root")
            if self.split not in ("train", "test"):
                raise ValueError(f"split is {self.split!r}; reader easy_vqa has the splits train and test")
        elif not self.path:
            what = "a saved dataset's folder, parquet or a glob" if self.reader == "hf" else "a JSON or JSONL file"
            raise ValueError(f"reader {self.reader} needs path: {what}")
        fields = type(self).model_fields
        for name in ("split",) if self.reader in ("llava", "messages") else ():
            if getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} has no meaning for reader {self.reader}; name the file of that split in path")
        for name in ("images_column", "messages_column") if self.reader != "hf" else ():
            if getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} is for reader hf; remove it here, where the reader is {self.reader}")
        return self


class DataConfig(BaseModel):
    """The rows to train on and how they become model inputs."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    train: list[SourceConfig]
    """Sources to train on, one after another."""
    eval: list[SourceConfig] = []
    """Sources to measure on, by `vlsi_fast.scoring` and the demo; training does not read them."""
    min_pixels: int | None = Field(default=None, ge=1)
    """Pixels that a smaller image is enlarged to; default: the processor's own."""
    max_pixels: int | None = Field(default=None, ge=1)
    """Pixels that a larger image is reduced to; default: the processor's own."""
    max_length: int = Field(default=2048, ge=2)
    """Tokens, image tokens included, that a row may have in each model; a longer row is skipped."""
    max_image_pixels: int = Field(default=PILLOW_MAX_IMAGE_PIXELS, ge=1)
    """Pixels that an image file may announce; a larger one is skipped before it is decoded."""
    max_skipped_share: float = Field(default=0.01, ge=0.0, le=1.0)
    """Share of the rows (0 to 1) that may be unusable; more of them stop the run."""
    num_workers: int = Field(default=0, ge=0)
    """Processes that load data beside the training process, on each rank."""

    @model_validator(mode="after")
    def _check(self):
        if not self.train:
            raise ValueError("train is empty; add at least one source, e.g. {reader: easy_vqa}")
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} > max_pixels {self.max_pixels}; swap or widen them")
        if self.max_image_pixels > PILLOW_MAX_IMAGE_PIXELS:
            raise ValueError(
                f"max_image_pixels {self.max_image_pixels} is above {PILLOW_MAX_IMAGE_PIXELS}, where Pillow itself "
                f"refuses an image; use at most that"
            )
        return self


class ConcatSource:
    """Sources one after another, as one list of samples."""

    def __init__(self, parts: list[Reader]):
        self.parts = parts
        self._ends = list(accumulate(len(part) for part in parts))
        names = [part.name for part in parts]
        self._prefix = [f"{i}:" if names.count(name) > 1 else "" for i, name in enumerate(names)]

    def __len__(self) -> int:
        return self._ends[-1]

    def row_id(self, index: int) -> str:
        """Id of row `index`: the source's name and the row's number there, unique among all rows."""
        part, row = self._locate(index)
        return f"{self._prefix[part]}{self.parts[part].name}#{row}"

    def __getitem__(self, index: int) -> Sample:
        """Row `index`.

        Raises:
            UnusableRow: the row is malformed.
        """
        part, row = self._locate(index)
        return self.parts[part].read(row, self.row_id(index))

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
    parts = []
    for i, config in enumerate(configs):
        part = READERS[config.reader](config, f"{field}[{i}]")
        if len(part) == 0:
            raise ValueError(f"{field}[{i}] ({part.name}) has no rows")
        parts.append(part)
    return ConcatSource(parts)
