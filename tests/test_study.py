"""The studies: the task's rows against what is drawn, statistics against known values, jobs that resume."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import puzzles  # noqa: E402
import seeds  # noqa: E402
import study  # noqa: E402
import study_jobs  # noqa: E402
import study_models  # noqa: E402
import study_rows  # noqa: E402

from vlsi_fast.data.dataset import VlsiDataset  # noqa: E402
from vlsi_fast.paper import load_table  # noqa: E402

SPLITS = {
    "teacher_train": (30, 20, 4), "train": (12, 12, 3), "validation": (6, 6, 2), "test": (6, 6, 2),
    "test_held_out": (8, 8, 0),
}  # fmt: skip


# ---- the task ----


def seen(image: Image.Image, cell: int) -> tuple[str, str, bool] | str | None:
    """Colour, shape and dot of a cell, from its pixels alone; None where it is empty, "?" for a question mark."""
    x, y = 32 * (cell % 2), 32 * (cell // 2)
    pixels = np.asarray(image.convert("RGB"))[y : y + 32, x : x + 32].astype(int)
    ink = (pixels < 250).any(2)
    if not ink.any():
        return None
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    top, bottom, left, right = rows[0], rows[-1], columns[0], columns[-1]
    if right - left < 16:
        return "?"
    box = ink[top : bottom + 1, left : right + 1]
    color = min(puzzles.COLORS, key=lambda name: abs(pixels[ink] - puzzles.COLORS[name]).sum())
    height, width = box.shape
    corners = [bool(box[r, c]) for r in (0, -1) for c in (0, -1)]
    middle = box[height // 2 - 1 : height // 2 + 2, width // 2 - 1 : width // 2 + 2]
    fill = box.mean() + (25 / box.size if not middle.any() else 0)
    if all(corners):
        shape = "square"
    elif corners[2] and corners[3]:
        shape = "triangle"
    elif fill > 0.7:
        shape = "circle"
    else:  # a cross is the same upside down
        shape = "cross" if (box == box[::-1]).mean() > 0.97 else "star"
    center = pixels[box.shape[0] // 2 + top, box.shape[1] // 2 + left] if shape != "triangle" else None
    if shape in ("triangle", "star"):  # their box is not centred on the dot
        inside = pixels[top + 6 : bottom - 4, left + 8 : right - 7]
        holes = (inside >= 250).all(2)
        dot = any(holes[i : i + 5, j : j + 5].all() for i in range(len(holes) - 4) for j in range(holes.shape[1] - 4))
    else:
        dot = bool((center >= 250).all())
    return color, shape, dot


def answer(cells, question: str) -> str:
    """The answer worked out from cells (colour, shape, dot), by other code than the generator's."""
    name = lambda c: f"{c[0]} {c[1]}" + (" with a dot" if c[2] else "")  # noqa: E731
    full = lambda c: f"a {name(c)}" if c else "nothing"  # noqa: E731
    words = question.rstrip("?.").split()
    objects = [(i, c) for i, c in enumerate(cells) if c]
    if question == "describe the image.":
        return ", ".join("missing" if c == "?" else name(c) if c else "nothing" for c in cells)
    if question == "which image is missing?":
        fourth = [c if a == b else b if a == c else None for a, b, c in zip(*cells[:3])]
        return name(tuple(fourth))
    if question.startswith("what is in the"):
        return full(cells[puzzles.PLACES.index(" ".join(words[-2:]))])
    if question.startswith("what color"):
        return {c[0] for _, c in objects if c[1] == words[-1]}.pop()
    if question.startswith("what shape"):
        return {c[1] for _, c in objects if c[0] == words[-2]}.pop()
    if words[0] in ("how", "count"):
        what = words[2:-2] if words[0] == "how" else words[2:]
        color = what[0] if what[0] in puzzles.COLORS else None
        shape = next((s for s in puzzles.SHAPES if what[-1].startswith(s)), None)
        n = sum((color is None or c[0] == color) and (shape is None or c[1] == shape) for _, c in objects)
        number = ["zero", "one", "two", "three", "four"][n]
        single = " ".join(filter(None, [color, shape or "object"]))
        if words[0] == "how":
            return number
        return f"{number} {single}" if n == 1 else f"{number} {' '.join(what)}"
    where = lambda w: next(i for i, c in objects if list(c[:2]) == w)  # noqa: E731
    step = {"left": -1, "right": 1, "above": -2, "below": 2}
    side = next(w for w in words if w in step)
    return full(cells[where(words[-2:]) + step[side]])


