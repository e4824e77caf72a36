"""What a folder made by `vlsi-fast data build` holds, and whether it is all there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

MANIFEST_NAME = "manifest.json"
JOURNAL_NAME = "build.jsonl"
"""Of a build that is not finished."""
FORMAT = "vlsi-fast data 1"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a built folder; None where there is none.

    Raises:
        ValueError: the file is there and is no manifest of this format.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}; build the folder again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT!r}; build the folder again with this version")
    return manifest


def shards_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """All shards, each `{"file", "rows", "bytes", "sha256"}`, files relative to the folder."""
    return [shard for source in manifest["sources"].values() for shard in source["shards"]]


def require_whole(folder: Path) -> None:
    """Compares a folder that is about to be read with the manifest in it or beside it, where there is one, by size.

    Raises:
        ValueError: shards are missing or have another size.
    """
    for root in (folder, folder.parent):
        manifest = read_manifest(root) if (root / MANIFEST_NAME).is_file() else None
        if manifest is not None:
            own = [shard for shard in shards_of(manifest) if (root / shard["file"]).is_relative_to(folder)]
            problems = [problem for shard in own if (problem := _size_problem(root, shard))]
            if problems:
                raise ValueError(f"{'; '.join(problems[:3])}; copy these files again, or build the folder again")
            return


def verify(folder: Path, checksums: bool = True) -> list[str]:
    """What is wrong with a built folder; an empty list where nothing is.

    Raises:
        ValueError: there is no manifest, or it is of another format.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(
            f"{folder} has no {MANIFEST_NAME}: it was not made by `vlsi-fast data build`, or the build is not finished "
            "(run the same command again to finish it)"
        )
    problems, listed = [], set()
    for shard in shards_of(manifest):
        listed.add(shard["file"])
        problem = _size_problem(folder, shard)
        if problem is None and checksums and (found := sha256(folder / shard["file"])) != shard["sha256"]:
            problem = f"{shard['file']} has changed: sha256 {found[:12]}.., {shard['sha256'][:12]}.. expected"
        if problem is not None:
            problems.append(problem)
    for path in sorted(folder.rglob("*.parquet")):
        if (name := path.relative_to(folder).as_posix()) not in listed:
            problems.append(f"{name} is not in the manifest")
    return problems


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _size_problem(root: Path, shard: dict[str, Any]) -> str | None:
    path = root / shard["file"]
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    return None if size == shard["bytes"] else f"{path} has {size} bytes, {shard['bytes']} expected"
