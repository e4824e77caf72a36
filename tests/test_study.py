"""The studies: statistics against known values, tuning, jobs that resume, curves."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import seeds  # noqa: E402
import study  # noqa: E402
import study_curves  # noqa: E402
import study_jobs  # noqa: E402
import study_models  # noqa: E402
import study_rows  # noqa: E402
import tokenizer_baselines  # noqa: E402

from vlsi_fast.config import VerbalizerConfig  # noqa: E402
from vlsi_fast.data.collate import Collator  # noqa: E402
from vlsi_fast.data.dataset import VlsiDataset  # noqa: E402
from vlsi_fast.data.processors import load_processor  # noqa: E402
from vlsi_fast.data.sources import build_source  # noqa: E402
from vlsi_fast.demo import models  # noqa: E402
from vlsi_fast.hidden_states import VerbalizedBackbone, answer_positions  # noqa: E402
from vlsi_fast.loading import load_backbone  # noqa: E402
from vlsi_fast.paper import load_table  # noqa: E402
from vlsi_fast.verbalizer import Verbalizers, VerbalizerSpec  # noqa: E402

RESULTS = Path(study.ROOT) / "benchmarks" / "results"

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
    for table, make in study_rows.TABLES.items():
        rows = make()
        assert len({row.name for row in rows}) == len(rows)
        if table in study_rows.PAPER:
            means = study.paper_means(table, rows)
            named = {paper for row in rows for paper in row.paper}
            known = {entry["name"] for name in study_rows.PAPER[table] for entry in load_table(name)["rows"]}
            assert named <= known and known - named <= {"Qwen2-VL-72B"}
            assert all(len(found) >= 4 for found in means.values())
    operations = study.paper_means("4d", study_rows.table_4d())["table_4d"]
    assert operations["L2 / KLD"] == pytest.approx(np.mean([81.5, 53.2, 66.8, 58.0, 81.7, 53.5, 67.0, 58.3]))


def test_every_row_is_one_that_the_config_takes():
    """Overrides are known options, and no two rows of a table are the same run by mistake."""
    for table, make in study_rows.TABLES.items():
        for row in make():
            for changes in (row.changes, row.verbalizer, row.verbalize):
                study_jobs.load_config(study_jobs.CONFIG, row.verbalizer | changes)
        kinds = [
            (
                r.arm,
                r.budget,
                str(r.changes | r.verbalizer | r.verbalize),
                r.data,
                r.teacher,
                r.student,
                r.beams,
                r.after and r.after.name,
                r.scored,
                r.baseline,
            )
            for r in make()
        ]
        assert len(set(kinds)) == len(kinds), table


# ---- jobs ----


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The demo's teacher, its students, and a few rows."""
    folder, kinds = tmp_path_factory.mktemp("study"), (VlsiDataset, tokenizer_baselines.WholeAnswers)
    encode, states = [kind._encode for kind in kinds], VerbalizedBackbone.states
    study_models.keep_rows()
    splits = {"teacher_train": 4, "train": 12, "validation": 5, "test": 6}
    study_models.prepare(folder, ["teacher", "student"], splits)
    yield folder
    for kind, method in zip(kinds, encode):
        kind._encode = method
    VerbalizedBackbone.states = states


def test_states_of_frozen_models_are_computed_once_a_row(work, monkeypatch):
    """In other batches, of other lengths, they are what the model says there; what learns is always computed."""
    processors = {"student": load_processor(work / "models" / "teacher")}
    rows = [study_models.rows_of(work / "data" / "train.jsonl")]
    data = study_jobs.load_config(study_jobs.CONFIG, {"data.train": rows}).data
    dataset, collate = VlsiDataset(build_source(data.train), processors, data), Collator(processors)
    model = load_backbone(work / "models" / "teacher", "float32")
    runs = []
    monkeypatch.setattr(VerbalizedBackbone, "states", VerbalizedBackbone.states)
    monkeypatch.setattr(
        VerbalizedBackbone, "_run", lambda self, x, run=VerbalizedBackbone._run: runs.append(1) or run(self, x)
    )

    def say(backbone, rows):
        inputs = dict(collate([dataset[i] for i in rows])["student"])
        index, _ = answer_positions(inputs.pop("labels"))
        return backbone.states(inputs, index, everywhere=False)

    def backbone(trained=False):
        spec = VerbalizerSpec.of(model.config, [2, 5], VerbalizerConfig())
        return VerbalizedBackbone(model, [2, 5], Verbalizers(spec), train_backbone=trained)

    batches = ([0, 1, 2], [3, 4], [4, 2], [1, 3, 0], [5, 0])
    expected = [say(backbone(), rows) for rows in batches]
    study_models.keep_states()
    kept = backbone()
    runs.clear()
    for rows, (hidden, _, last) in zip(batches, expected):
        found, _, found_last = say(kept, rows)
        torch.testing.assert_close(torch.stack(found), torch.stack(hidden), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found_last, last, atol=1e-5, rtol=1e-4)
    assert len(runs) == 3, "rows 0 to 4 once, and row 5"
    runs.clear()
    for _ in range(2):
        say(backbone(trained=True), [0, 1])
    assert len(runs) == 2


