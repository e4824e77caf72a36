"""What a cache is of, and whether a run may use it. `CACHE/manifest.json`; its `identity` is what must be the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError, RunConfig
from ..lineage import differences
from .store import SHARDS, CacheError, shards_of

NAME = "manifest.json"
TEACHER = "teacher"
"""Folder of its config and processor."""
HEAD = "head.safetensors"
FORMAT = 1
MEANINGS = {
    "teacher.checkpoint": "the teacher's weights",
    "teacher.tokenizer": "the teacher's tokenizer",
    "teacher.verbalizers": "the teacher's verbalizers",
    "student_head": "the student's language head",
    "student": "the student's weights",
    "vocab_size": "rows of both heads that are compared",
    "temperature": "interact.temperature",
    "dtype": "dtype",
}
"""What the fields of an identity are called in messages; others by their option's name."""


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of a tensor's dtype, shape and bits."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    rows = tensor.contiguous().view(torch.uint8).reshape(len(tensor), -1)
    for part in rows.split(8192):
        digest.update(part.numpy())
    return digest.hexdigest()


def encoding_of(config: RunConfig) -> dict[str, Any]:
    """Options by which the teacher's rows become token ids and pixels, or are left out."""
    names = ("max_length", "max_image_pixels", "max_row_pixels", "special_tokens")
    found = {f"data.{name}": getattr(config.data, name) for name in names}
    for name in ("min_pixels", "max_pixels"):
        of_both, own = getattr(config.data, name), getattr(config.teacher, name)
        found[f"teacher.{name}"] = of_both if own is None else own
    return found


def identity_of_cache(
    config: RunConfig,
    teacher: dict[str, Any],
    *,
    form: str,
    numbers: str,
    layers: list[int],
    has_last: bool,
    vocab_size: int,
    student_head: str | None,
) -> dict[str, Any]:
    """What two caches, or a cache and a run, must have in common.

    Args:
        config: of the run.
        teacher: digests: checkpoint, tokenizer, verbalizers (None where no layer speaks through them), and its
            verbalizer's options, quantization.
        form: targets or hidden.
        numbers: of the expectation; for hidden, the run's dtype.
        layers: teacher layers kept.
        has_last: whether the last layer is.
        vocab_size: rows of both heads that are compared.
        student_head: its digest; None for hidden states, which know no student.
    """
    return {
        "format": FORMAT,
        "form": form,
        "numbers": numbers,
        "layers": layers,
        "has_last": has_last,
        "dtype": config.dtype,
        "teacher": teacher,
        "encoding": encoding_of(config),
        "vocab_size": vocab_size,
        "student_head": student_head,
        "temperature": config.interact.temperature if form == "targets" else None,
    }


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """A cache's manifest.

    Raises:
        ConfigError: there is no cache in the folder, its manifest is damaged, or of another version.
    """
    path = Path(folder) / NAME
    try:
        manifest = json.loads(path.read_text())
        found = manifest["identity"]["format"]
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} holds no cache of a teacher (no {NAME}): make it with `vlsi-fast teacher build --config ..`, or "
            "set teacher.cache to its folder"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}): restore it, or build the cache anew") from None
    if found != FORMAT:
        raise ConfigError(f"{folder} is a cache of format {found}, this vlsi-fast reads {FORMAT}: build it anew")
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write it whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{NAME}.partial"
    partial.write_text(json.dumps(manifest, indent=2) + "\n")
    partial.replace(folder / NAME)


def counts_of(folder: Path) -> dict[str, int]:
    """Shards, rows, answer tokens, rows refused and bytes of a cache, by its catalogues."""
    lines = shards_of(folder).values()
    names = ("rows", "tokens", "refused", "bytes")
    return {"shards": len(lines)} | {name: sum(line[name] for line in lines) for name in names}


def require_same(folder: Path, there: dict[str, Any], here: dict[str, Any], whose: str) -> None:
    """Refuse a cache whose identity is another.

    Args:
        folder: of the cache.
        there: its identity, or some fields of it.
        here: the same fields of `whose`.
        whose: "this run", or what else it is compared with.

    Raises:
        ConfigError: names every difference, with both sides, and what to do.
    """
    told = []
    for name, found, wanted in differences(there, here):
        meaning = MEANINGS.get(name, name.removeprefix("encoding."))
        told.append(f"{meaning}: {_short(found)} in the cache, {_short(wanted)} in {whose}")
    if told:
        raise ConfigError(
            f"{folder} is a cache of something else than {whose} needs:\n  " + "\n  ".join(told) + "\nUse the options "
            "and models that it was built with, or build another with `vlsi-fast teacher build --out FOLDER`"
        )


def _short(value: Any) -> str:
    """Digests by their first characters: all of them say nothing to a reader."""
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    return "none" if value is None else str(value)


def require_rows(folder: Path) -> None:
    """Raise CacheError where a cache has no rows at all."""
    if not shards_of(folder):
        raise CacheError(f"{folder / SHARDS} has no rows yet: run `vlsi-fast teacher build` to its end")
