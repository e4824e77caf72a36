"""Files that a config names, looked for before a model or a row is read. Imports nothing heavy."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config_files import ConfigError

if TYPE_CHECKING:
    from .config import RunConfig
    from .config_data import SourceConfig


def require_files(config: RunConfig, stages: Iterable[str]) -> None:
    """What stages would miss only when it is too late, or not at all: DeepSpeed's config, and the rows of data.eval.

    Raises:
        ConfigError: a DeepSpeed config that cannot be read.
        FileNotFoundError: a file or folder of data.eval that is not there.
    """
    for stage in stages:
        read_deepspeed(config.stage_training(stage).deepspeed)
    for i, source in enumerate(config.data.eval):
        missing = next(_missing(source), None)
        if missing is not None:
            raise FileNotFoundError(
                f"data.eval[{i}]: {missing} does not exist; correct it, or remove the source if nothing is to be "
                "measured on it"
            )


def require_folder(path: str) -> None:
    """Raises ConfigError where `output_dir` is a file, or lies below one."""
    for part in (Path(path), *Path(path).parents):
        if part.is_dir():
            return
        if part.exists():
            raise ConfigError(f"output_dir: {part.absolute()} is a file; name a folder, new or with this run in it")


def read_deepspeed(value: str | dict | None) -> dict[str, Any] | None:
    """`training.deepspeed` as a mapping.

    Raises:
        ConfigError: the file does not exist, or holds no JSON object.
    """
    if not isinstance(value, str):
        return value
    example = "configs/zero3.json is one, null trains without DeepSpeed"
    path = Path(value)
    if not path.is_file():
        raise ConfigError(f"training.deepspeed: file {value} does not exist; {example}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"training.deepspeed: {value} is not valid JSON ({error}); {example}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"training.deepspeed: {value} holds no JSON object; {example}")
    return found


def _missing(source: SourceConfig):
    """Paths of a source that are not there."""
    for path in source.paths:
        if not Path(path).exists() and not glob.glob(path, recursive=True):
            yield Path(path).absolute()
    if source.image_root is not None and not Path(source.image_root).is_dir():
        yield Path(source.image_root).absolute()