def test_conditions(work):
    """Wrong answers are other pictures', and a small set of labels is part of a larger one."""
    read = lambda name: (work / "data" / f"{name}.jsonl").read_text().splitlines()  # noqa: E731
    assert read("labels_300") == read("train")  # fewer rows than that in this test
    right, wrong = read("labels_300"), read("labels_300_wrong50")
    differing = [(json.loads(a), json.loads(b)) for a, b in zip(right, wrong) if a != b]
    assert len(differing) == len(right) // 2
    for a, b in differing:
        assert a["images"] == b["images"]
        assert b["messages"][1]["content"] in {x["messages"][1]["content"] for x, _ in differing}
    answered = [json.loads(line) for line in read("answered")]
    assert answered and all(row["messages"][1]["role"] == "assistant" for row in answered)


FEW = ["--training.per_device_train_batch_size=4"]


@pytest.fixture
def short(monkeypatch):
    """Grids and steps that take no time."""
    rows = [
        study_rows.replace(study_rows.VLSI, budget=4, rates=(1e-3, 2e-3)),
        study_rows.replace(study_rows.BEST_SFT, rates=(1e-3,), choices=(2, 3)),
        study_rows.TEACHER,
    ]
    monkeypatch.setattr(study_jobs, "MAX_ANSWER", 4)
    monkeypatch.setitem(study_rows.TABLES, "main", lambda: rows)
    return rows


@pytest.mark.slow
def test_study_end_to_end_tunes_resumes_and_pairs(work, tmp_path, short, capsys):
    started = []
    words = ["--table", "main", "--seeds", "2", "--work-dir", str(work), "--out", str(tmp_path), *FEW]

    def start():
        before = {file.parent.name: file.stat().st_mtime_ns for file in work.glob("jobs/*/job.json")}
        assert study.main(words) == 0
        after = {file.parent.name: file.stat().st_mtime_ns for file in work.glob("jobs/*/job.json")}
        started.append({key for key in after if after[key] != before.get(key)})
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["failed"] == 0
        return json.loads((tmp_path / "study_main.json").read_text())

    first = start()
    stages = [key.split("-")[0] for key in started[0]]
    # tuning: 2 rates of VLsI that share their verbalizers, 2 numbers of steps of sft; then 2 seeds of the best of each;
    # the teacher's score does not depend on a seed
    assert {name: stages.count(name) for name in set(stages)} == {"verbalize": 3, "interact": 4, "sft": 4, "score": 9}
    vlsi, sft, teacher = first["rows"]
    assert [(each["rate"], each["steps"]) for each in vlsi["tuning"]] == [(1e-3, 4), (2e-3, 4)]
    assert [(each["rate"], each["steps"]) for each in sft["tuning"]] == [(1e-3, 2), (1e-3, 3)]
    for row in (vlsi, sft):
        best = max(row["tuning"], key=lambda each: each["f1"])
        assert best["f1"] == max(e["f1"] for e in row["tuning"] if e["rate"] == row["setting"]["rate"])
    assert vlsi["seeds"] == [1, 2] and vlsi["steps"] == {"verbalize": 1, "interact": 3}
    differences = [a - b for a, b in zip(sft["exact"]["values"], vlsi["exact"]["values"])]
    assert sft["exact_to_default"]["values"] == differences
    assert vlsi["tflop"] > sft["tflop"] > 0 and first["seeds_done"] == 2 and teacher["steps"] == {}
    assert first["questions"] == 6 and (tmp_path / first["png"]).stat().st_size > 1000

    second = start()
    assert not started[1] and second["rows"] == first["rows"]

    killed = next(file for file in work.glob("jobs/sft-*/job.json"))
    killed.rename(killed.with_name("job.json.partial"))  # as a kill in the middle of writing leaves it
    recorded = (tmp_path / "study_jobs.jsonl").rename(tmp_path / "kept.jsonl").read_text()
    third = start()
    assert started[2] == {killed.parent.name}
    assert [row.get("exact") for row in third["rows"]] == [row.get("exact") for row in first["rows"]]

    # on another machine, from the recorded results alone: only what a lost score rests on is made again
    shutil.rmtree(work / "jobs")
    lost = next(line for line in recorded.splitlines(keepends=True) if '"score-' in line and '"exact": ' in line)
    (tmp_path / "study_jobs.jsonl").write_text(recorded.replace(lost, ""))
    fourth = start()
    assert json.loads(lost)["key"] in started[3] and 1 <= len(started[3]) <= 3
    assert [row.get("exact") for row in fourth["rows"]] == [row.get("exact") for row in first["rows"]]
    names = [json.loads(line)["key"] for line in (tmp_path / "study_jobs.jsonl").read_text().splitlines()]
    assert names == [json.loads(line)["key"] for line in recorded.splitlines()]


