"""A study's work as jobs that depend on each other: stages, and scores of what they made.

Rows of a table that agree in a stage share its job. A job's folder is named after all that its result depends on, and
`job.json` appears in it, whole, when the job is done: a job that was killed starts again, one that is done is not
repeated. Each job runs in a process of its own, forked from one that has imported everything and encoded the rows.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from seeds import machine
from study_models import CONFIG, rows_of, targets
from study_rows import FULL, Row, Setting, training
from tokenizer_baselines import BaselineStage

from vlsi_fast import load_config, run
from vlsi_fast.data.dataset import ROLES
from vlsi_fast.demo.pictures import exact_facts, facts_f1
from vlsi_fast.evaluation.answers import answer_rows
from vlsi_fast.lineage import weights_digest

MAX_ANSWER = 96
"""Tokens after which an answer is cut; the longest right one has fewer."""
MAX_ANSWERS = {"teacher_other": 128}
"""The same, of a base model whose tokens are shorter."""
FIT_STEPS = 20
"""Steps over which `Study.fit` takes a mean."""
KEPT = ("stage", "steps", "flops", "exact", "f1", "rows", "cpu_seconds", "processor")
"""Of a job's result, in the file of records."""


@dataclass(frozen=True)
class Job:
    """`stage` is one of the three, or "score"."""

    stage: str
    settings: str
    """JSON: seed, models, data and overrides of a stage; checkpoint, split and beams of a score."""
    parents: tuple[Job, ...] = ()

    @cached_property
    def key(self) -> str:
        """Names the job's folder."""
        text = json.dumps([self.stage, self.settings, [parent.key for parent in self.parents]])
        return f"{self.stage}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def chain(self) -> list[Job]:
        """Everything that it rests on, first things first, and itself."""
        found: dict[str, Job] = {}
        for parent in self.parents:
            found |= {job.key: job for job in parent.chain()}
        return [*found.values(), self]


