"""Raw rows of a source by number, before they are understood: JSON files, and Hugging Face datasets or parquet.

Neither holds its rows in memory: JSON files through a table of row starts, the others through memory-mapped Arrow.
"""

from __future__ import annotations

import bisect
import glob
import importlib
import json
import os
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlsi_fast.data.jsonfile import JsonFile
from vlsi_fast.data.manifest import require_whole
from vlsi_fast.data.skipped import UnusableRow

if TYPE_CHECKING:
    from vlsi_fast.config_data import SourceConfig


class JsonTable:
    """Rows of JSON lists or JSON-lines files, one file after another.

    Attributes:
        name: the first file's name.
        image_root: absolute folder that image paths start from.
    """

    def __init__(self, config: SourceConfig, field: str):
        paths = [Path(path) for path in config.paths]
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"{field}.path: {path.absolute()} does not exist or is not a file")
        self.name = paths[0].name
        self.image_root = image_root(config, paths[0].parent, field)
        folders = [config.images_under, config.images_not_under]
        filters = {"keep": _ByImageFolder(*folders), "keep_key": json.dumps(folders)} if any(folders) else {}
        try:
            self._files = [JsonFile(path, **filters) for path in paths]
        except ValueError as error:
            raise ValueError(f"{field}.path: {error}") from error
        self._ends = list(accumulate(len(file) for file in self._files))

    def __len__(self) -> int:
        return self._ends[-1]

    def _find(self, row: int) -> tuple[JsonFile, int]:
        file = bisect.bisect_right(self._ends, row)
        return self._files[file], row - (self._ends[file - 1] if file else 0)

    def where(self, row: int) -> dict[str, Any]:
        """The row's `file` and the `line` on which it starts."""
        file, number = self._find(row)
        line = file.line(number)
        return {"file": file.path} | ({} if line is None else {"line": line})

    def __getitem__(self, row: int) -> Any:
        file, number = self._find(row)
        try:
            return file.read(number)
        except ValueError as error:
            raise UnusableRow("bad_row", f"the line is not JSON: {error}") from error

    def mentions(self, column: str) -> bool:
        """Whether the name of a column stands anywhere in the files."""
        return any(file.mentions(column) for file in self._files)

    def value(self, row: int, column: str) -> Any:
        """One value; None where the row has none, or is none."""
        try:
            found = self[row]
        except UnusableRow:
            return None
        return found.get(column) if isinstance(found, dict) else None


class _ByImageFolder:
    """Whether a row's images lie in the folders asked for. What is no mapping is kept, to be told as a bad row."""

    def __init__(self, under: list[str], not_under: list[str]):
        self.under, self.not_under = ([os.path.normpath(path) + "/" for path in paths] for paths in (under, not_under))

    def __call__(self, row: Any) -> bool:
        if not isinstance(row, dict):
            return True
        images = row.get("image") or row.get("images") or []
        images = images if isinstance(images, list) else [images]
        if not all(isinstance(image, str) for image in images):
            return True
        paths = [os.path.normpath(path) for path in images if path]
        inside = all(path.startswith(tuple(self.under)) for path in paths) and bool(paths) if self.under else True
        return inside and not any(path.startswith(tuple(self.not_under)) for path in paths)


class HfTable:
    """Rows of a dataset saved with `save_to_disk`, or of parquet files.

    Attributes:
        name: the path's last part and the split.
        image_root: absolute folder that image paths start from.
        columns: names of the columns.
    """

    def __init__(self, config: SourceConfig, field: str):
        paths = config.paths
        files = sorted({file for path in paths for file in glob.glob(path, recursive=True)})
        path = Path(paths[0])
        if not files:
            raise FileNotFoundError(f"{field}.path: {path.absolute()} does not exist, and no file matches it as a glob")
        folder = path if path.is_dir() else Path(files[0]).parent
        self.image_root = image_root(config, folder, field)
        self.name = f"{path.name}:{config.split}"
        self.path = str(path.absolute())
        self._data = _without_decoding(_open_hf(path, files, config, field))
        self.columns = self._data.column_names

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, row: int) -> dict:
        return self._data[row]

    def where(self, row: int) -> dict[str, Any]:
        """The path that the rows were read from; the number of a row is in its id."""
        return {"file": self.path}

    def mentions(self, column: str) -> bool:
        """Whether there is a column of this name."""
        return column in self.columns

    def value(self, row: int, column: str) -> Any:
        """One value, of a column that there is; the row's others are not read."""
        return self._data.select_columns([column])[row][column]

    def require(self, column: str, option: str, field: str) -> str:
        """`column`, or a ValueError that names the option and the columns there are."""
        if column not in self.columns:
            known = ", ".join(self.columns)
            raise ValueError(f"{field}.{option}: no column {column!r} in {self.name}; it has {known}")
        return column


def _open_hf(path: Path, files: list[str], config: SourceConfig, field: str):
    """The dataset of one split, from a saved folder, a folder of parquet files, or the files themselves."""
    datasets = import_package("datasets", "datasets", field)
    try:
        if path.is_dir():
            require_whole(path)
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


def image_root(config: SourceConfig, default: Path, field: str) -> str:
    """Absolute folder that a source's image paths start from."""
    root = Path(config.image_root) if config.image_root is not None else default
    if not root.is_dir():
        raise FileNotFoundError(f"{field}.image_root: {root.absolute()} does not exist or is not a folder")
    return os.path.realpath(root)


def import_package(module: str, distribution: str, field: str):
    """Import what a reader needs, or an ImportError that names the install command."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{field} needs the package {distribution}: pip install {distribution}") from error
