"""`vlsi-fast data build | verify | stats | answer`."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from pydantic import ValidationError

from vlsi_fast.config import ConfigError, explain, load_config, parse_overrides
from vlsi_fast.config_data import DataConfig
from vlsi_fast.config_mix import read_mix
from vlsi_fast.data.answering.arguments import add_answer_arguments
from vlsi_fast.data.sources import build_source
from vlsi_fast.sizes import parse_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`data`'s own commands and options."""
    commands = parser.add_subparsers(dest="data_command", required=True)
    build = commands.add_parser("build", help="convert all sources to parquet shards with a manifest")
    stats = commands.add_parser("stats", help="rows, weights and rows an epoch of every source")
    for command in (build, stats):
        command.epilog = "Any option of data can be overridden: --data.field VALUE."
        command.add_argument("--config", required=True, help="YAML file of a run, or a mix file")
    build.add_argument("--out", required=True, type=Path, help="folder to write; continued where interrupted")
    build.add_argument("--shard-size", default="1GB", type=parse_size, help="of a shard, e.g. 500MB (default: 1GB)")
    build.add_argument("--workers", default=0, type=int, help="processes that read images (default 0: this one)")
    answer = commands.add_parser(
        "answer",
        help="let the teacher answer pictures without labels: rows to train on",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_answer_arguments(answer)
    verify = commands.add_parser("verify", help="compare a built folder with its manifest")
    verify.add_argument("folder", type=Path)
    verify.add_argument("--quick", action="store_true", help="sizes only, no checksums")


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Runs one command. Returns the exit code: 0, 1 (too many rows dropped, or a damaged folder), 2 (bad input)."""
    try:
        if arguments.data_command == "verify":
            if overrides:
                raise ConfigError(f"data verify reads no config and takes no {overrides[0]}; remove it")
            return _verify(arguments)
        if arguments.data_command == "answer":
            from vlsi_fast.data.answering.command import main as answer

            return answer(arguments, overrides)
        return {"build": _build, "stats": _stats}[arguments.data_command](arguments, overrides)
    except (ValueError, FileNotFoundError, ImportError) as error:  # of readers and configs: all say what to do
        print(f"vlsi-fast: {error}", file=sys.stderr)
        return 2


def data_config(path: str, overrides: list[str]) -> DataConfig:
    """The `data` section of a run's config, or of a mix file as if it were `data.train`.

    Raises:
        FileNotFoundError: no such file.
        ConfigError: wrong options.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"config file {path} does not exist; see configs/ and configs/data/ for examples")
    if not _is_mix(path):
        return load_config(path, overrides).data
    values = parse_overrides(overrides)
    wrong = [name for name in values if not re.fullmatch(r"data\.\w+", name)]
    if wrong:
        raise ConfigError(f"--{wrong[0]}: with a mix file only --data.field VALUE is understood, e.g. --data.root DIR")
    try:
        return DataConfig(**{"train": path} | {name.removeprefix("data."): value for name, value in values.items()})
    except ValidationError as error:
        raise ConfigError(f"{path}:\n{explain(error, DataConfig, 'data.')}") from None


def _is_mix(path: str) -> bool:
    try:
        read_mix(path)
    except ValueError:
        return False
    return True


def _build(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from vlsi_fast.data.build import build

    if arguments.workers < 0:
        raise ConfigError(f"--workers is {arguments.workers}; use 0 or more")
    manifest = build(data_config(arguments.config, overrides), arguments.out, arguments.shard_size, arguments.workers)
    for name, source in manifest["sources"].items():
        dropped = ", ".join(f"{cause} {count}" for cause, count in source["dropped"].items())
        print(f"{name}: {source['rows']} of {source['rows_read']} rows" + (f"; dropped: {dropped}" if dropped else ""))
    total = sum(manifest["dropped"].values())
    print(f"{manifest['rows']} rows, {total} dropped (listed in {arguments.out / 'skipped_rows.jsonl'})")
    print(f"Use it with data.train: {arguments.out / 'mix.yaml'}")
    return 0


def _stats(arguments: argparse.Namespace, overrides: list[str]) -> int:
    from vlsi_fast.data.mixing import EpochOrder

    data = data_config(arguments.config, overrides)
    source = build_source(data.train)
    order = EpochOrder(source.sizes, 0, source.weights, data.stopping_strategy)
    answered = 0
    for config, part, quota in zip(data.train, source.parts, order.quotas, strict=True):
        weight = "" if config.weight is None else f", weight {config.weight:g}"
        found = part.answered_rows()
        answered += found
        by = f", {found} of them answered by a model" if found else ""
        print(f"{part.name}: {len(part)} rows{by}{weight}; {quota} an epoch ({quota / len(order):.2%})")
    apart = f" ({len(source) - answered} labelled, {answered} answered by a model)" if answered else ""
    print(f"{len(source)} rows{apart}; {len(order)} an epoch")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from vlsi_fast.data.manifest import read_manifest, shards_of, verify

    problems = verify(arguments.folder, checksums=not arguments.quick)
    for problem in problems:
        print(f"vlsi-fast: {problem}", file=sys.stderr)
    if problems:
        print("vlsi-fast: copy these files again, or remove the folder and build it again", file=sys.stderr)
        return 1
    manifest = read_manifest(arguments.folder)
    print(f"{len(shards_of(manifest))} shards, {manifest['rows']} rows: all as in {arguments.folder / 'manifest.json'}")
    return 0
