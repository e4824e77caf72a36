"""`vlsi-fast teacher verify` and `merge`: a cache's files, without a model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import ConfigError
from .manifest import HEAD, NAME, TEACHER, counts_of, read_manifest, require_same, write_manifest
from .store import CATALOGUE, SHARDS, append_line, file_digest, shards_of


def problems_of(folder: Path, quick: bool = False) -> Iterator[str]:
    """What is wrong with a cache, shard by shard.

    Args:
        folder: of the cache.
        quick: look at sizes alone, and read no shard to its end.

    Raises:
        ConfigError: the folder holds no cache.
    """
    identity = read_manifest(folder)["identity"]
    if not (folder / TEACHER / "config.json").is_file():
        yield f"{folder / TEACHER / 'config.json'} is missing"
    own_head = identity["form"] == "hidden" and identity["student_head"] is None
    if own_head and not (folder / HEAD).is_file():
        yield f"{folder / HEAD} is missing"
    layers = len(identity["layers"]) + identity["has_last"]
    for name, line in shards_of(folder).items():
        path = folder / SHARDS / name
        if not path.is_file():
            yield f"{path} is missing: {line['rows']} rows"
        elif path.stat().st_size != line["bytes"]:
            yield f"{path} has {path.stat().st_size} bytes, {line['bytes']} were written"
        elif not quick:
            wrong = None if file_digest(path) == line["sha256"] else "is not what was written (checksum)"
            wrong = wrong or _inside(path, line, layers)
            if wrong:
                yield f"{path} {wrong}"


def _inside(path: Path, line: dict[str, Any], layers: int) -> str | None:
    """Whether a shard that is what was written holds what it should."""
    import torch
    from safetensors.torch import load_file

    shard = load_file(path)
    ends, values = (
        shard["ends"],
        [v for n, v in shard.items() if n in ("neg_entropy", "expectation", "hidden", "scale")],
    )
    if len(ends) != line["rows"] or not bool((ends.diff() >= 0).all()):
        return "has another number of rows than its catalogue says"
    if any(v.shape[:2] != (line["tokens"], layers) for v in values):
        return f"has not {layers} layers of {line['tokens']} answer tokens"
    if "kept" in shard and shard["kept"].shape != (line["tokens"],):
        return f"says of {len(shard['kept'])} answer tokens which they are, and has {line['tokens']}"
    if not all(bool(torch.isfinite(v).all()) for v in values if v.is_floating_point()):
        return "holds numbers that are not finite"
    return None


def merge(caches: list[Path], out: Path) -> dict[str, Any]:
    """Join caches: shards are linked where the file system can, else copied. Returns the manifest of `out`.

    Raises:
        ConfigError: they are of different teachers, heads or forms, or `out` is something else.
    """
    manifests = [read_manifest(cache) for cache in caches]
    first = manifests[0]
    for cache, manifest in zip(caches[1:], manifests[1:]):
        require_same(cache, manifest["identity"], first["identity"], str(caches[0]))
    if (out / NAME).is_file():
        require_same(out, read_manifest(out)["identity"], first["identity"], str(caches[0]))
    elif out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no cache; choose another with --out")
    (out / SHARDS).mkdir(parents=True, exist_ok=True)
    for cache in caches:
        if cache.resolve() == out.resolve():
            continue
        if not (out / TEACHER).is_dir():
            shutil.copytree(cache / TEACHER, out / TEACHER)
        if (cache / HEAD).is_file() and not (out / HEAD).is_file():
            _link(cache / HEAD, out / HEAD)
        there = shards_of(out)
        for name, line in shards_of(cache).items():
            if name in there:
                continue
            _link(cache / SHARDS / name, out / SHARDS / name)
            line = {key: value for key, value in line.items() if key != "temporary"}
            append_line(out / SHARDS / f"{name.split('-')[0]}{CATALOGUE}", line)
    manifest = first | {"counts": counts_of(out)}
    write_manifest(out, manifest)
    return manifest


def _link(source: Path, target: Path) -> None:
    partial = target.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    try:
        os.link(source, partial)
    except OSError:
        shutil.copyfile(source, partial)
    partial.replace(target)


def verify_main(folder: Path, quick: bool, as_json: bool) -> int:
    """Print what is wrong. Returns the exit code: 1 where something is."""
    found, counts = list(problems_of(folder, quick)), counts_of(folder)
    if as_json:
        print(json.dumps({"problems": found, **counts}, indent=2))
        return 1 if found else 0
    for line in found:
        print(line)
    if found:
        print(
            f"{len(found)} problems. Delete the shards that are named, if they are there: the `vlsi-fast teacher "
            "build` that made them makes their rows again"
        )
        return 1
    looked = "sizes" if quick else "checksums"
    print(
        f"{folder}: {counts['shards']} shards, {counts['rows']} rows, {counts['tokens']} answer tokens, {looked} right"
    )
    return 0
