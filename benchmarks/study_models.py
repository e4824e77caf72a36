"""The studies' data, teachers and students; `study.py --prepare` makes them.

Teachers are trained by the demo's recipe (`vlsi_fast.demo.models`); the one of 8 layers and width 96 is the demo's own,
as shipped. A student is a teacher with layers left out (`vlsi-fast shrink`), nothing else: so every label that it ever
saw is one that a study gave it.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizer_baselines import WholeAnswers

from vlsi_fast.data.answering import answer
from vlsi_fast.data.dataset import VlsiDataset
from vlsi_fast.demo import models, pictures
from vlsi_fast.hidden_states import VerbalizedBackbone
from vlsi_fast.shrinking import shrink

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "study.yaml"
SMALL = {"hidden_size": 64, "layers": 8, "intermediate_size": 160, "heads": 4, "kv_heads": 2}
TEACHERS = {
    "teacher": models.TEACHER,
    "teacher_small": SMALL,
    "teacher_12": models.TEACHER | {"layers": 12},
    "teacher_16": models.TEACHER | {"layers": 16},
    "teacher_same": models.TEACHER,
    "teacher_other": models.TEACHER,
}
SEEDS = {"teacher": 0, "teacher_12": 1, "teacher_16": 2, "teacher_small": 3, "teacher_same": 4, "teacher_other": 4}
"""Of a teacher's random weights."""
MERGES = {"teacher_other": 80}
"""Merges of a teacher's tokenizer, where they are not the demo's 160: an answer is 61 tokens long instead of 34."""
STUDENTS = {
    "student": ("teacher", [1, 3, 6, 8]),
    "student_3": ("teacher", [1, 5, 8]),
    "student_2": ("teacher", [1, 8]),
    "student_small": ("teacher_small", [1, 3, 6, 8]),
    "student_6_of_12": ("teacher_12", [1, 3, 5, 8, 10, 12]),
    "student_8_of_16": ("teacher_16", [1, 3, 5, 7, 10, 12, 14, 16]),
}
"""Name -> the teacher that it is made from, and the layers kept (1: the first)."""
LABELS = (30, 100, 300, 1000)
UNLABELLED = 1500
WRONG = (10, 30, 50)
"""Percent of wrong answers."""


def targets(name: str) -> list[int]:
    """Target layers: all but the last, which has its own loss."""
    depth = TEACHERS[name]["layers"] if name in TEACHERS else len(STUDENTS[name][1])
    return list(range(1, depth))


def rows_of(path: Path) -> dict:
    """A source of reader `messages`."""
    return {"reader": "messages", "path": str(path), "name": path.name, "image_root": str(path.parent)}


def keep_rows() -> None:
    """Encoded rows stay in memory, for this process and those forked from it: encoding takes longer than learning.

    Models of one tokenizer have one processor, and share their rows. The rows of one picture share one tensor.
    """
    rows, seen = {}, {}

    def keep(dataset: type[VlsiDataset]) -> None:
        encode = dataset._encode

        def kept(self, sample):
            alike = len(self.processors) == 1 or self.shared
            sizes = [len(each.tokenizer) for each in self.processors.values()][: 1 if alike else 2]
            images = tuple(map(str, sample.images))
            key = (json.dumps(sample.messages, sort_keys=True), images, *sizes, None if alike else dataset)
            if key not in rows:
                rows[key] = dict(encode(self, sample))
                for role in self.processors:
                    row = rows[key][role]
                    row["pixel_values"] = seen.setdefault(images, row["pixel_values"])
                if alike:
                    rows[key] = row
            if alike:
                return {role: dict(rows[key]) for role in self.processors}
            return rows[key] | {role: dict(rows[key][role]) for role in self.processors}

        dataset._encode = kept

    for dataset in (VlsiDataset, WholeAnswers):
        keep(dataset)


