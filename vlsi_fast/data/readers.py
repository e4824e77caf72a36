"""One reader per format of data. Each opens a source once and parses a row only when it is asked for."""

from __future__ import annotations

import glob
import importlib
import json
import os
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlsi_fast.data.messages import Sample, from_llava, from_messages
from vlsi_fast.data.skipped import UnusableRow

if TYPE_CHECKING:
    from vlsi_fast.data.sources import SourceConfig


class Reader:
    """One opened source: its first `limit` rows, read one at a time.

    Attributes:
        name: the source in row ids.
        image_root: absolute folder that image paths start from.
    """

    name: str
    image_root: str

    def __init__(self, config: SourceConfig):
        self._limit = config.limit

    def rows(self) -> int:
        """Rows there are, before the limit."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.rows() if self._limit is None else min(self._limit, self.rows())

    def read(self, row: int, sample_id: str) -> Sample:
        """Row `row` as a sample.

        Raises:
            UnusableRow: cause bad_row, where the row is malformed.
        """
        raise NotImplementedError


class JsonReader(Reader):
    """LLaVA-style or messages-style rows in a JSON list or a JSON-lines file."""

    def __init__(self, config: SourceConfig, field: str):
        super().__init__(config)
        path = Path(config.path)
        if not path.is_file():
            raise FileNotFoundError(f"{field}.path: {path.absolute()} does not exist or is not a file")
        self.image_root = _image_root(config, path.parent, field)
        self.name = path.name
        self._path = str(path.absolute())
        self._reader = config.reader
        self._list: list | None = None
        self._starts = array("q")  # byte offsets of the lines of a JSON-lines file
        with open(path, "rb") as file:
            head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
        if head.startswith(b"["):
            self._load_list(path, field)
        elif head.startswith(b"{"):
            self._index_lines(path)
        else:
            raise ValueError(f"{field}.path: {path} is neither a JSON list of rows nor JSON lines")

    def _load_list(self, path: Path, field: str) -> None:
        try:
            self._list = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{field}.path: {path} is not valid JSON: {error}") from error

    def _index_lines(self, path: Path) -> None:
        at = 0
        with open(path, "rb") as file:
            for line in file:
                if line.strip():
                    self._starts.append(at)
                at += len(line)

    def rows(self) -> int:
        return len(self._list) if self._list is not None else len(self._starts)

    def read(self, row: int, sample_id: str) -> Sample:
        value = self._list[row] if self._list is not None else self._parse_line(row)
        if self._reader == "llava":
            return from_llava(value, sample_id, self.image_root)
        images = value.get("images") if isinstance(value, dict) else None
        return from_messages(value, sample_id, self.image_root, images=images)

    def _parse_line(self, row: int) -> Any:
        with open(self._path, "rb") as file:  # opened for each row: safe in worker processes
            file.seek(self._starts[row])
            line = file.readline()
        try:
            return json.loads(line.decode("utf-8-sig"))
        except ValueError as error:
            raise UnusableRow("bad_row", f"the line is not JSON: {error}") from error


class HfReader(Reader):
    """A Hugging Face dataset saved with `save_to_disk`, or parquet files."""

    def __init__(self, config: SourceConfig, field: str):
        super().__init__(config)
        path = Path(config.path)
        files = sorted(glob.glob(config.path, recursive=True))
        if not files:
            raise FileNotFoundError(f"{field}.path: {path.absolute()} does not exist, and no file matches it as a glob")
        folder = path if path.is_dir() else Path(files[0]).parent
        self.image_root = _image_root(config, folder, field)
        self.name = f"{path.name}:{config.split}"
        self._data = _without_decoding(_open_hf(path, files, config, field))
        columns = self._data.column_names
        if config.messages_column not in columns:
            raise ValueError(
                f"{field}.messages_column: no column {config.messages_column!r} in {path}; it has {', '.join(columns)}"
            )
        self._messages = config.messages_column
        self._images = next((name for name in (config.images_column, "image") if name in columns), None)
        if self._images != config.images_column and config.images_column != "images":
            raise ValueError(
                f"{field}.images_column: no column {config.images_column!r} in {path}; it has {', '.join(columns)}"
            )

    def rows(self) -> int:
        return len(self._data)

    def read(self, row: int, sample_id: str) -> Sample:
        value = self._data[row]
        images = value[self._images] if self._images is not None else None
        messages = value[self._messages]
        if isinstance(messages, list) and messages and isinstance(messages[0], dict) and "from" in messages[0]:
            return from_llava({"conversations": messages, "image": images}, sample_id, self.image_root)
        return from_messages(value, sample_id, self.image_root, self._messages, images)


class EasyVqaReader(Reader):
    """PyPI's easy-vqa: 38,575 training and 9,673 test questions on small images of coloured shapes."""

    def __init__(self, config: SourceConfig, field: str):
        super().__init__(config)
        package = _import("easy_vqa", "easy-vqa", field)
        train = config.split == "train"
        self.name = f"easy_vqa:{config.split}"
        self._rows = (package.get_train_questions if train else package.get_test_questions)()
        self._paths = (package.get_train_image_paths if train else package.get_test_image_paths)()
        self.image_root = str(Path(package.__file__).parent)

    def rows(self) -> int:
        return len(self._rows[0])

    def read(self, row: int, sample_id: str) -> Sample:
        question, answer, image = (column[row] for column in self._rows)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        path = self._paths.get(image, f"{image}.png")
        return from_messages({"messages": turns}, sample_id, self.image_root, images=path)


def _open_hf(path: Path, files: list[str], config: SourceConfig, field: str):
    """The dataset of one split, from a saved folder, a folder of parquet files, or the files themselves."""
    datasets = _import("datasets", "datasets", field)
    try:
        if path.is_dir() and (path / "dataset_dict.json").is_file():
            saved = datasets.load_from_disk(str(path))
            if config.split not in saved:
                raise ValueError(f"it has the splits {', '.join(saved)}")
            return saved[config.split]
        if path.is_dir() and (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))
        where = {"data_dir": str(path)} if path.is_dir() else {"data_files": {config.split: files}}
        return datasets.load_dataset("parquet", split=config.split, **where)
    except Exception as error:  # whatever datasets raises, the reader is told which field to look at
        raise ValueError(f"{field}: cannot read split {config.split!r} of {path}: {error}") from error


def _without_decoding(data):
    """The dataset with image columns as bytes or paths, so that our own checks come before any decoding."""
    from datasets import Image

    def strip(feature):
        if isinstance(feature, Image):
            return Image(decode=False)
        if isinstance(feature, dict):
            return {key: strip(value) for key, value in feature.items()}
        if isinstance(feature, list | tuple):
            return [strip(value) for value in feature]
        if hasattr(feature, "feature"):
            length = {"length": feature.length} if hasattr(feature, "length") else {}
            return type(feature)(strip(feature.feature), **length)
        return feature

    for name, feature in data.features.items():
        stripped = strip(feature)
        if repr(stripped) != repr(feature):
            data = data.cast_column(name, stripped)
    return data


def _image_root(config: SourceConfig, default: Path, field: str) -> str:
    root = Path(config.image_root) if config.image_root is not None else default
    if not root.is_dir():
        raise FileNotFoundError(f"{field}.image_root: {root.absolute()} does not exist or is not a folder")
    return os.path.realpath(root)


def _import(module: str, distribution: str, field: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{field} needs the package {distribution}: pip install {distribution}") from error


READERS: dict[str, type[Reader]] = {
    "llava": JsonReader,
    "messages": JsonReader,
    "hf": HfReader,
    "easy_vqa": EasyVqaReader,
}
