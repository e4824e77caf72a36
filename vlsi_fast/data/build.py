"""`vlsi-fast data build`: all sources of a config -> parquet shards with the images' own bytes, and a manifest.

    OUT/manifest.json          rows, bytes and sha256 of every shard; rows read, written and dropped of every source
    OUT/mix.yaml               a mix file: `data.train: OUT/mix.yaml` reads the folder, with the weights of the config
    OUT/<source>/train-*.parquet   columns id, source, row, messages, images (bytes as they were, never encoded
                               again), answered_by (JSON; null where people answered)
    OUT/skipped_rows.jsonl     every row dropped, and why

The same input gives the same bytes, whatever the number of workers and however often the build was interrupted: a
shard's rows follow from the rows before it. A shard is written under another name, closed, renamed, and then noted in a
journal; the next start drops what is not in the journal and goes on behind it. The manifest is written last.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from vlsi_fast.config_data import DataConfig, SourceConfig
from vlsi_fast.data.encoding import check_messages
from vlsi_fast.data.images import check_pixels, image_bytes, load_image
from vlsi_fast.data.manifest import FORMAT, JOURNAL_NAME, MANIFEST_NAME, read_manifest, sha256
from vlsi_fast.data.messages import Sample
from vlsi_fast.data.readers import ANSWERED_BY
from vlsi_fast.data.skipped import SkipLog, UnusableRow, printable, row_boundary
from vlsi_fast.data.sources import ConcatSource, build_source
from vlsi_fast.errors import UserError

GROUP_BYTES = 32 * 2**20
"""Bytes that are held before they are written as a row group."""
GROUP_ROWS = 256
BLOCK_ROWS = 64
"""Rows that one worker has in hand."""


NO_PLACEHOLDER = "<|no placeholder|>"
"""Images stand in a built row's messages; an `<image>` in its text is text, of a source with another placeholder."""


class BuildError(UserError, ValueError):
    """A build that cannot start. The message names the fix."""


def build(data: DataConfig, out: Path, shard_bytes: int = 10**9, workers: int = 0) -> dict[str, Any]:
    """Converts every row of `data.train`, each once, in the order of the config.

    Args:
        data: the sources, `max_image_pixels` and `max_skipped_share`.
        out: the folder; an interrupted build of the same config is continued, a finished one is left as it is.
        shard_bytes: bytes of images and text after which a shard is closed.
        workers: processes that read and check images; 0: this one.

    Returns:
        The manifest.

    Raises:
        BuildError: `out` holds something else.
        TooManySkippedRows: more rows were dropped than `data.max_skipped_share` allows.
        FileNotFoundError, ValueError, ImportError: from opening the sources.
    """
    source = build_source(data.train)
    folders = _folders(source)
    key = _key(data, source, shard_bytes)
    found = read_manifest(out)
    if found is not None:
        if found["key"] != key:
            raise BuildError(f"{out} holds a build of other sources or options; choose another --out, or remove it")
        _write_mix(out, data.train, folders, found)  # weights are no part of the build
        return found
    journal = _Journal(out, key, set(folders))
    log = SkipLog(out / "skipped_rows.jsonl", len(source), data.max_skipped_share)
    with ExitStack() as stack:
        convert = _Converter(data, source, workers, stack)
        first = 0
        for folder, part in zip(folders, source.parts, strict=True):
            at = journal.rows_done(folder)
            while at < len(part):
                path = out / folder / f"train-{journal.shards_done(folder):05d}.parquet"
                shard = _write_shard(path, convert(first + at, first + len(part)), at, shard_bytes)
                log.record(shard.pop("skipped"))
                log.check()
                journal.add(shard)
                at = shard["next"]
            first += len(part)
    manifest = _manifest(key, folders, source, journal)
    _write_mix(out, data.train, folders, manifest)
    _write_whole(out / MANIFEST_NAME, json.dumps(manifest, indent=1) + "\n")
    journal.path.unlink()
    return manifest


