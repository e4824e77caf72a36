"""Lists of sources kept in a file of their own, and the short forms of a path.

A mix file is YAML: `sources`, a list like `data.train`, and optionally `root`, the folder that their relative paths
start from, itself relative to the mix file. A file without `root` leaves that to `data.root`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from .config_files import ConfigError, read_yaml

_SAMPLE = re.compile(r"(.+)#(\d+)", re.DOTALL)


def split_sample(path: str) -> tuple[str, int | None]:
    """`"rows.json#500"` -> `("rows.json", 500)`; without `#N` at its end, `(path, None)`."""
    found = _SAMPLE.fullmatch(path)
    return (found[1], int(found[2])) if found else (path, None)


def expand(sources: Any, root: str | None) -> Any:
    """`data.train` as written -> a plain list of sources: mix files read, relative paths joined to `root`.

    What is not understood is left as it is, for the config's own checks to name.

    Raises:
        ValueError: a mix file does not exist or is none.
    """
    entries = [sources] if isinstance(sources, str) else sources
    if not isinstance(entries, list):
        return sources
    flat = []
    for entry in entries:
        if isinstance(entry, str):
            inner, folder = read_mix(entry)
            flat += [_rooted(source, folder if folder is not None else root) for source in inner]
        else:
            flat.append(_rooted(entry, root))
    return flat


def read_mix(path: str | os.PathLike) -> tuple[list[dict], str | None]:
    """Sources of a mix file, and the folder that their paths start from (None: not said).

    Raises:
        ValueError: the file does not exist or is no mix file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"mix file {path.absolute()} does not exist; a string names a mix file (configs/data/vlsi_mix.yaml is "
            "one), a source is a mapping, e.g. {reader: llava, path: rows.json}"
        )
    try:
        tree = read_yaml(path)
    except ConfigError as error:
        raise ValueError(f"mix file {error}") from error
    if isinstance(tree, list):
        tree = {"sources": tree}
    unknown = set(tree) - {"root", "sources"} if isinstance(tree, dict) else {type(tree).__name__}
    if unknown or not isinstance(tree.get("sources"), list) or not all(isinstance(s, dict) for s in tree["sources"]):
        extra = f", found {', '.join(sorted(map(str, unknown)))}" if unknown else ""
        raise ValueError(f"mix file {path} must hold `sources`, a list of mappings, and optionally `root`{extra}")
    root = tree.get("root")
    return tree["sources"], None if root is None else os.path.join(path.parent, str(root))


def _rooted(source: Any, root: str | None) -> Any:
    if root is None:
        return source
    if not isinstance(source, dict):  # a SourceConfig made by hand
        changes = {name: _join(root, getattr(source, name)) for name in ("path", "image_root")}
        return source.model_copy(update=changes)
    return {name: _join(root, value) if name in ("path", "image_root") else value for name, value in source.items()}


def _join(root: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_join(root, item) for item in value]
    return os.path.join(root, value) if isinstance(value, str) else value
