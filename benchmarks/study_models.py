"""The studies' teachers and students, made by this project's own sft stage; `study.py --prepare` calls this.

Sizes are a small fraction of the demo's. A teacher learns from the large split: descriptions first (all of a picture in
one answer), then mostly short answers, which the long ones would outweigh. A student gets the teacher's vision blocks
(as the sizes of Qwen2-VL share one) and learns from `STUDENT_ROWS` rows of the same split: it can read the questions,
and is wrong on many of them. What studies train on, `train`, is new to both.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import puzzles

from vlsi_fast import load_config, run
from vlsi_fast.data.dataset import VlsiDataset
from vlsi_fast.demo.models import make_model, make_processor, make_tokenizer, share_vision
from vlsi_fast.loading import load_backbone

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "study.yaml"
SIZES = {
    "teacher": {"hidden_size": 96, "layers": 8, "intermediate_size": 256, "heads": 4, "kv_heads": 2},
    "teacher_small": {"hidden_size": 64, "layers": 8, "intermediate_size": 160, "heads": 4, "kv_heads": 2},
    "student": {"hidden_size": 64, "layers": 4, "intermediate_size": 128, "heads": 4, "kv_heads": 2},
    "student_small": {"hidden_size": 48, "layers": 4, "intermediate_size": 96, "heads": 3, "kv_heads": 1},
    "student_deep": {"hidden_size": 48, "layers": 8, "intermediate_size": 96, "heads": 3, "kv_heads": 1},
}
TARGETS = {
    "teacher": [1, 2, 3, 4, 5, 6, 7], "teacher_small": [1, 2, 3, 4, 5, 6, 7],
    "student": [1, 2, 3], "student_small": [1, 2, 3], "student_deep": [2, 4, 6],
}  # fmt: skip
"""Target layers."""
SEEDS = {"student": 0, "student_small": 1, "teacher": 2, "teacher_small": 3, "student_deep": 4}
STUDENT_ROWS = 6000
COMMON = {
    "training.per_device_train_batch_size": 64,
    "training.learning_rate": 3e-3,
    "training.min_learning_rate": 1e-4,
    "training.warmup_steps": 30,
    "training.save_steps": 50,
    "sft.start_from": "base",
    "sft.training": {},
    "sft.train_vision": True,
}
STEPS = {"captions": 300, "questions": 2200, "student": 300}


def keep_rows() -> None:
    """Encoded rows stay in memory, for this process and those forked from it: encoding takes longer than learning.

    All models of a study have the same processor. The rows of one picture share one tensor.
    """
    encode, rows, pictures = VlsiDataset._encode, {}, {}

    def kept(self, sample):
        key = (self.sources.parts[0].image_root, sample.id)
        if key not in rows:
            row = next(iter(encode(self, sample).values()))
            picture = (self.sources.parts[0].image_root, *map(str, sample.images))
            row["pixel_values"] = pictures.setdefault(picture, row["pixel_values"])
            rows[key] = row
        return {role: dict(rows[key]) for role in self.processors}

    VlsiDataset._encode = kept


def rows_of(path: Path) -> dict:
    """A source of reader `messages`."""
    return {"reader": "messages", "path": str(path), "name": path.name, "image_root": str(path.parent)}


def prepare(work: Path, roles: list[str], steps: dict[str, int] = STEPS, splits: dict = puzzles.SPLITS) -> None:
    """Make data and the named models under `work`; what is finished is left as it is, what was stopped goes on."""
    data = work / "data"
    if not (data / "finished").exists():
        shutil.rmtree(data, ignore_errors=True)
        counts = puzzles.write(data, seed=0, splits=splits)
        rows: dict[str, list[str]] = {"describe": [], "sequence": [], "short": []}
        for line in (data / "teacher_train.jsonl").read_text().splitlines(keepends=True):
            rows.get(json.loads(line)["type"], rows["short"]).append(line)
        for name, lines in rows.items():
            (data / f"teacher_train_{name}.jsonl").write_text("".join(lines))
        (data / "finished").write_text(json.dumps(counts))
    processor = make_processor(make_tokenizer(puzzles.texts(data)))
    for role in roles:
        if not (work / "models" / role / "config.json").exists():
            _make(work, role, processor, steps)


def _make(work: Path, role: str, processor, steps: dict[str, int]) -> None:
    data, start = work / "data", work / "making" / role / "start"
    model = make_model(SIZES[role], processor.tokenizer, seed=SEEDS[role])
    described, sequences, short, everything = (
        rows_of(data / f"teacher_train{name}.jsonl") for name in ("_describe", "_sequence", "_short", "")
    )
    mixed = [described | {"weight": 0.1}, sequences | {"weight": 0.2}, short | {"weight": 0.7}]
    phases = {"captions": [described], "questions": mixed}
    if role.startswith("student"):
        share_vision(model, load_backbone(work / "models" / "teacher", "float32"))
        rows = min(STUDENT_ROWS, len(Path(everything["path"]).read_text().splitlines()))
        phases = {"student": [everything | {"path": f"{everything['path']}#{rows}"}]}
    if not (start / "config.json").exists():
        model.save_pretrained(start)
        processor.save_pretrained(start)
    for name, sources in phases.items():
        output = work / "making" / role / name
        changes = {"output_dir": str(output), "student.path": str(start), "teacher.path": str(start)}
        changes |= {"student.layers": TARGETS[role], "teacher.layers": TARGETS[role]}
        changes |= {"data.train": sources, "training.max_steps": steps[name]}
        run(load_config(CONFIG, COMMON | changes), "sft", resume=True)
        start = output / "sft" / "student"
    partial = work / "models" / f"{role}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(start, partial)
    partial.rename(work / "models" / role)