class _Journal:
    """The shards that are finished, one JSON object a line behind a line that names the build."""

    def __init__(self, out: Path, key: str, folders: set[str]):
        self.path, self.entries = out / JOURNAL_NAME, []
        others = [path for path in out.iterdir() if path.suffix != ".tmp"] if out.is_dir() else []
        if others and not self.path.is_file():
            raise BuildError(f"{out} is not empty and holds no unfinished build; choose another --out, or empty it")
        out.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else []
        whole = [line for line in lines if line.endswith(b"\n")]  # the last one may have been cut
        if whole and json.loads(whole[0]) != {"build": key}:
            raise BuildError(f"{out} holds an unfinished build of other sources or options; choose another --out")
        self.entries = [json.loads(line) for line in whole[1:]]
        _write_whole(self.path, "".join(line.decode() for line in whole) or json.dumps({"build": key}) + "\n")
        noted = {entry["file"] for entry in self.entries}
        for folder in folders:
            for path in (out / folder).glob("train-*.parquet*"):
                if path.relative_to(out).as_posix() not in noted:
                    path.unlink()

    def of(self, folder: str) -> list[dict]:
        return [entry for entry in self.entries if entry["source"] == folder]

    def rows_done(self, folder: str) -> int:
        return max((entry["next"] for entry in self.of(folder)), default=0)

    def shards_done(self, folder: str) -> int:
        return sum(entry["file"] is not None for entry in self.of(folder))

    def add(self, shard: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(shard) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(shard)


def _write_shard(path: Path, converted: Iterator[dict], at: int, shard_bytes: int) -> dict:
    """Rows of one source, the first being its row `at`, until the shard is full or the source ends."""
    folder = path.parent.name
    path.parent.mkdir(exist_ok=True)
    partial, skipped, size, rows = path.with_name(path.name + ".tmp"), [], 0, 0
    with _ShardWriter(partial) as writer:
        for row in converted:
            at += 1
            if "cause" in row:
                skipped.append(row)
                continue
            size += writer.add({**row, "source": folder})
            rows += 1
            if size >= shard_bytes:
                break
    entry = {"source": folder, "next": at, "rows": rows, "dropped": dict(Counter(row["cause"] for row in skipped))}
    if rows == 0:
        partial.unlink()
        return entry | {"file": None, "bytes": 0, "sha256": None, "skipped": skipped}
    entry |= {"file": f"{folder}/{path.name}", "bytes": partial.stat().st_size, "sha256": sha256(partial)}
    os.replace(partial, path)
    return entry | {"skipped": skipped}


class _ShardWriter:
    """A parquet file that is written a row group at a time."""

    def __init__(self, path: Path):
        import pyarrow.parquet

        self._schema = _schema()
        self._writer = pyarrow.parquet.ParquetWriter(path, self._schema, compression="zstd")
        self._rows, self._size = [], 0

    def __enter__(self) -> _ShardWriter:
        return self

    def __exit__(self, *error) -> None:
        if error[0] is None:
            self._flush()
        self._writer.close()

    def add(self, row: dict) -> int:
        """Returns the bytes of its images and text."""
        size = sum(len(image["bytes"]) for image in row["images"])
        size += sum(len(part["text"] or "") for turn in row["messages"] for part in turn["content"])
        self._rows.append(row)
        self._size += size
        if self._size >= GROUP_BYTES or len(self._rows) >= GROUP_ROWS:
            self._flush()
        return size

    def _flush(self) -> None:
        import pyarrow

        if self._rows:
            self._writer.write_table(pyarrow.Table.from_pylist(self._rows, schema=self._schema))
        self._rows, self._size = [], 0


def _schema():
    """Arrow schema with the note by which `datasets` knows the images."""
    from datasets import Features, Image, List, Value

    text = Value("string")
    turn = {"role": text, "content": List({"type": text, "text": text})}
    columns = {"id": text, "source": text, "row": Value("int64"), "messages": List(turn), "images": List(Image())}
    return Features(columns | {ANSWERED_BY: text}).arrow_schema


class _Converter:
    """Row numbers -> rows to write, or records of rows that cannot be used, in order."""

    def __init__(self, data: DataConfig, source: ConcatSource, workers: int, stack: ExitStack):
        bounds = (data.max_image_pixels, data.max_row_pixels)
        self._local = (source, bounds)
        self._workers, self._pool = workers, None
        if workers:
            # spawned: a forked copy of a process that has started threads (Arrow's, torch's) may hang
            context = multiprocessing.get_context("spawn")
            settings = ([config.model_dump() for config in data.train], bounds)
            self._pool = stack.enter_context(context.Pool(workers, _open_in_worker, settings))

    def __call__(self, first: int, end: int) -> Iterator[dict]:
        if self._pool is None:
            yield from (_convert(*self._local, index) for index in range(first, end))
            return
        step = BLOCK_ROWS * self._workers
        for start in range(first, end, step):  # block by block, so that no worker runs ahead of the disk
            yield from self._pool.map(_convert_in_worker, range(start, min(start + step, end)), chunksize=8)


_in_worker: tuple[ConcatSource, tuple[int, int]] | None = None


def _open_in_worker(configs: list[dict], bounds: tuple[int, int]) -> None:
    global _in_worker
    os.environ["RANK"] = "1"  # notices about counts were given once
    _in_worker = (build_source([SourceConfig(**config) for config in configs]), bounds)


def _convert_in_worker(index: int) -> dict:
    return _convert(*_in_worker, index)


def _convert(source: ConcatSource, bounds: tuple[int, int], index: int) -> dict:
    """A row to write, or the record of one that cannot be used.

    Args:
        source: the rows.
        bounds: `max_image_pixels` and `max_row_pixels`.
        index: which row.
    """
    try:
        with row_boundary():
            return _converted(source[index], bounds)
    except UnusableRow as error:
        return source.skip_record(index, error)


def _converted(sample: Sample, bounds: tuple[int, int]) -> dict:
    check_messages(sample)
    check_pixels(sample.images, *bounds)
    for ref in dict.fromkeys(sample.images):
        load_image(ref, bounds[0])
    paths = [None if ref.path is None else printable(ref.path) for ref in sample.images]
    images = [{"bytes": image_bytes(ref), "path": path} for ref, path in zip(sample.images, paths)]
    turns = []
    for turn in sample.messages:
        content = [{"type": part["type"], "text": part.get("text")} for part in turn["content"]]
        turns.append({"role": turn["role"], "content": content})
    by = None if sample.answered_by is None else json.dumps(sample.answered_by)
    row = {"id": sample.id, "row": int(sample.id.rsplit("#", 1)[1]), "messages": turns, "images": images}
    return row | {ANSWERED_BY: by}


def _folders(source: ConcatSource) -> list[str]:
    """One folder name a source, in order."""
    names = [re.sub(r"[^\w.-]+", "_", part.name).strip(".") or "source" for part in source.parts]
    return [name if names.count(name) == 1 else f"{i:02d}_{name}" for i, name in enumerate(names)]


def _key(data: DataConfig, source: ConcatSource, shard_bytes: int) -> str:
    """Names the build: what its bytes follow from, as far as it can be known without reading all rows."""
    loose = {"weight", "count", "count_tolerance"}
    facts = [FORMAT, ANSWERED_BY, [config.model_dump(exclude=loose) for config in data.train], source.sizes]
    bounds = [data.max_image_pixels, data.max_row_pixels]
    return hashlib.sha256(json.dumps([*facts, *bounds, shard_bytes]).encode()).hexdigest()


def _manifest(key: str, folders: list[str], source: ConcatSource, journal: _Journal) -> dict[str, Any]:
    sources, dropped = {}, Counter()
    for folder, part in zip(folders, source.parts, strict=True):
        entries = journal.of(folder)
        causes = sum((Counter(entry["dropped"]) for entry in entries), Counter())
        dropped += causes
        kept = [entry for entry in entries if entry["file"] is not None]
        sources[folder] = {
            "rows_read": len(part),
            "rows": sum(entry["rows"] for entry in kept),
            "dropped": dict(sorted(causes.items())),
            "shards": [{name: entry[name] for name in ("file", "rows", "bytes", "sha256")} for entry in kept],
        }
    totals = {"rows": sum(entry["rows"] for entry in sources.values()), "dropped": dict(sorted(dropped.items()))}
    return {"format": FORMAT, "key": key, **totals, "sources": sources}


def _write_mix(out: Path, configs: list[SourceConfig], folders: list[str], manifest: dict) -> None:
    entries = []
    for config, folder in zip(configs, folders, strict=True):
        if rows := manifest["sources"][folder]["rows"]:
            entry = {"name": folder, "reader": "hf", "path": folder, "count": rows, "count_tolerance": 0}
            entry["placeholder"] = NO_PLACEHOLDER
            entries.append(entry | ({} if config.weight is None else {"weight": config.weight}))
    text = "# Made by `vlsi-fast data build`. Use it as data.train.\n"
    _write_whole(out / "mix.yaml", text + yaml.safe_dump({"root": ".", "sources": entries}, sort_keys=False))


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