def keep_states() -> None:
    """What a frozen backbone says of a row is computed once a job: a job sees its 300 rows up to sixteen times.

    A row's states are those of the first batch that held it, so later ones differ by rounding. A job's operations are
    those of its first step, which computes everything; its seconds are fewer than they would be without this. Decoder
    verbalizers read whole sequences, of which nothing is kept.
    """
    compute = VerbalizedBackbone.states

    def states(self, inputs, index, everywhere):
        if self.train_backbone or everywhere or "packed" in inputs:
            return compute(self, inputs, index, everywhere)
        known = self.__dict__.setdefault("_known_states", {})
        keys = list(_keys(inputs))
        if not all(key in known for key in keys):
            hidden, attention, last = compute(self, inputs, index, everywhere)
            counts = torch.bincount(index // inputs["input_ids"].shape[1], minlength=len(keys)).tolist()
            parts = zip(*(state.split(counts) for state in (*hidden, *([] if last is None else [last]))))
            known.update((key, [state.clone() for state in row]) for key, row in zip(keys, parts))
            return hidden, attention, last
        found = [torch.cat(rows) for rows in zip(*(known[key] for key in keys))]
        last = found.pop() if self.needs_last and not self.last_translated else None
        return found, [], last

    VerbalizedBackbone.states = states


def _keys(inputs: dict) -> Iterator[tuple[bytes, bytes]]:
    """Of each row of a padded batch: its tokens, and a digest of its one picture."""
    sizes = [t * h * w for t, h, w in torch.as_tensor(inputs["image_grid_thw"]).tolist()]
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    if len(sizes) != len(ids):
        raise ValueError(f"{len(sizes)} pictures in {len(ids)} rows: the studies' rows have one each")
    pictures = torch.as_tensor(inputs["pixel_values"]).split(sizes)
    for row, picture, real in zip(ids, pictures, mask):
        yield row[real].numpy().tobytes(), hashlib.blake2b(picture.numpy().tobytes()).digest()


def prepare(work: Path, roles: list[str], splits: dict = pictures.SPLITS, changes: dict | None = None) -> None:
    """Make data and the named models under `work`; what is finished is left as it is, what was stopped goes on.

    Args:
        work: the study's folder.
        roles: names in `TEACHERS` and `STUDENTS`.
        splits: as `pictures.write` takes them.
        changes: overrides of the teachers' recipe.
    """
    data = work / "data"
    if not (data / "finished").exists():
        shutil.rmtree(data, ignore_errors=True)
        pictures.write(data, splits)
        write_conditions(data)
        (data / "finished").write_text(json.dumps(splits))
    for role in sorted(roles, key=lambda role: role in STUDENTS):
        folder = work / "models" / role
        if not (folder / "config.json").exists():
            _make(work, role, folder, changes or {})
    answered = data / "answered.jsonl"
    if not answered.exists():
        write_answered(work, answered)


def _make(work: Path, role: str, folder: Path, changes: dict) -> None:
    if role in STUDENTS:
        teacher, kept = STUDENTS[role]
        shrink(work / "models" / teacher, folder, keep_layers=kept)
        return
    source = models.MODELS / "teacher"
    if role != "teacher":
        options = {"overrides": changes, "merges": MERGES.get(role, models.MERGES)}
        source = models.train_teacher(work / "making" / role, work / "data", TEACHERS[role], SEEDS[role], **options)
    partial = folder.with_name(f"{role}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    partial.rename(folder)


def write_conditions(data: Path) -> None:
    """What the curves train on: few labels, few wordings, wrong answers. A small set is part of every larger one."""
    for kind in ("", "_plain", "_two"):
        lines = (data / f"train{kind}.jsonl").read_text().splitlines(keepends=True)
        for count in LABELS:
            (data / f"labels_{count}{kind}.jsonl").write_text("".join(lines[:count]))
    rows = [json.loads(line) for line in (data / "labels_300.jsonl").read_text().splitlines()]
    order = random.Random("which are wrong").sample(range(len(rows)), len(rows))
    for percent in WRONG:
        wrong = order[: len(rows) * percent // 100]
        said = {i: rows[i]["messages"][1]["content"] for i in wrong}
        changed = json.loads(json.dumps(rows))
        for i, other in zip(wrong, wrong[1:] + wrong[:1]):  # another picture's answer
            changed[i]["messages"][1]["content"] = said[other]
        text = "".join(json.dumps(row) + "\n" for row in changed)
        (data / f"labels_300_wrong{percent}.jsonl").write_text(text)


def write_answered(work: Path, target: Path) -> None:
    """The teacher's own sampled answers on pictures that no label names: of `train`, the last `UNLABELLED`."""
    lines = (work / "data" / "train.jsonl").read_text().splitlines(keepends=True)[-UNLABELLED:]
    asked = target.with_name("unlabelled.jsonl")
    asked.write_text("".join(lines))
    options = {"temperature": 1.0, "max_new_tokens": 96, "batch_size": 256, "seed": 0}
    answer(None, asked, None, target, model=work / "models" / "teacher", **options)