def test_equal_operations_are_worked_out(work, short):
    """Steps of sft whose products cost what VLsI's did."""
    study_ = study_jobs.Study(work)
    vlsi, sft = (study_jobs.Job("score", "{}", (study_jobs.Job(stage, "{}"),)) for stage in ("interact", "sft"))
    known = {"interact": {"flops": 9e9, "steps": 4}, "sft": {"flops": 3e7, "steps": 2}}
    study_.result = lambda job: known.get(job.stage, {})
    assert study_.operations_steps(vlsi, sft) == 600


def test_failed_jobs_are_told_and_not_counted(work, monkeypatch):
    study_ = study_jobs.Study(work, {"training.per_device_train_batch_size": 4})
    row, told = study_rows.Row("broken", "sft"), []
    job = study_.job(row, {"rate": 1e30, "steps": 1}, 0, "validation")
    monkeypatch.setattr(study_jobs.Study, "_stage", lambda *a: (_ for _ in ()).throw(RuntimeError("broke")))
    failed = study_jobs.run_jobs(study_, [job], 1, told.append)
    assert [each.stage for each in failed] == ["sft", "score"] and "failed" in told[0]
    assert study_.result(job) is None
    assert "broke" in (work / "jobs" / f"{failed[0].key}.log").read_text()
    assert study_jobs.run_jobs(study_, [job], 1, told.append, deadline=1.0) == []


def test_models_of_rows_that_are_not_run_need_not_be_there(work, tmp_path, capsys):
    words = ["--table", "depth", "--seeds", "0", "--work-dir", str(work), "--out", str(tmp_path), "--only"]
    assert study.main([*words, "^nothing$"]) == 0
    with pytest.raises(SystemExit):
        study.main([*words, "student_2"])
    assert "has no student_2; add --prepare" in capsys.readouterr().err


def test_how_well_a_stage_fits_its_rows(tmp_path):
    """Of interact, half way and at the end; kept with the results when its folder is gone."""
    study_ = study_jobs.Study(tmp_path, records=tmp_path / "records.jsonl")
    sft, interact = (study_jobs.Job(stage, "{}") for stage in ("sft", "interact"))
    score = study_jobs.Job("score", "{}", (interact,))
    assert study_.fit(score) is None and study_.fit(study_jobs.Job("score", "{}", (sft,))) is None
    folder = tmp_path / "jobs" / interact.key
    (folder / "interact").mkdir(parents=True)
    (folder / "job.json").write_text('{"stage": "interact", "steps": 100}')
    (folder / "interact" / "metrics.jsonl").write_text("".join(f'{{"loss/last": {i}}}\n' for i in range(100)))
    assert study_.fit(score) == {"half": np.mean(range(40, 60)), "end": np.mean(range(80, 100))}
    study_.record()
    shutil.rmtree(folder)
    later = study_jobs.Study(tmp_path, records=tmp_path / "records.jsonl")
    assert later.fit(score) == {"half": 49.5, "end": 89.5} and later.result(interact)["steps"] == 100


