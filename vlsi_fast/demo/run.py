"""`vlsi-fast demo`: score the models, run the three stages and the control, score again, print a table, write a report.

Everything goes through the public entry: `deepspeed vlsi_fast/train.py --stage all --config configs/demo.yaml`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ..config import RunConfig, load_config
from ..report.command import write_report
from ..runs import open_run

DEFAULT_CONFIG = "configs/demo.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the `demo` command."""
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="YAML file of the demo (default: %(default)s)")
    parser.add_argument("--output-dir", help="folder of the run (default: the config's, runs/demo)")
    parser.add_argument("--output_dir", default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # its older spelling
    parser.add_argument("--ranks", type=int, default=2, help="ZeRO-3 ranks on CPU; on GPUs at most their number")
    parser.add_argument("--seed", type=int, help="another seed than the config's")
    parser.add_argument("--no-control", dest="control", action="store_false", help="skip the sft-only control")
    parser.add_argument("--fresh", action="store_true", help="delete an earlier run of the demo in the same folder")


def main(arguments: argparse.Namespace, overrides: list[str] = ()) -> int:
    """Run the demo (it takes no overrides: its control must fit it). Returns the exit code."""
    overrides = {}
    if arguments.output_dir:
        overrides["output_dir"] = arguments.output_dir
    if arguments.seed is not None:
        overrides["seed"] = arguments.seed
    try:
        config = load_config(arguments.config, overrides)
    except (ValueError, FileNotFoundError) as error:
        print(f"vlsi-fast demo: {error}\nRun it from the root of a checkout (make demo).", file=sys.stderr)
        return 2
    if config.stages == ["verbalize"]:
        print("vlsi-fast demo: its `stages` make no student; add interact, sft or both", file=sys.stderr)
        return 2
    output = Path(config.output_dir)
    if arguments.fresh and output.exists():
        shutil.rmtree(output)
    if output.exists() and any(output.iterdir()):
        print(f"vlsi-fast demo: {output} holds an earlier run; add --fresh to replace it", file=sys.stderr)
        return 2
    overrides = [f"--{name}={value}" for name, value in overrides.items()]
    began = time.perf_counter()

    _say("Scoring teacher and student as they are")
    scores = _score(config, {"teacher": config.teacher.path, "student_before": config.student.path})
    _say(f"VLsI: {', '.join(config.stages)}")
    _launch(arguments, ["--stage", "all", "--config", arguments.config, *overrides])
    stages = {stage: _summary(output / stage) for stage in config.stages}
    finals = {"student_after": open_run(output).student}
    if arguments.control:
        _say("Control: the same student, data order and number of optimizer steps, sft alone")
        steps = sum(stage["optimizer_steps"] for stage in stages.values())
        control = output / "control"
        changes = {"output_dir": control, "seed": config.seed, "sft.start_from": "base"}
        changes["sft.training.max_steps"] = steps
        words = [f"--{name}={value}" for name, value in changes.items()]
        _launch(arguments, ["--stage", "sft", "--config", arguments.config, *words])
        finals["sft_only"] = control / "sft" / "student"
    _say("Scoring the results")
    scores |= _score(config, finals)
    summary = _collect(config, scores, stages, output) | {"seconds": time.perf_counter() - began}
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    _say("Asking every layer, writing the report")
    report = write_report([output])
    _print_table(summary, output, report)
    return 0


def _say(text: str) -> None:
    from rich.console import Console

    Console().print(f"\n[bold]{text}[/bold]")


def _score(config: RunConfig, checkpoints: dict[str, Any]) -> dict[str, dict]:
    """Exact match of several checkpoints on `data.eval`, two at a time."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=_use_half_the_cores) as pool:
        jobs = {name: pool.submit(_exact_match, str(path), config, name) for name, path in checkpoints.items()}
        return {name: job.result() for name, job in jobs.items()}


def _use_half_the_cores() -> None:
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 2) // 2))


def _exact_match(path: str, config: RunConfig, name: str) -> dict:
    from ..scoring import exact_match

    return exact_match(path, config.data, dtype=config.dtype, description=f"{name:>15}")


def _launch(arguments: argparse.Namespace, words: list[str]) -> None:
    """Start train.py under DeepSpeed's launcher, on the GPUs or else on CPU ranks."""
    import torch

    environment = os.environ | {"PYTHONWARNINGS": "ignore::FutureWarning,ignore::UserWarning"}
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks = min(arguments.ranks, gpus) if gpus else arguments.ranks
    if not gpus:
        environment["DS_ACCELERATOR"] = "cpu"
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    script = Path(__file__).resolve().parent.parent / "train.py"
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [str(launcher), "--num_accelerators" if not gpus else "--num_gpus", str(ranks), str(script), *words]
    print("$ " + " ".join(["deepspeed", *command[1:]]), flush=True)
    if not launcher.is_file():
        raise SystemExit("vlsi-fast demo: no deepspeed beside this Python; run `make demo`, or pip install deepspeed")
    if subprocess.run(command, env=environment).returncode:
        raise SystemExit("vlsi-fast demo: training stopped with the error above")


def _summary(folder: Path) -> dict[str, Any]:
    summary = json.loads((folder / "vlsi_stage.json").read_text())["summary"]
    return {name: summary[name] for name in ("seconds", "optimizer_steps", "answer_tokens", "skipped_rows")}


def _peak_rss(folder: Path) -> int:
    """Largest sum over ranks of resident memory in any stage, bytes."""
    records = (json.loads(line) for file in folder.glob("**/metrics.jsonl") for line in file.read_text().splitlines())
    return max((sum(record["peak_rss_bytes"]) for record in records), default=0)


def _collect(config: RunConfig, scores: dict[str, dict], stages: dict[str, dict], output: Path) -> dict[str, Any]:
    from ..lineage import versions

    accuracy = {f"{name}_accuracy": score["accuracy"] for name, score in scores.items()}
    if "sft_only_accuracy" not in accuracy:
        accuracy["sft_only_accuracy"] = None
    return accuracy | {
        "questions": scores["teacher"]["rows"],
        "stages": stages,
        "stages_seconds": sum(stage["seconds"] for stage in stages.values()),
        "peak_rss_bytes": _peak_rss(output),
        "seed": config.seed,
        "versions": versions(),
    }


def _print_table(summary: dict[str, Any], output: Path, report: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table("model", "exact match", title=f"easy-VQA test split, {summary['questions']} questions")
    rows = {
        "teacher": "teacher_accuracy",
        "student before": "student_before_accuracy",
        "student after VLsI": "student_after_accuracy",
        "student after sft alone (control)": "sft_only_accuracy",
    }
    for label, key in rows.items():
        value = summary[key]
        table.add_row(label, "skipped" if value is None else f"{100 * value:.2f}%")
    console.print(table)
    table = Table("stage", "optimizer steps", "answer tokens", "seconds")
    for name, stage in summary["stages"].items():
        table.add_row(name, str(stage["optimizer_steps"]), str(stage["answer_tokens"]), f"{stage['seconds']:.0f}")
    console.print(table)
    console.print(
        f"peak memory of training {summary['peak_rss_bytes'] / 2**30:.2f} GiB, all in all {summary['seconds']:.0f} s\n"
        f"distilled student: {open_run(output).student}\nsummary: {output / 'summary.json'}\n"
        f"report, with what each layer says: {report}\n"
        f"ask its layers yourself: vlsi-fast verbalize --run {output} --image FILE --question '..'"
    )