class Study:
    """Where the work is, and what all of its jobs have in common."""

    def __init__(self, work: Path, overrides: dict[str, Any] | None = None, records: Path | None = None):
        """
        Args:
            work: the study's folder.
            overrides: of the config, for every job.
            records: file of results of jobs that were done elsewhere, perhaps (`record` writes it).
        """
        self.work, self.overrides, self.records = work, overrides or {}, records
        self.config = load_config(CONFIG, self.overrides)
        self._digests: dict[str, str] = {}
        lines = records.read_text().splitlines() if records and records.is_file() else []
        self._recorded = {result.pop("key"): result for result in map(json.loads, lines)}

    def made(self, job: Job) -> bool:
        """Whether the job is done here, with what it made."""
        return (self.work / "jobs" / job.key / "job.json").is_file()

    def result(self, job: Job) -> dict[str, Any] | None:
        """What a finished job found, here or as recorded, or None."""
        if self.made(job):
            return json.loads((self.work / "jobs" / job.key / "job.json").read_text())
        return self._recorded.get(job.key)

    def fit(self, job: Job) -> dict[str, float] | None:
        """How well interact, the last stage under a score, learnt its rows: the loss of the last layer (of KL:
        nats a token), mean of 20 steps half way and of the last 20. None: no such stage, or nothing known of it."""
        stages = [each for each in job.chain() if each.stage != "score"]
        if not stages or stages[-1].stage != "interact":
            return None
        return self._fit(stages[-1].key) or self._recorded.get(stages[-1].key, {}).get("fit")

    def _fit(self, key: str) -> dict[str, float] | None:
        file = self.work / "jobs" / key / "interact" / "metrics.jsonl"
        steps = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        losses = [step["loss/last"] for step in steps if "loss/last" in step]
        if len(losses) < 2 * FIT_STEPS:
            return None
        half = len(losses) // 2 - FIT_STEPS // 2
        return {"half": statistics.fmean(losses[half:][:FIT_STEPS]), "end": statistics.fmean(losses[-FIT_STEPS:])}

    def todo(self, job: Job, *, needed: bool = False) -> list[Job]:
        """What is to be run, first things first, so that all results of its chain are known.

        Args:
            job: a score, or a stage.
            needed: so that what it makes is here, too.
        """
        done = self.made(job) if needed else self.result(job) is not None
        rest = [each for parent in job.parents for each in self.todo(parent, needed=not done)]
        return rest if done else [*rest, job]

    def record(self) -> None:
        """Write the results of all jobs done here and recorded before, a line each; what jobs made stays here."""
        for file in (self.work / "jobs").glob("*/job.json"):
            result = json.loads(file.read_text())
            key = file.parent.name
            self._recorded[key] = {name: result[name] for name in KEPT if name in result}
            if fit := self._fit(key):
                self._recorded[key]["fit"] = fit
        lines = [json.dumps({"key": key} | self._recorded[key]) + "\n" for key in sorted(self._recorded)]
        self.records.write_text("".join(lines))

    def job(self, row: Row, setting: Setting, seed: int, split: str, after: Setting | None = None) -> Job:
        """The score of a row on a split; its chain holds the stages.

        Args:
            row: what to train.
            setting: its learning rate and steps ({} for a base model).
            seed: of data order, verbalizers and matching.
            split: what is scored.
            after: setting of `row.after`.
        """
        scored = {"beams": row.beams, "checkpoint": row.scored, "weights": self._digest(row.scored), "split": split}
        last = self._stages(row, setting, seed, after) if row.arm else ()
        return Job("score", json.dumps(scored, sort_keys=True), last)

    def _stages(self, row: Row, setting: Setting, seed: int, after: Setting | None) -> tuple[Job, ...]:
        shared = {"seed": seed, "teacher": row.teacher, "student": row.student, "data": row.data}
        shared |= {"layers": {"teacher": targets(row.teacher), "student": targets(row.student)}}
        shared |= {"config": hashlib.sha256(CONFIG.read_bytes()).hexdigest(), "overrides": self.overrides}
        shared |= {"weights": self._digest(row.teacher) + self._digest(row.student)}
        shared |= {"baseline": row.baseline} if row.baseline else {}  # keys of older jobs stay what they are

        def stage(name: str, changes: dict[str, Any], last: tuple[Job, ...] = ()) -> tuple[Job, ...]:
            return (Job(name, json.dumps(shared | {"changes": changes}, sort_keys=True), last),)

        rate, steps = setting["rate"], int(setting["steps"])
        if row.arm == "sft":
            before = self._stages(row.after, after, seed, None) if row.after else ()
            start = {} if row.after else {"sft.start_from": "base"}
            return stage("sft", training("sft", rate, steps) | start | row.changes, before)
        few = {"verbalize.training.max_steps": max(1, steps // 4)}
        if row.arm == "last":
            alone, verbalized, rest = {"interact.intermediate": "none"}, (), training("interact", rate, steps)
            if row.translates:  # the last layer's verbalizer, and for the stage's sake one target layer's
                alone |= row.verbalizer
                alone |= {f"{role}.layers": targets(getattr(row, role))[-1:] for role in ROLES}
                verbalized = stage("verbalize", few | alone | {"verbalize.models": ["teacher"]} | row.verbalize)
                rest = training("interact", rate, steps - steps // 4)
            return stage("interact", rest | alone | row.changes, verbalized)
        verbalized = ()
        if row.speaks:
            verbalized = stage("verbalize", few | row.verbalizer | row.verbalize)
        rest = training("interact", rate, steps - steps // 4)
        return stage("interact", rest | row.verbalizer | row.changes, verbalized)

    def operations_steps(self, vlsi: Job, sft: Job) -> int:
        """Steps of sft that cost what a finished row of `FULL` steps of VLsI cost (FLOPs of products), in tens."""
        spent = sum(result.get("flops", 0) for result in map(self.result, vlsi.chain()))
        (one,) = (self.result(job) for job in sft.chain() if job.stage == "sft")
        return max(FULL, round(spent / (one["flops"] / one["steps"]) / 10) * 10)

    def _digest(self, model: str | None) -> str:
        if model is not None and model not in self._digests:
            self._digests[model] = weights_digest(self.work / "models" / model)
        return self._digests.get(model, "")

    # ---- in a process of its own ----

    def execute(self, job: Job) -> None:
        """Do the job and write `job.json`."""
        folder = self.work / "jobs" / job.key
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        settings = json.loads(job.settings)
        wall, cpu = time.perf_counter(), time.process_time()
        result = self._score(job, settings) if job.stage == "score" else self._stage(job, settings, folder)
        result |= {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        result |= {"processor": machine()["processor"]}  # results may come from several machines
        partial = folder / "job.json.partial"
        partial.write_text(json.dumps({"stage": job.stage, "settings": settings} | result, indent=1) + "\n")
        partial.rename(folder / "job.json")

    def _stage(self, job: Job, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
        models = self.work / "models"
        sources = [rows_of(self.work / "data" / name) for name in settings["data"]]
        changes = {f"{role}.layers": layers for role, layers in settings["layers"].items()}
        changes |= self.overrides | settings["changes"] | {"output_dir": str(folder), "seed": settings["seed"]}
        changes |= {f"{role}.path": str(models / settings[role]) for role in ("teacher", "student")}
        changes["data.train"] = sources
        for parent in job.parents:
            made = (self.work / "jobs" / parent.key).resolve()
            if job.stage == "interact":
                speakers = json.loads(parent.settings)["changes"].get("verbalize.models", ROLES)
                changes |= {f"{role}.verbalizers": str(made / "verbalize" / role) for role in speakers}
            elif job.stage == "sft":
                (folder / "interact").symlink_to(made / "interact")
        operations: list[int] = []
        with _counting(operations):
            config = load_config(CONFIG, changes)
            if settings.get("baseline"):
                record = BaselineStage(config, settings["baseline"]).run()
            else:
                record = run(config, job.stage)[job.stage]
        steps = record["summary"]["optimizer_steps"]
        return {"steps": steps, "flops": operations[0] * steps}

    def _score(self, job: Job, settings: dict[str, Any]) -> dict[str, Any]:
        if settings["checkpoint"]:
            checkpoint = self.work / "models" / settings["checkpoint"]
        else:
            parent = job.parents[0]
            checkpoint = self.work / "jobs" / parent.key / parent.stage / "student"
        source = rows_of(self.work / "data" / f"{settings['split']}.jsonl")
        data, skipped = load_config(CONFIG, {"data.eval": [source]}).data, Counter()
        options = {
            "num_beams": settings["beams"],
            "max_new_tokens": MAX_ANSWERS.get(settings["checkpoint"], MAX_ANSWER),
        }
        exact, f1 = 0.0, []
        for each in answer_rows(checkpoint, data, skipped=skipped, **options):
            exact += exact_facts(each.prediction, each.answer)
            f1.append(facts_f1(each.prediction, each.answer))
        if skipped:
            raise RuntimeError(f"rows of {settings['split']} cannot be used: {dict(skipped)}; make the data again")
        return {"exact": exact / len(f1), "f1": sum(f1) / len(f1), "rows": len(f1)}


class _counting:
    """Appends the floating-point operations of the first training step: products, as torch's counter sees them."""

    def __init__(self, operations: list[int]):
        self.operations = operations

    def __enter__(self):
        from torch.utils.flop_counter import FlopCounterMode

        from vlsi_fast.stages.trainer import StageTrainer

        self.trainer, self.step = StageTrainer, StageTrainer.training_step
        step, operations = self.step, self.operations

        def counted(trainer, *args, **kwargs):
            if operations:
                return step(trainer, *args, **kwargs)
            with FlopCounterMode(display=False) as counter:
                loss = step(trainer, *args, **kwargs)
            operations.append(counter.get_total_flops())
            return loss

        StageTrainer.training_step = counted

    def __exit__(self, *error):
        self.trainer.training_step = self.step


# ---- all of them ----


def run_jobs(
    study: Study, wanted: list[Job], workers: int, tell: Callable[[str], None], deadline: float = 0
) -> list[Job]:
    """Run what is wanted and not yet done, `workers` at a time, in the order given.

    Args:
        deadline: `time.time()` after which none is started; 0: no such time.

    Returns:
        The jobs that failed. Those that rest on them are left out.
    """
    context = multiprocessing.get_context("fork")
    todo = list({job.key: job for each in wanted for job in study.todo(each)}.values())
    total, done, running, failed = len(todo), 0, {}, []
    while todo or running:
        for job in list(todo):
            if len(running) >= workers or (deadline and time.time() > deadline):
                break
            if any(parent in failed for parent in job.parents):
                failed.append(job)
                todo.remove(job)
            elif all(study.made(parent) for parent in job.parents):
                process = context.Process(target=_child, args=(study, job))
                process.start()
                running[process] = (job, time.perf_counter())
                todo.remove(job)
        if not running:
            break
        multiprocessing.connection.wait([process.sentinel for process in running])
        for process in [process for process in running if not process.is_alive()]:
            job, began = running.pop(process)
            process.join()
            done += 1
            if not study.made(job):
                failed.append(job)
                tell(f"{job.key} failed (see {study.work / 'jobs' / (job.key + '.log')})")
            else:
                tell(f"[{done}/{total}] {job.key} {time.perf_counter() - began:.0f} s")
    return failed


def _child(study: Study, job: Job) -> None:
    """A job's process: one thread, output into a log beside its folder."""
    import torch

    torch.set_num_threads(1)
    log = study.work / "jobs" / f"{job.key}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    stream = log.open("w", buffering=1)
    for descriptor in (1, 2):
        os.dup2(stream.fileno(), descriptor)
    sys.stdout = sys.stderr = stream
    try:
        study.execute(job)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # nothing of the parent's is to be cleaned up twice
