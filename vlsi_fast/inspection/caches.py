"""Look into a cache of what a teacher says (`vlsi-fast teacher build`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .looking import parent, problem, read_json

MANIFEST, SHARDS = "manifest.json", "shards"
AGAIN = "build the cache again, or restore the file from a copy"


def is_cache(folder: Path) -> bool:
    """Whether it is one, be its shards there or not."""
    if not (folder / MANIFEST).is_file():
        return False
    if (folder / SHARDS).is_dir() or folder.name == "teacher_cache":
        return True
    try:
        return "identity" in json.loads((folder / MANIFEST).read_text())
    except (ValueError, TypeError):
        return False


def brief_of_cache(run: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The cache of a run, its own or the one that its config names, by its manifest; empty without one."""
    folder = Path(settings.get("teacher.cache") or run / "teacher_cache")
    manifest = read_json(folder / MANIFEST, [], AGAIN)
    identity, counts = manifest.get("identity", {}), manifest.get("counts", {})
    if not identity:
        return {}
    return {
        "path": str(folder),
        "form": identity["form"],
        "numbers": identity["numbers"],
        "rows": counts.get("rows"),
        "answer_tokens": counts.get("tokens"),
        "cache_bytes": counts.get("bytes"),
    }


def inspect_cache(folder: Path) -> dict[str, Any]:
    """What a cache holds, what it is of, and whether that is still there and the same."""
    from ..config import ConfigError
    from ..teacher_cache.manifest import counts_of, read_manifest
    from ..teacher_cache.verifying import problems_of

    facts: dict[str, Any] = {"kind": "teacher's cache", "path": str(folder)}
    try:
        manifest = read_manifest(folder)
    except ConfigError as error:
        return facts | {"problems": [problem(str(error), AGAIN)]}
    identity, counts = manifest["identity"], counts_of(folder)
    fix = (
        "delete the shards that are named, if they are there, and run the `vlsi-fast teacher build` that made them; "
        "`vlsi-fast teacher verify` checks contents too"
    )
    problems = [problem(said, fix) for said in problems_of(folder, quick=True)]
    if not counts["shards"]:
        problems.append(problem(f"{folder / SHARDS} has no rows", "run `vlsi-fast teacher build` to its end"))
    facts |= {
        "form": identity["form"],
        "numbers": identity["numbers"],
        "layers": identity["layers"],
        "last_layer": identity["has_last"],
        "temperature": identity["temperature"],
        "dtype": identity["dtype"],
        "rows": counts["rows"],
        "answer_tokens": counts["tokens"],
        "refused": counts["refused"],
        "shards": counts["shards"],
        "cache_bytes": counts["bytes"],
        "rounding": manifest.get("errors") or {},
        "encoding": {name: value for name, value in identity["encoding"].items() if value is not None},
        "versions": manifest.get("versions", {}),
        "commit": manifest.get("commit"),
        "parents": _parents(folder, manifest),
        "checked": "sizes, not checksums",
    }
    return facts | {"problems": problems}


def _parents(folder: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Teacher, its verbalizers, and the student whose head the targets are for."""
    identity, teacher = manifest["identity"], manifest["teacher"]
    found = [parent("teacher", teacher["path"], identity["teacher"]["checkpoint"])]
    digest = identity["teacher"]["verbalizers"]
    if digest is not None:
        found.append(parent("teacher_verbalizers", teacher.get("verbalizers"), digest, verbalizers=True))
    if identity["student_head"] is not None:
        path, digest = manifest.get("student", {}).get("path"), identity["student_head"]
        state = _head_now(Path(path or ""), digest, identity["dtype"]) if path else "not recorded"
        found.append({"role": "student's head", "path": str(path), "digest": digest[:12], "now": state})
    return found


def _head_now(student: Path, digest: str, dtype: str) -> str:
    """As `looking.parent` says it; one tensor of the student is read."""
    if not student.is_dir():
        return "not found from here"
    from transformers import AutoConfig

    from ..loading import read_head
    from ..teacher_cache.manifest import tensor_digest

    try:
        now = tensor_digest(read_head(student, AutoConfig.from_pretrained(student), dtype))
    except (OSError, ValueError) as error:
        return f"there, but damaged ({error})"
    return "there, the same" if now == digest else "there, but CHANGED since"
