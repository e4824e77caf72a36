"""What a checkpoint-N holds: its manifest, written last, by which a resumed run knows that all of it is as written.

`manifest.json` lists the checkpoint's files, those of all ranks, with size and sha256, and the same of `metrics.jsonl`
up to the checkpoint's step. A folder without one was being written when its run ended. The manifest finds damage, not
forgery: that a checkpoint's files run no code is the work of `unpickling.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST_NAME = "manifest.json"
METRICS_NAME = "metrics.jsonl"
EVALUATIONS_NAME = "eval.jsonl"
CONVERTED = ("*_universal", "latest_universal")
"""What a conversion for another number of ranks adds to a checkpoint; it has a manifest of its own."""
THREADS = 4
"""Files hashed at once by one rank: sha256 of one runs at 1 to 2 GB/s, and hashlib works beside other threads."""


def checkpoints(folder: str | Path) -> list[Path]:
    """The folders `checkpoint-N` of a stage, by step."""
    found = [p for p in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: str | Path) -> int:
    """Optimizer steps made up to a checkpoint."""
    return int(Path(checkpoint).name.rsplit("-", 1)[1])


def files_of(checkpoint: Path) -> list[str]:
    """Names of a checkpoint's files, relative to it; not the manifest, nor a conversion's."""
    found = []
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint)
        converted = any(Path(name.parts[0]).match(pattern) for pattern in CONVERTED)
        converted |= len(name.parts) > 1 and any(Path(name.parts[1]).match(pattern) for pattern in CONVERTED)
        if (path.is_file() or path.is_symlink()) and not converted and name.parts[-1] != MANIFEST_NAME:
            found.append(name.as_posix())
    return found


def writer_of(name: str) -> int:
    """The rank that wrote a file, as its name says; 0 where it says nothing."""
    found = re.search(r"(?:zero_pp_rank|rng_state)_(\d+)", name)
    return int(found[1]) if found else 0


# ---- written ----


def describe(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """name -> size and sha256 of these files. They are on the disk, not only in memory, when this returns.

    So that after a power failure a manifest that can be read is one whose files can be.
    """

    def look(name: str) -> tuple[str, dict[str, Any]]:
        with (folder / name).open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            os.fsync(stream.fileno())
            return name, {"size": stream.tell(), "sha256": digest}

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(pool.map(look, names))


def describe_start(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file that only grows, as it is now."""
    size = path.stat().st_size
    return {"size": size, "sha256": _digest_of_start(path, size)}


def write_manifest(folder: Path, files: dict[str, dict[str, Any]], **facts: Any) -> None:
    """Mark a folder as complete: a reader sees all of the manifest or none."""
    partial = folder / f"{MANIFEST_NAME}.partial"
    with partial.open("w") as stream:
        json.dump({"files": files, **facts}, stream, indent=1, sort_keys=True)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(folder / MANIFEST_NAME)


def lines_up_to(path: Path, step: int) -> list[str]:
    """The lines of a stage's records, one JSON object with `step` a line, that are whole and of no later step."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Replace a file of records: a reader sees the old or the new one."""
    partial = path.with_suffix(".partial")
    partial.write_text("".join(line + "\n" for line in lines))
    partial.replace(path)


def keep_newest(folder: Path, limit: int | None, best: int | None = None) -> None:
    """Delete all but the newest `limit` checkpoints and that of step `best`. Called once the newest is complete."""
    for checkpoint in checkpoints(folder)[: -limit if limit else 0]:
        if step_of(checkpoint) == best:
            continue
        (checkpoint / MANIFEST_NAME).unlink(missing_ok=True)  # first, so that half of one does not look whole
        shutil.rmtree(checkpoint, ignore_errors=True)


def drop_newer(folder: Path, kept: str | Path | None) -> None:
    """Delete checkpoints newer than the one that a run goes on from: of their files, one a rank, some would stay among
    those of a new checkpoint of the same step that fewer ranks write. Rank 0's work."""
    for found in checkpoints(folder):
        if kept is None or step_of(found) > step_of(kept):
            shutil.rmtree(found)


# ---- read ----


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None where there is none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text())
        sizes = [file["size"] + len(file["sha256"]) for file in manifest["files"].values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if sizes else None


def checkpoint_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's files by its manifest, 0 without one."""
    return sum(file["size"] for file in (read_manifest(folder) or {"files": {}})["files"].values())


def damage(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the files of a manifest, a line each; nothing where all is as it was written.

    Args:
        folder: a checkpoint, or a conversion of one.
        part, parts: hash only every `parts`-th file by size, from `part`, so that ranks share the work.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return [f"{MANIFEST_NAME} cannot be read"]
    wanted, found = manifest["files"], set(files_of(folder))
    said = [f"{name} is missing" for name in sorted(wanted.keys() - found)]
    said += [f"{name} is not of this checkpoint" for name in sorted(found - wanted.keys())]
    by_size = sorted(wanted.keys() & found, key=lambda name: (-wanted[name]["size"], name))
    with ThreadPoolExecutor(THREADS) as pool:
        pairs = pool.map(lambda name: (name, _difference(folder / name, wanted[name])), by_size[part::parts])
        return said + [f"{name} {difference}" for name, difference in pairs if difference]


def metrics_damage(checkpoint: Path) -> list[str]:
    """What is wrong with the records of the steps up to a checkpoint, as `damage` says it."""
    wanted, path = (read_manifest(checkpoint) or {}).get("metrics"), checkpoint.parent / METRICS_NAME
    if wanted is None:
        return []
    if not path.is_file():
        return [f"../{METRICS_NAME} is missing"]
    if path.stat().st_size < wanted["size"] or _digest_of_start(path, wanted["size"]) != wanted["sha256"]:
        return [f"../{METRICS_NAME} does not hold what it did up to step {step_of(checkpoint)}"]
    return []


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint with a manifest whose files have their sizes, or None. A quick look: nothing is hashed."""
    for checkpoint in reversed(checkpoints(folder)):
        if looks_whole(checkpoint):
            return str(checkpoint)
    return None


def looks_whole(checkpoint: Path) -> bool:
    """Whether the manifest's files are there with their sizes."""
    manifest = read_manifest(checkpoint)
    try:
        return manifest is not None and all(
            (checkpoint / name).stat().st_size == file["size"] for name, file in manifest["files"].items()
        )
    except OSError:
        return False


def _difference(path: Path, wanted: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != wanted["size"]:
            return f"has {size:,} bytes, not {wanted['size']:,}"
        with path.open("rb") as stream:
            same = hashlib.file_digest(stream, "sha256").hexdigest() == wanted["sha256"]
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if same else "is not what was written (its sha256 differs)"


def _digest_of_start(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while size > 0 and (block := stream.read(min(size, 1 << 20))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()
