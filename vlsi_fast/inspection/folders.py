"""Tell what kind of folder it is, and look into it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..config import STAGES
from ..data.manifest import JOURNAL_NAME, MANIFEST_NAME, read_manifest, shards_of, verify
from ..weights import VERBALIZER_CONFIG, VERBALIZER_WEIGHTS
from .caches import inspect_cache, is_cache
from .looking import folder_bytes, problem
from .models import inspect_adapter, inspect_checkpoint, inspect_verbalizers
from .stages import inspect_run, inspect_stage, inspect_training_checkpoint, is_run, is_stage


def inspect_folder(folder: Path) -> dict[str, Any]:
    """What a folder holds.

    Returns:
        `kind`, `path`, facts that depend on the kind, and `problems`: what is missing or damaged, each with its fix.

    Raises:
        FileNotFoundError: no such folder, or nothing known in it; the message names folders nearby that are known.
    """
    if not folder.is_dir():
        what = "is a file; give the folder that it is in" if folder.is_file() else "does not exist"
        raise FileNotFoundError(f"{folder} {what}")
    look = _inspector(folder)
    if look is None:
        known = [str(child) for child in sorted(folder.iterdir()) if child.is_dir() and _inspector(child)]
        hint = f"; look at {', '.join(known[:5])}" if known else "; give a run's output_dir, or a checkpoint"
        raise FileNotFoundError(f"{folder} holds nothing that vlsi-fast or transformers writes{hint}")
    try:
        return look(folder)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        said = f"{folder}: its JSON files are not as this version writes them ({type(error).__name__}: {error})"
        fix = "look at it with the version of vlsi-fast that wrote it, or restore the files from a copy"
        return {"kind": "unreadable", "path": str(folder), "problems": [problem(said, fix)]}


def _inspector(folder: Path):
    names = {file.name for file in folder.iterdir()}
    if is_cache(folder):
        return inspect_cache
    if is_stage(folder):
        return inspect_stage
    if is_run(folder):
        return inspect_run
    if re.fullmatch(r"checkpoint-\d+", folder.name) and "config.json" not in names:
        return inspect_training_checkpoint
    if names & {VERBALIZER_CONFIG, VERBALIZER_WEIGHTS}:
        return inspect_verbalizers
    if names & {"adapter_config.json", "adapter_model.safetensors"}:
        return inspect_adapter
    if names & {MANIFEST_NAME, JOURNAL_NAME}:
        return inspect_data
    if "config.json" in names or any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return inspect_checkpoint
    if folder.name in STAGES and any(re.fullmatch(r"checkpoint-\d+", name) for name in names):
        return inspect_stage
    return None


def inspect_data(folder: Path) -> dict[str, Any]:
    """A folder made by `vlsi-fast data build`."""
    facts: dict[str, Any] = {"kind": "data", "path": str(folder), "bytes": folder_bytes(folder)}
    try:
        manifest = read_manifest(folder)
        if manifest is None:
            fix = "run the same `vlsi-fast data build` again: it goes on where it stopped"
            return facts | {"problems": [problem(f"{folder}: the build is not finished", fix)]}
        sources = [
            {"source": name, "rows": source["rows"], "read": source["rows_read"], "shards": len(source["shards"])}
            for name, source in manifest["sources"].items()
        ]
        wrong = verify(folder, checksums=False)
        facts |= {"rows": manifest["rows"], "dropped": manifest["dropped"], "shards": len(shards_of(manifest))}
    except ValueError as error:
        return facts | {"problems": [problem(str(error), "build the folder again")]}
    except (KeyError, TypeError) as error:
        said = f"{folder / MANIFEST_NAME} lacks {error}"
        return facts | {"problems": [problem(said, "build the folder again")]}
    facts |= {"sources": sources, "use": f"data.train: {folder / 'mix.yaml'}", "checked": "sizes, not checksums"}
    fix = "copy these files again, or remove the folder and build it again; `vlsi-fast data verify` checks contents too"
    return facts | {"problems": [problem(said, fix) for said in wrong]}