@pytest.fixture(scope="module")
def drawn():
    return list(puzzles.pictures(3, {"train": (60, 60, 0), "test_held_out": (60, 60, 0)}))


def test_answers_are_those_of_the_picture(drawn):
    asked = set()
    for _, _, cells, puzzle, image, questions in drawn:
        looked = [seen(image, i) for i in range(4)]
        expected = [(c.color, c.shape, c.dot) if c else None for c in cells]
        assert looked == (expected[:3] + ["?"] if puzzle else expected)
        for each in questions:
            assert each.answer == answer(looked, each.question), (looked, each)
            asked.add(each.type)
    assert asked == set(puzzles.TYPES) - {"easy_vqa"}


def test_held_out_combinations_are_held_out(drawn):
    for split, _, cells, puzzle, _, questions in drawn:
        held = [(c.color, c.shape) in puzzles.HELD_OUT for c in cells if c]
        if split == "train":
            assert not any(held)
        else:
            assert held == [False] * 3 + [True] if puzzle else any(held)
            assert all(any(o.held_out for o in each.about) for each in questions)
    scenes = {split: {(c, p) for s, _, c, p, _, _ in drawn if s == split} for split in ("train", "test_held_out")}
    assert len(scenes["train"]) == 120 and not scenes["train"] & scenes["test_held_out"]


def test_same_seed_same_bytes_and_no_picture_in_two_splits(tmp_path):
    counts = [puzzles.write(tmp_path / name, 5, SPLITS) for name in ("one", "other")]
    assert counts[0] == counts[1]
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "other" / f).read_bytes() for f in files)
    pictures = [(f.parts[1], (tmp_path / "one" / f).read_bytes()) for f in files if f.suffix == ".png"]
    assert len({data for _, data in pictures}) == len(pictures)
    puzzles.write(tmp_path / "third", 6, SPLITS)
    assert (tmp_path / "third" / "train.jsonl").read_text() != (tmp_path / "one" / "train.jsonl").read_text()
    puzzles.write_noisy(tmp_path / "one", "train", 0.3, 0)
    rows, noisy = ((tmp_path / "one" / f"train{n}.jsonl").read_text().splitlines() for n in ("", "_noisy"))
    assert sum(a != b for a, b in zip(rows, noisy)) == round(0.3 * len(rows))


# ---- statistics ----


def test_statistics_against_known_values():
    """Expected values are scipy 1.17.1's (spearmanr, kendalltau, t.interval, permutation_test)."""
    found = seeds.interval([1.0, 2.0, 4.0])
    assert found["mean"] == pytest.approx(7 / 3) and found["half_width_95"] == pytest.approx(3.7947, abs=1e-3)
    assert seeds.interval([1.0])["half_width_95"] is None
    assert seeds.ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]
    xs, ys = [1, 2, 3, 4, 5], [2, 1, 4, 3, 5]
    found = seeds.rank_correlation(xs, ys)
    assert found["spearman"] == pytest.approx(0.8) and found["kendall"] == pytest.approx(0.6)
    assert found["spearman_p"] == pytest.approx(16 / 120) and found["kendall_p"] == pytest.approx(28 / 120)
    tied = seeds.rank_correlation([1, 2, 2, 3], [1, 3, 2, 3])
    assert tied["kendall"] == pytest.approx(0.8) and tied["spearman"] == pytest.approx(5 / 6)
    many = seeds.rank_correlation(list(range(10)), [0, 2, 1, 3, 5, 4, 6, 8, 7, 9])
    assert many["spearman"] == pytest.approx(1 - 6 * 6 / 990) and many["spearman_p"] < 1e-3
    assert seeds.rank_correlation([1, 1, 1], [1, 2, 3])["spearman"] is None


def test_papers_rows_are_there():
    """Every row of every table names rows of the paper's that exist, and the means are right."""
    config = study_jobs.load_config(study_jobs.CONFIG)
    for table in study_rows.TABLES:
        rows = study_rows.rows_of_table(table, config)
        assert len({row.name for row in rows}) == len(rows)
        if table in study_rows.PAPER:
            assert any(row.name.startswith("control: sft alone") for row in rows)
            means = study.paper_means(table, rows)
            named = {paper for row in rows for paper in row.paper}
            known = {entry["name"] for name in study_rows.PAPER[table] for entry in load_table(name)["rows"]}
            assert named <= known and known - named <= {"Qwen2-VL-72B"}
            assert all(len(found) >= 4 for found in means.values())
    operations = study.paper_means("4d", study_rows.rows_of_table("4d", config))["table_4d"]
    assert operations["L2 / KLD"] == pytest.approx(np.mean([81.5, 53.2, 66.8, 58.0, 81.7, 53.5, 67.0, 58.3]))