def test_seeds_and_changes_make_other_jobs(work):
    study_, setting = study_jobs.Study(work), {"rate": 1e-2, "steps": 4}
    keys = {study_.job(study_rows.VLSI, setting, seed, "test").key for seed in range(3)}
    keys |= {study_.job(row, setting, 0, "test").key for row in study_rows.table_4e() if row.arm == "vlsi"}
    assert len(keys) == 3 + 8
    changed = study_jobs.Study(work, {"lora.rank": 7})
    assert changed.job(study_rows.VLSI, setting, 0, "test").key not in keys
    assert study_.job(study_rows.VLSI, setting | {"rate": 2e-2}, 0, "test").key not in keys


@pytest.mark.parametrize("table", ["main", "labels"])
def test_results_of_earlier_studies_are_found_again(work, table):
    """Results are recorded by the keys of jobs, which an option that came later must not change."""
    study_ = study_jobs.Study(work, records=RESULTS / "study_jobs.jsonl")
    told = json.loads((RESULTS / f"study_{table}.json").read_text())
    for row, entry in zip(study_rows.TABLES[table](), told["rows"], strict=True):
        for at, seed in enumerate(entry["seeds"]):
            job = study_.job(row, entry["setting"], seed, told["split"])
            if study_.made(job):  # by another test, of a few rows
                continue
            assert study_.result(job)["exact"] == entry["exact"]["values"][at], row.name
            assert all(study_.result(each) for each in job.chain())


@pytest.mark.slow
def test_a_teacher_with_another_tokenizer(work):
    """Rows of table tokenizers: what runs, for how many steps, on which answers."""
    folder = work / "models" / "teacher_other"
    processor = models.make_processor(models.make_tokenizer(models.texts(work / "data"), 40))
    models.make_model(models.TEACHER, processor.tokenizer).save_pretrained(folder)
    processor.save_pretrained(folder)
    study_, setting = study_jobs.Study(work, {"training.per_device_train_batch_size": 4}), {"rate": 1e-2, "steps": 4}
    rows = {row.name: row for row in study_rows.table_tokenizers() if row.teacher == "teacher_other"}
    chains, told = {}, []
    for name in ("GOLD's hybrid and sft", "ULD and sft", "student's words: VLsI", "student's words: last-layer KL"):
        (row,) = (rows[each] for each in rows if each.endswith(name))
        chains[name] = study_.job(row, setting, 0, "test").chain()[:-1]
    assert study_jobs.run_jobs(study_, [job for chain in chains.values() for job in chain], 2, told.append) == [], told
    steps = {name: {job.stage: study_.result(job)["steps"] for job in chain} for name, chain in chains.items()}
    assert steps["ULD and sft"] == steps["GOLD's hybrid and sft"] == {"interact": 4}
    assert steps["student's words: VLsI"] == steps["student's words: last-layer KL"] == {"verbalize": 1, "interact": 3}
    made = {name: [work / "jobs" / job.key / job.stage for job in chain] for name, chain in chains.items()}
    spoken = [each.parent.name for each in made["student's words: last-layer KL"][0].glob("*/verbalizer_config.json")]
    assert spoken == ["teacher"]
    losses = {}
    for name, folders in made.items():
        first = json.loads((folders[-1] / "metrics.jsonl").read_text().splitlines()[0])
        losses[name] = (first["loss"], first["answer_tokens"])
    assert len({loss for loss, _ in losses.values()}) == len(losses)
    assert losses["ULD and sft"][1] == losses["GOLD's hybrid and sft"][1]  # whole answers of the student


def test_curves(tmp_path):
    def entry(name, arm, mean, **more):
        return {"name": name, "arm": arm, "exact": {"mean": mean, "half_width_95": 0.01}} | more

    rows = [entry("300 labels: VLsI", "vlsi", 0.5), entry("30 labels: VLsI", "vlsi", 0.2), entry("x", "", 0.9)]
    assert study_curves.points({"table": "labels", "rows": rows}) == {"vlsi": [(30.0, 20, 1), (300.0, 50, 1)]}
    with pytest.raises(FileNotFoundError, match="--table labels"):
        study_curves.plot(tmp_path)
    (tmp_path / "study_labels.json").write_text(json.dumps({"table": "labels", "rows": rows}))
    operations = {"table": "operations", "rows": [entry("sft alone, 50 steps", "sft", 0.1, tflop=0.2)]}
    (tmp_path / "study_operations.json").write_text(json.dumps(operations))
    assert (tmp_path / study_curves.plot(tmp_path)).stat().st_size > 5000
