"""`vlsi-fast demo`: draw data, make the student, train it in several ways, score all, print a table, write a report.

Training goes through the public entry, `deepspeed vlsi_fast/train.py --stage all --config FILE`, arm by arm.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from .. import terminal
from ..config import RunConfig, load_config
from . import inputs
from .arms import VLSI, Arm, arm_changes, arm_config, arm_file, chosen
from .inputs import KEPT_LAYERS, MAX_ANSWER, answer_pictures, draw_data, make_student
from .progress import Progress
from .training import command, rank_count, shown, train

DEFAULT_CONFIG = "configs/demo.yaml"
PREPARING, ASKING, SCORING, REPORT = (
    "Drawing pictures, making the student",
    "Asking the teacher",
    "Scoring the results",
    "Asking every layer, writing the report",
)
SECONDS = {PREPARING: 4, ASKING: 21, SCORING: 11, REPORT: 8}
"""About what the parts between the arms take on two cores."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the `demo` command."""
    parser.add_argument(
        "--config",
        default=DEFAULT_CONFIG,
        help="YAML file of the demo; the other arms' files are in the folder of its name (default: %(default)s)",
    )
    parser.add_argument("--output-dir", help="folder of the run (default: the config's, runs/demo)")
    parser.add_argument("--ranks", type=int, default=2, help="ZeRO-3 ranks on CPU; on GPUs at most their number")
    parser.add_argument("--seed", type=int, help="another seed than the config's")
    parser.add_argument("--quick", action="store_true", help="only VLsI and sft alone")
    parser.add_argument("--no-control", dest="control", action="store_false", help="without sft alone")
    parser.add_argument(
        "--all-arms",
        action="store_true",
        help="also sft alone for as many steps as VLsI, and VLsI on the teacher's answers",
    )
    parser.add_argument("--fresh", action="store_true", help="delete an earlier run of the demo in the same folder")


def main(arguments: argparse.Namespace, overrides: list[str] = ()) -> int:
    """Run the demo (it takes no overrides: its arms must fit each other). Returns the exit code."""
    overrides = {"output_dir": arguments.output_dir} if arguments.output_dir else {}
    if arguments.seed is not None:
        overrides["seed"] = arguments.seed
    arms = chosen(arguments.quick, arguments.control, arguments.all_arms)
    try:
        config = load_config(arguments.config, overrides)
        ranks = rank_count(arguments.ranks)
        arm_config(VLSI, arguments.config, config, ranks)  # its steps are others' measure
        configs = {arm: arm_config(arm, arguments.config, config, ranks) for arm in arms}
    except (ValueError, FileNotFoundError) as error:
        print(f"vlsi-fast demo: {error}\nRun it from the root of a checkout (make demo).", file=sys.stderr)
        return 2
    output = Path(config.output_dir)
    began = time.perf_counter()
    if arguments.fresh and output.exists():
        shutil.rmtree(output)
    if output.exists() and any(output.iterdir()):
        print(f"vlsi-fast demo: {output} holds an earlier run; add --fresh to replace it", file=sys.stderr)
        return 2
    parts = {PREPARING: SECONDS[PREPARING], ASKING: SECONDS[ASKING]}
    parts |= {_title(arm): arm.seconds for arm in arms} | {SCORING: SECONDS[SCORING], REPORT: SECONDS[REPORT]}
    with Progress(parts) as progress:
        progress.say(introduction(config, arms, sum(parts.values())))
        report, summary = _course(arguments, config, configs, progress)
    summary["seconds"] = time.perf_counter() - began
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    from .tables import print_tables

    print_tables(summary, output, report)
    return 0


def introduction(config: RunConfig, arms: list[Arm], seconds: float) -> str:
    """What will happen, how long it takes and where the results appear.

    Args:
        config: the demo's, as it is run.
        arms: in the order of their runs.
        seconds: about what all takes on two cores.
    """
    ways = "; ".join(arm.label.removeprefix("student after ") for arm in arms)
    return (
        f"A small vision-language model learns from a larger one to describe drawings: {inputs.LABELLED} pictures have"
        f" descriptions. It is trained in {len(arms)} ways ({ways}), and all are scored on the same unseen pictures.\n"
        f"This takes about {max(1, round(seconds / 60))} minutes on two CPU cores. Results: a table here, the page"
        f" {Path(config.output_dir) / 'report.html'}, and summary.json beside it.\n"
    )


def _title(arm: Arm) -> str:
    return f"Training: {arm.label.removeprefix('student after ')}"


def _course(
    arguments: argparse.Namespace, base: RunConfig, configs: dict[Arm, RunConfig], progress: Progress
) -> tuple[Path, dict[str, Any]]:
    """All parts in order; `base` is the demo's config as it is read. Returns the report and the summary."""
    from ..report.command import write_report
    from .tables import summarise_run

    config, output = configs[VLSI], Path(configs[VLSI].output_dir)
    with progress.part(PREPARING):
        draw_data(output / "data")
        make_student(config)
        counts = f"{inputs.LABELLED} with descriptions, {inputs.UNLABELLED} without, and those to test on"
        progress.say(f"{output / 'data'}: pictures, {counts}")
        progress.say(f"{config.student.path}: decoder layers {KEPT_LAYERS} of {config.teacher.path}")
    with progress.part(ASKING):
        more = [answer_pictures] if any(arm.answered for arm in configs) else []
        paths = {"teacher": config.teacher.path, "student_before": config.student.path}
        answers = _ask(config, paths, progress, more)
    for arm, own in configs.items():
        with progress.part(_title(arm)):
            ranks = rank_count(arguments.ranks)
            words, environment = command(ranks, arm_file(arm, arguments.config), arm_changes(arm, base, ranks))
            progress.say(shown(words))
            train(words, environment, own, output / "logs" / f"{arm.name}.log", progress.at)
    with progress.part(SCORING):
        paths = {arm.name: str(own.stage_dir(own.stages[-1]) / "student") for arm, own in configs.items()}
        answers |= _ask(config, paths, progress)
    _write_answers(answers, output / "answers.jsonl")
    summary = summarise_run(configs, answers) | {"parts_seconds": progress.seconds}
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")  # the report reads it
    with progress.part(REPORT):
        report = write_report([output], max_new_tokens=MAX_ANSWER)
    return report, summary


def _ask(config: RunConfig, paths: dict[str, Any], progress: Progress, more: list = ()) -> dict[str, list]:
    """Answers of several checkpoints to `data.eval`, two processes at a time; `more` are calls with the config."""
    options = {"mp_context": get_context("spawn"), "initializer": _begin, "initargs": (terminal.is_hushed(),)}
    with ProcessPoolExecutor(2, **options) as pool:
        others = [pool.submit(call, config) for call in more]
        jobs = {name: pool.submit(_answers, str(path), config) for name, path in paths.items()}
        for number, job in enumerate([*jobs.values(), *others], 1):
            job.result()
            progress.at(number / (len(jobs) + len(others)))
        return {name: job.result() for name, job in jobs.items()}


def _begin(hushed: bool) -> None:
    """In a process of the pool, before anything heavy is imported: half of the cores, as quiet as the demo itself."""
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 2) // 2))
    if hushed:
        terminal.hush()


def _answers(path: str, config: RunConfig) -> list:
    from ..evaluation.answers import answer_rows

    skipped: Counter = Counter()
    return list(answer_rows(path, config.data, skipped=skipped, max_new_tokens=MAX_ANSWER, dtype=config.dtype))


def _write_answers(answers: dict[str, list], file: Path) -> None:
    from ..evaluation.command import answer_line

    lines = [answer_line(name, answer) for name, rows in answers.items() for answer in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
