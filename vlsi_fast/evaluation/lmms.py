"""lmms-eval as a subprocess, one for each benchmark, and the results files that it writes.

A benchmark has a folder of its own for every run: HallusionBench, for one, keeps its judge's verdicts there and takes
them for the next model's if it finds them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import ConfigError

if TYPE_CHECKING:
    from .benchmarks import Benchmark

MODEL_CLASSES = {
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl",
    "qwen3_5": "qwen3_5",
    "glm4v": "glm4v",
    "llava_onevision": "llava_hf",
    "internvl": "internvl_hf",
    "smolvlm": "huggingface",
    "gemma3": "gemma3",
}
"""`model_type` of a stock checkpoint -> lmms-eval's model."""
INSTALL = 'pip install -e ".[lmms-eval]"'


def run(arguments: argparse.Namespace, wanted: list[Benchmark]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Run benchmarks on every model, one after another.

    Returns:
        What `read_results` tells, by the models' names as given; and what failed, as "model: benchmark".

    Raises:
        ConfigError: lmms-eval is missing, a family that it has no model for, or no folder to write to.
    """
    from .command import named_models

    missing = [name for name in ("lmms_eval", "decord") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--benchmarks and --tasks need lmms-eval ({', '.join(missing)} is missing): {INSTALL}")
    results, failed = {}, []
    models = named_models(arguments)
    classes = {name: _model_class(folder) for name, folder in models.items()}  # before the first one takes its hours
    outs = {name: _out(arguments, name) for name in models}
    for name, folder in models.items():
        results[name] = {}
        for benchmark in wanted:
            out = outs[name] / f"{benchmark.name}-{time.strftime('%Y%m%d-%H%M%S')}"
            out.mkdir(parents=True)
            command = _command(arguments, classes[name], folder, benchmark, out)
            print(f"$ {' '.join(command)}", file=sys.stderr, flush=True)
            done = subprocess.run(command, stdout=2)  # its tables go where its progress goes, away from --json
            found = _read(out) if list(out.rglob("*_results.json")) else {}  # it exits with 0 after an error, too
            if done.returncode or benchmark.task not in next(iter(found.values()), {}):
                failed.append(f"{name}: {benchmark.name}")
                print(f"vlsi-fast: {benchmark.name} failed on {name}, see lmms-eval's words above", file=sys.stderr)
            for each in found.values():
                results[name] |= each
    return results, failed


def _model_class(folder: Path) -> str:
    kind = json.loads((folder / "config.json").read_text()).get("model_type")
    if kind not in MODEL_CLASSES:
        raise ConfigError(f"{folder}: no lmms-eval model is known for {kind}; known: {', '.join(MODEL_CLASSES)}")
    if "," in str(folder):
        raise ConfigError(f"{folder}: lmms-eval takes no path with a comma; rename the folder")
    return MODEL_CLASSES[kind]


def _out(arguments: argparse.Namespace, name: str) -> Path:
    """Folder of a model's results: --out (a folder in it for each of several models), or in the run's own."""
    if arguments.out:
        several = len(arguments.models) > 1
        return Path(arguments.out) / name.strip("/.").replace("/", "_") if several else Path(arguments.out)
    if ("run", name) in arguments.models:
        return Path(name) / "benchmarks"
    raise ConfigError(f"{name}: say where lmms-eval may write: --out FOLDER")


def _command(arguments: argparse.Namespace, model: str, folder: Path, benchmark: Benchmark, out: Path) -> list[str]:
    import torch

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    words = {"pretrained": str(folder), "device_map": device}
    model_args = ",".join(f"{key}={value}" for key, value in words.items())
    if arguments.model_args:
        model_args += f",{arguments.model_args}"
    command = [sys.executable, "-m", "lmms_eval", "--model", model, "--model_args", model_args]
    command += ["--tasks", benchmark.task, "--device", device, "--batch_size", str(arguments.batch_size or 1)]
    command += ["--output_path", str(out)]
    if arguments.limit:
        command += ["--limit", str(arguments.limit)]
    if arguments.num_beams > 1:
        command += ["--gen_kwargs", f"num_beams={arguments.num_beams}"]
    if arguments.include_path:
        command += ["--include_path", arguments.include_path]
    return command


def read_results(folders: list[Path]) -> dict[str, dict[str, Any]]:
    """All results that lmms-eval wrote under the folders.

    Returns:
        Model -> task (or group of tasks) -> `metrics` (numbers by `metric,filter`), `rows` asked, `all_rows` there are,
        `parts` (tasks of a group). Of several results of one model and task the newest.

    Raises:
        FileNotFoundError: a folder without results.
        ConfigError: a file that is not of lmms-eval's format.
    """
    results: dict[str, dict[str, Any]] = {}
    for folder in folders:
        for model, found in _read(folder).items():
            results.setdefault(model, {}).update(found)
    return results


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(folder.rglob("*_results.json"), key=lambda file: file.name)  # names start with date and time
    if not files:
        raise FileNotFoundError(f"{folder} holds no *_results.json of lmms-eval; give the folder of --out")
    results: dict[str, dict[str, Any]] = {}
    for file in files:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            model = content["model_name"] or content["model_source"]
            tasks = {task: _task(task, content) for task in content["results"]}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{file} is no results file of lmms-eval 0.7: {error!r}; remove it") from error
        results.setdefault(model, {}).update(tasks)
    return results


def _task(task: str, content: dict[str, Any]) -> dict[str, Any]:
    """One task's numbers, or a group's, whose rows are those of its parts."""
    metrics = {
        key: value
        for key, value in content["results"][task].items()
        if "," in key and "_stderr" not in key and isinstance(value, int | float) and not isinstance(value, bool)
    }
    parts = content.get("group_subtasks", {}).get(task, [])
    counts = [count for name in _leaves(task, content) if (count := content["n-samples"].get(name))]
    return {
        "metrics": metrics,
        "rows": sum(count["effective"] for count in counts),
        "all_rows": sum(count["original"] for count in counts),
        "parts": parts,
    }


def _leaves(task: str, content: dict[str, Any]) -> list[str]:
    parts = content.get("group_subtasks", {}).get(task, [])
    return [leaf for part in parts for leaf in _leaves(part, content)] or [task]