# ---- jobs ----


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Untrained models (one step each) and a few rows."""
    folder, encode = tmp_path_factory.mktemp("study"), VlsiDataset._encode
    study_models.keep_rows()
    steps = dict.fromkeys(study_models.STEPS, 1)
    study_models.prepare(folder, ["teacher", "student"], steps, SPLITS)
    yield folder
    VlsiDataset._encode = encode


FEW = [f"--{stage}.training.max_steps=2" for stage in ("verbalize", "interact", "sft")]
FEW += ["--training.per_device_train_batch_size=4"]


def test_study_end_to_end_resumes_and_pairs(work, tmp_path, monkeypatch, capsys):
    started = []
    rows = [study_rows.DEFAULT, study_rows._operations("- / KLD")]
    monkeypatch.setattr(study, "rows_of_table", lambda table, config: rows)
    words = ["--table", "4d", "--seeds", "2", "--work_dir", str(work), "--out", str(tmp_path), *FEW]

    def start():
        before = {file.parent.name: file.stat().st_mtime_ns for file in work.glob("jobs/*/job.json")}
        assert study.main(words) == 0
        after = {file.parent.name: file.stat().st_mtime_ns for file in work.glob("jobs/*/job.json")}
        started.append({key for key in after if after[key] != before.get(key)})
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    first = start()
    stages = [key.split("-")[0] for key in started[0]]
    assert {name: stages.count(name) for name in set(stages)} == {"verbalize": 2, "interact": 4, "sft": 4, "score": 8}
    entry = first["rows"][1]
    mine, base = (row["accuracy"]["values"] for row in (entry, first["rows"][0]))
    assert entry["difference_to_default"]["values"] == [a - b for a, b in zip(mine, base)]
    assert entry["steps"] == {"interact": 2, "sft": 2} and first["rows"][0]["steps"]["verbalize"] == 2
    assert first["rows"][0]["tflop"] > entry["tflop"] > 0 and first["seeds_done"] == 2
    assert set(entry["types"]) >= {"test/count", "test_held_out/sequence"}
    assert json.loads((tmp_path / "study_4d.json").read_text())["png"] == "study_4d.png"
    assert (tmp_path / "study_4d.png").stat().st_size > 1000

    second = start()
    assert not started[1] and second["rows"] == first["rows"]

    killed = next(file for file in work.glob("jobs/sft-*/job.json"))
    killed.rename(killed.with_name("job.json.partial"))  # as a kill in the middle of writing leaves it
    third = start()
    assert started[2] == {killed.parent.name}
    assert [row["accuracy"] for row in third["rows"]] == [row["accuracy"] for row in first["rows"]]


def test_failed_jobs_are_told_and_not_counted(work, monkeypatch):
    study_ = study_jobs.Study(work, {"sft.training.max_steps": 1, "training.per_device_train_batch_size": 4})
    row = study_rows.Row("broken", interact=None, sft={"sft.start_from": "base", "training.learning_rate": 1e30})
    told = []
    jobs = study_.jobs(row, 0, ("validation",))
    monkeypatch.setattr(study_jobs.Study, "_stage", lambda *a: (_ for _ in ()).throw(RuntimeError("broke")))
    failed = study_jobs.run_jobs(study_, jobs, 1, told.append)
    assert [job.stage for job in failed] == ["sft", "score"] and "failed" in told[0]
    assert study_.result(jobs[0]) is None
    assert "broke" in (work / "jobs" / f"{failed[0].key}.log").read_text()
    assert study_jobs.run_jobs(study_, jobs, 1, told.append, deadline=1.0) == []


def test_seeds_and_changes_make_other_jobs(work):
    study_ = study_jobs.Study(work)
    keys = {study_.jobs(study_rows.DEFAULT, seed, ("test",))[0].key for seed in range(3)}
    keys |= {study_.jobs(row, 0, ("test",))[0].key for row in study_rows.table_4e(study_.config)}
    assert len(keys) == 3 + 7
    changed = study_jobs.Study(work, {"sft.training.max_steps": 7})
    assert changed.jobs(study_rows.DEFAULT, 0, ("test",))[0].key not in keys
