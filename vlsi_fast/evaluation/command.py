"""`vlsi-fast eval`: which models on which rows, and what is printed."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..config import ConfigError, RunConfig, explain, load_config
from ..config_data import DataConfig
from ..config_files import apply_override, parse_overrides
from ..runs import open_run

DEFAULT_BATCH = 8


def main(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Run the command. Returns the exit code: 1 where nothing could be scored, or a benchmark failed."""
    from . import benchmarks

    if arguments.benchmarks or arguments.tasks or arguments.results:
        return benchmarks.main(arguments, overrides)
    for option in ("include_path", "model_args", "out"):
        if getattr(arguments, option):
            raise ConfigError(f"--{option.replace('_', '-')} is for --benchmarks and --tasks; remove it")
    try:
        return _score(arguments, overrides)
    except (ValueError, ImportError) as error:  # of readers and processors: all say what to do
        print(f"vlsi-fast: {error}", file=sys.stderr)
        return 2


def named_models(arguments: argparse.Namespace) -> dict[str, Path]:
    """Name as given -> checkpoint folder, in the order of the command line.

    Raises:
        ConfigError: none, or one twice.
        FileNotFoundError: a run without a trained student, or no checkpoint.
    """
    from ..loading import resolve_folder

    if not arguments.models:
        raise ConfigError("name a model: --run FOLDER (a run's trained student) or --model FOLDER (any checkpoint)")
    models = {}
    for kind, name in arguments.models:
        if name in models:
            raise ConfigError(f"{name} is named twice; name each model once")
        models[name] = open_run(name).student if kind == "run" else resolve_folder(name, "--model")
    return models


def rows_config(arguments: argparse.Namespace, overrides: list[str]) -> DataConfig:
    """The rows to answer, as `data.eval`: of --data, of --config, or of the first --run.

    Raises:
        ConfigError: none or several of them, or wrong options.
    """
    reader = arguments.reader
    if bool(arguments.data) != bool(reader) and reader != "easy_vqa":
        raise ConfigError("--data FILE and --reader NAME go together; give both")
    if arguments.config and reader:
        raise ConfigError("--config and --reader both say what to answer; remove one")
    if arguments.config:
        data, where = load_config(arguments.config, overrides).data, arguments.config
    elif reader:
        data, where = file_rows(arguments.data, reader, overrides, "eval"), "--reader"
    else:
        where = next((name for kind, name in arguments.models if kind == "run"), None)
        if where is None:
            raise ConfigError("say what to answer: --config FILE (its data.eval), or --data FILE --reader NAME")
        tree = open_run(where).config.model_dump()
        for name, value in parse_overrides(overrides).items():
            apply_override(tree, name, value)
        try:
            data = RunConfig(**tree).data
        except ValidationError as error:
            raise ConfigError(explain(error, RunConfig)) from None
    if not data.eval:
        raise ConfigError(f"{where} has no data.eval; add sources there, or name rows by --data FILE --reader NAME")
    return data


def file_rows(path: str | None, reader: str, overrides: list[str], part: str) -> DataConfig:
    """A data section of one source.

    Args:
        path: its file; None for easy_vqa.
        reader: its reader.
        overrides: `--data.FIELD VALUE`.
        part: "eval" or "train", where the source stands and overrides find it.

    Raises:
        ConfigError: wrong options.
    """
    split = {"eval": "test", "train": "train"}[part]
    source = {"reader": reader} | ({"path": path} if path else {"split": split})
    tree = {"data": {"train": [source.copy()], part: [source]}}
    for name, value in parse_overrides(overrides).items():
        if not name.startswith("data."):
            raise ConfigError(f"--{name}: with --reader only --data.FIELD VALUE is understood")
        apply_override(tree, name, value)
    tree["data"]["train"] = tree["data"][part]  # a config must have rows to train on; eval does not read them as such
    try:
        return DataConfig(**tree["data"])
    except ValidationError as error:
        raise ConfigError(explain(error, DataConfig, "data.")) from None


def _score(arguments: argparse.Namespace, overrides: list[str]) -> int:
    import torch

    from .answers import answer_rows
    from .metrics import load_metrics
    from .report import print_report, summarise

    models = named_models(arguments)
    data = rows_config(arguments, overrides)
    if arguments.metric:
        load_metrics(arguments.metric, "--metric")
        sources = [source.model_copy(update={"metric": arguments.metric}) for source in data.eval]
        data = data.model_copy(update={"eval": sources})
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = {
        "num_beams": arguments.num_beams,
        "max_new_tokens": arguments.max_new_tokens,
        "batch_size": arguments.batch_size or DEFAULT_BATCH,
        "dtype": arguments.dtype or ("float32" if torch.device(device).type == "cpu" else "bfloat16"),
        "limit": arguments.limit,
    }
    answers, skipped = {}, {}
    file = open(arguments.predictions, "w", encoding="utf-8") if arguments.predictions else None
    try:
        for name, folder in models.items():
            answers[name], skipped[name] = [], Counter()
            for answer in answer_rows(folder, data, skipped=skipped[name], device=device, description=name, **settings):
                answers[name].append(answer)
                if file is not None:
                    file.write(answer_line(name, answer) + "\n")
    finally:
        if file is not None:
            file.close()
    for name in [name for name, rows in answers.items() if not rows]:
        causes = ", ".join(f"{cause} {count}" for cause, count in skipped[name].items())
        print(f"vlsi-fast: {name}: no row could be scored ({causes}); docs/data.md tells the causes", file=sys.stderr)
    if not all(answers.values()):
        return 1
    summary = summarise(answers, {name: dict(counts) for name, counts in skipped.items()})
    summary["models"] = {name: {"path": str(models[name])} | found for name, found in summary["models"].items()}
    summary["settings"] = settings | {"device": str(device)}
    if arguments.json:
        print(json.dumps(summary, indent=2))
    else:
        print_report(summary)
        if arguments.predictions:
            print(f"answers: {arguments.predictions}")
    return 0


def answer_line(name: str, answer: Any) -> str:
    """A line of --predictions: whose answer, the row, and every metric's score."""
    told = {"model": name, **vars(answer)}
    return json.dumps(told | told.pop("scores"), ensure_ascii=False)
