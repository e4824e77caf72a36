"""What the inspectors share. Each returns one mapping: `kind`, `path`, facts, and `problems`, a list of {what, fix}."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..lineage import checkpoint_digest, weights_digest


def problem(what: str, fix: str) -> dict[str, str]:
    """Something missing or damaged, and what to do."""
    return {"what": what, "fix": fix}


def read_json(path: Path, problems: list[dict[str, str]], fix: str) -> dict[str, Any]:
    """A JSON mapping; empty, with a problem noted, where the file is missing or damaged."""
    try:
        tree = json.loads(path.read_text())
        if not isinstance(tree, dict):
            raise ValueError("not a mapping")
        return tree
    except FileNotFoundError:
        problems.append(problem(f"{path} is missing", fix))
    except (OSError, ValueError) as error:
        problems.append(problem(f"{path} is damaged ({error})", fix))
    return {}


def folder_bytes(folder: Path) -> int:
    """Of all files below."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def parent(role: str, path: str | Path | None, digest: str | None, verbalizers: bool = False) -> dict[str, Any]:
    """What a folder was made from: whether it is still there, and still what it was."""
    state, folder = "not found from here", Path(path or "")
    if path and folder.is_dir():
        try:
            now = (weights_digest if verbalizers else checkpoint_digest)(folder)
            state = "there, the same" if now == digest else "there, but CHANGED since"
        except (OSError, ValueError) as error:
            state = f"there, but damaged ({error})"
    return {"role": role, "path": str(path), "digest": (digest or "")[:12], "now": state}


def step_of(checkpoint: Path) -> int:
    """`checkpoint-12` -> 12; -1 for other names."""
    number = checkpoint.name.rsplit("-", 1)[-1]
    return int(number) if number.isdigit() else -1
