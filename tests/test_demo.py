"""The demo: its arms, what it starts from, what it tells; its parts without training, and the whole on a few rows."""

import html
import json
import shutil
import sys

import pytest
import tiny_demo
import tiny_runs as runs
import torch
import yaml
from PIL import Image

from vlsi_fast import load_config, terminal
from vlsi_fast.cli import main
from vlsi_fast.config import ConfigError
from vlsi_fast.data import load_processor
from vlsi_fast.demo import arms, inputs, models, pictures, progress, run, tables, training
from vlsi_fast.evaluation.answers import Answer
from vlsi_fast.evaluation.scoring import exact_match
from vlsi_fast.lineage import write_record
from vlsi_fast.loading import load_backbone

DEMO = runs.ROOT / "configs" / "demo.yaml"
sys.path.insert(0, str(runs.ROOT / "benchmarks"))


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    """Paths in the demo's configs start from its root."""
    monkeypatch.chdir(runs.ROOT)


# ---- models ----


def test_the_teacher_is_what_the_recipe_makes(tmp_path, monkeypatch):
    """Tokenizer and architecture of the committed recipe; only the weights were trained."""
    monkeypatch.setattr(Image.Image, "save", lambda *_, **__: None)
    pictures.write(tmp_path)
    tokenizer = models.make_tokenizer(models.texts(tmp_path))
    assert load_processor(tiny_demo.TEACHER).tokenizer.get_vocab() == tokenizer.get_vocab()
    fresh, shipped = models.make_model(models.TEACHER, tokenizer), load_backbone(tiny_demo.TEACHER, "float32")
    shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (fresh, shipped)]
    assert shapes[0] == shapes[1]
    files = [file for file in models.MODELS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 4e6


def test_the_student_is_half_of_the_teacher(tmp_path):
    config = load_config(DEMO, {"student.path": str(tmp_path / "student")})
    inputs.make_student(config)
    teacher, student = (load_backbone(path, "float32") for path in (config.teacher.path, config.student.path))
    layers = [model.model.language_model.layers for model in (teacher, student)]
    assert [len(each) for each in layers] == [8, 4]
    for kept, layer in zip((0, 2, 5, 7), layers[1]):
        for a, b in zip(layers[0][kept].parameters(), layer.parameters(), strict=True):
            assert torch.equal(a, b)
    assert len(config.student.layers) == 3 and len(config.teacher.layers) == 7


def test_teacher_knows_and_student_does_not(tmp_path):
    source = tiny_demo.write_drawings(tmp_path, 24)
    data = load_config(DEMO, {"data.eval": [source], "data.root": None}).data
    found = {}
    for name, path in (("teacher", tiny_demo.TEACHER), ("student", tiny_demo.make_student(tmp_path / "student"))):
        rows = list(tiny_demo.answers(path, data))
        found[name] = sum(row.scores["exact_facts"] for row in rows) / len(rows)
    assert found["teacher"] >= 0.9 and found["student"] <= 0.1


# ---- data ----


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    patch = pytest.MonkeyPatch()
    patch.setattr(inputs, "LABELLED", 5)
    patch.setattr(inputs, "UNLABELLED", 4)
    inputs.draw_data(folder / "demo", {"teacher_train": 20, "train": 12, "validation": 3, "test": 3})
    patch.undo()
    pictures.write(folder / "all", {"teacher_train": 20, "train": 12, "validation": 3, "test": 3})
    return folder


def test_data_are_the_tasks_own_rows(drawn):
    """Of the files that `pictures.write` makes, byte by byte: the first labels of train, the last pictures without."""
    for kind, split, rows in (("labelled", "train", range(5)), ("test", "test", range(3))):
        lines = [json.loads(line) for line in (drawn / "demo" / f"{kind}.jsonl").read_text().splitlines()]
        full = [json.loads(line) for line in (drawn / "all" / f"{split}.jsonl").read_text().splitlines()]
        assert [line["messages"] for line in lines] == [full[i]["messages"] for i in rows]
        for line, i in zip(lines, rows):
            image = (drawn / "demo" / line["images"][0]).read_bytes()
            assert image == (drawn / "all" / "images" / split / f"{i}.png").read_bytes()
    without = sorted((drawn / "demo" / "images" / "unlabelled").iterdir())
    assert [int(file.stem) for file in without] == [8, 9, 10, 11]
    assert not (drawn / "demo" / "unlabelled.jsonl").exists()


def test_the_teachers_answers_are_rows_to_train_on(drawn, tmp_path):
    from vlsi_fast.data.sources import build_source

    shutil.copytree(drawn / "demo", tmp_path / "data")
    config = load_config(DEMO, {"output_dir": str(tmp_path), "student.path": "none"})
    assert inputs.answer_pictures(config) == 4
    own = arms.arm_config(next(arm for arm in arms.ARMS if arm.answered), DEMO, config)
    source = build_source(own.data.train)
    assert source.sizes == [5, 4]
    texts = ["".join(part.get("text", "") for part in source[i].messages[-1]["content"]) for i in range(5, 9)]
    said = [pictures.facts(text) for text in texts]
    scenes = pictures.scenes({"teacher_train": 20, "train": 12})
    shown = [cells for split, number, cells, _ in scenes if split == "train" and number >= 8]
    true = [frozenset((p, c.color, c.shape, c.dot) for p, c in enumerate(cells) if c) for cells in shown]
    assert sum(a == b for a, b in zip(said, true)) >= 2, "sampled, yet of the right picture"


# ---- arms ----


def test_arms_differ_in_what_they_say_only(tmp_path):
    vlsi = arms.arm_config(arms.VLSI, DEMO, load_config(DEMO, {"output_dir": str(tmp_path), "seed": 3}))
    steps = sum(vlsi.stage_training(stage).max_steps for stage in vlsi.stages)
    for arm in (*arms.ARMS, *arms.FURTHER):
        own = arms.arm_config(arm, DEMO, vlsi)
        assert own.seed == 3 and own.student.path == str(tmp_path / "start" / "student")
        assert own.output_dir == str(tmp_path if arm is arms.VLSI else tmp_path / arm.name)
        assert own.data.eval == vlsi.data.eval and own.data.train[0] == vlsi.data.train[0]
        assert len(own.data.train) == 1 + arm.answered
        plain = own.stages == ["sft"] and own.sft.start_from == "base"
        assert plain == (arm.control or arm.name == "unlabelled")
        for stage in own.stages:
            training_of = own.stage_training(stage)
            assert training_of.min_learning_rate == pytest.approx(training_of.learning_rate / 30, rel=0.05)
            assert training_of.per_device_train_batch_size == 8 and training_of.gradient_accumulation_steps == 1
        if arm.name in ("sft_only", "last_layer"):
            assert sum(own.stage_training(stage).max_steps for stage in own.stages) == steps


def test_a_step_has_the_same_rows_on_any_number_of_ranks():
    vlsi = load_config(DEMO)
    for ranks, rows in ((1, 16), (2, 8), (4, 4), (16, 1)):
        assert arms.arm_config(arms.VLSI, DEMO, vlsi, ranks).training.per_device_train_batch_size == rows
    for ranks in (0, 3, 32):
        with pytest.raises(ConfigError, match=f"--ranks {ranks}: .*16 rows"):
            arms.arm_config(arms.VLSI, DEMO, vlsi, ranks)


def test_the_file_of_sft_only_has_vlsis_steps():
    """So that it can be run alone, too."""
    vlsi, own = (load_config(arms.arm_file(arm, DEMO)) for arm in (arms.VLSI, arms.FURTHER[0]))
    assert own.stage_training("sft").max_steps == sum(vlsi.stage_training(s).max_steps for s in vlsi.stages)


def test_what_is_run():
    names = {
        words: [arm.name for arm in arms.chosen(*words)]
        for words in [(False, True), (True, True), (False, False), (True, False), (False, True, True)]
    }
    assert names[False, True] == ["sft_best", "last_layer", "student_after", "unlabelled"]
    assert names[True, True] == ["sft_best", "student_after"]
    assert names[False, False] == ["last_layer", "student_after", "unlabelled"]
    assert names[True, False] == ["student_after"]
    assert names[False, True, True] == [*names[False, True], "sft_only", "unlabelled_vlsi"]


def test_wrong_configs_are_refused(tmp_path, capsys):
    shutil.copyfile(DEMO, tmp_path / "demo.yaml")
    words = ["demo", "--config", str(tmp_path / "demo.yaml"), "--output-dir", str(tmp_path / "run")]
    assert main(words) == 2 and "sft_best.yaml" in capsys.readouterr().err
    shutil.copytree(DEMO.with_suffix(""), tmp_path / "demo")
    tree = yaml.safe_load((tmp_path / "demo.yaml").read_text())
    tree["interact"]["training"].pop("max_steps")
    (tmp_path / "demo.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match="interact.training.max_steps: .*set a number"):
        arms.arm_config(arms.VLSI, tmp_path / "demo.yaml", load_config(tmp_path / "demo.yaml"))
    assert main(words) == 2
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").touch()
    assert main(["demo", "--output-dir", str(tmp_path / "run")]) == 2 and "--fresh" in capsys.readouterr().err


# ---- scoring ----


def test_scoring_counts_right_answers(workspace):
    """A model that never learnt scores what its own greedy answers give, row by row."""
    tree = runs.settings(workspace, workspace / "unused")
    tree["data"]["eval"] = [tree["data"]["train"][0] | {"limit": 5}]
    config = load_config(runs.write_config(tree, workspace / "score.yaml"))
    found = exact_match(workspace / "student", config.data, batch_size=2, max_new_tokens=4)
    assert found["rows"] == 5 and found["correct"] == found["accuracy"] * 5
    alone = exact_match(workspace / "student", config.data, batch_size=1, max_new_tokens=4)
    assert alone["correct"] == found["correct"]


def test_scoring_searches_with_beams(workspace, monkeypatch):
    """What is asked for reaches stock `generate`; beams stay the caller's choice."""
    from transformers import GenerationMixin

    asked, generate = [], GenerationMixin.generate
    monkeypatch.setattr(
        GenerationMixin, "generate", lambda self, **options: asked.append(options) or generate(self, **options)
    )
    tree = runs.settings(workspace, workspace / "unused")
    tree["data"]["eval"] = [tree["data"]["train"][0] | {"limit": 2}]
    config = load_config(runs.write_config(tree, workspace / "beams.yaml"))
    for beams in (1, 5):
        assert exact_match(workspace / "student", config.data, num_beams=beams, max_new_tokens=4)["rows"] == 2
    assert [options["num_beams"] for options in asked] == [1, 5]
    assert not any(options["do_sample"] for options in asked)


# ---- a launch, and how far the whole is ----


def test_a_launch_tells_its_steps_and_why_it_stopped(tmp_path, capsys):
    config = load_config(DEMO, {"output_dir": str(tmp_path / "run")})
    folder = config.stage_dir("verbalize")
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("{}\n" * 100)
    seen = []
    training.train([sys.executable, "-c", "print('hello')"], {}, config, tmp_path / "log", seen.append)
    assert seen and set(seen) == {0.25} and (tmp_path / "log").read_text() == "hello\n"
    code = "print('line of the log'); raise SystemExit(3)"
    with pytest.raises(SystemExit, match="all of its words: .*log"):
        training.train([sys.executable, "-c", code], {}, config, tmp_path / "log", seen.append)
    assert "line of the log" in capsys.readouterr().err


def test_a_launch_has_ranks_and_a_port_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words, environment = training.command(3, DEMO, {"seed": 1})
    assert words[1:3] == ["--num_accelerators", "3"] and words[-3:] == ["--config", str(DEMO), "--seed=1"]
    assert environment["DS_ACCELERATOR"] == "cpu" and int(words[words.index("--master_port") + 1]) > 1024


def test_the_time_left_is_by_shares(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock[0])
    with progress.Progress({"a": 10, "b": 30}) as shown:
        with shown.part("a"):
            clock[0] = 120.0
            assert shown.share(0.5) == 0.125
        with shown.part("b"):  # a quarter took two minutes
            assert shown.share() == 0.25 and shown.left() == "about 6 min left"
            clock[0] = 300.0
    assert shown.share() == 1.0 and shown.seconds == {"a": 120.0, "b": 180.0}
    assert "2 of 2: b  about 6 min left" in capsys.readouterr().out


# ---- what is told ----


def test_it_says_first_what_will_happen(tmp_path):
    chosen = arms.chosen(quick=True, control=True)
    told = run.introduction(load_config(DEMO, {"output_dir": str(tmp_path)}), chosen, 290)
    assert "300 pictures have descriptions" in told and "2 ways (sft alone, best steps; VLsI)" in told
    assert "about 5 minutes" in told and str(tmp_path / "report.html") in told


def invented(name, right):
    scores = [{"exact_facts": float(i < right), "facts_f1": 0.5 + 0.5 * (i < right)} for i in range(10)]
    return [
        Answer(id=str(i), source="t", type="other", question="?", answer="a", prediction=name, scores=s)
        for i, s in enumerate(scores)
    ]


@pytest.fixture
def summary(tmp_path):
    vlsi = arms.arm_config(arms.VLSI, DEMO, load_config(DEMO, {"output_dir": str(tmp_path)}))
    configs = {arm: arms.arm_config(arm, DEMO, vlsi) for arm in (*arms.chosen(True, True), arms.FURTHER[0])}
    for own in configs.values():
        for stage in own.stages:
            steps = own.stage_training(stage).max_steps
            told = {"seconds": 1.5, "optimizer_steps": steps, "answer_tokens": 9, "skipped_rows": {}}
            write_record(own.stage_dir(stage), {"stage": stage, "state": "finished", "summary": told})
    right = {"teacher": 10, "student_before": 0, "sft_best": 2, "sft_only": 1, "student_after": 7}
    return tables.summarise_run(configs, {name: invented(name, count) for name, count in right.items()})


def test_the_summary_holds_every_score(summary, tmp_path, capsys):
    names = ("teacher", "student_before", "student_after", "sft_only")
    assert [summary[f"{name}_accuracy"] for name in names] == [1, 0, 0.7, 0.1]
    assert summary["sft_best_accuracy"] == 0.2 and summary["last_layer_accuracy"] is None
    assert summary["unlabelled_accuracy"] is None and summary["unlabelled_vlsi_accuracy"] is None
    assert summary["f1"]["student_after"] == pytest.approx(0.85) and summary["f1"]["last_layer"] is None
    assert summary["arms"]["sft_only"]["optimizer_steps"] == summary["arms"]["student_after"]["optimizer_steps"] == 400
    assert list(summary["stages"]) == ["verbalize", "interact"] and summary["stages_seconds"] == 3.0
    assert {each["first"] for each in summary["differences"]} == {"student_after"}
    tables.print_tables(summary | {"seconds": 100.0}, tmp_path, tmp_path / "report.html")
    text = capsys.readouterr().out
    assert "student after VLsI" in text and "70.0%" in text and "VLsI less sft alone, best steps: +50.0" in text
    last = "The student went from 0.0% to 70.0% (teacher 100.0%, sft alone on the same labels 20.0%)."
    assert " ".join(text.split()).endswith(last)


def test_the_page_has_every_score(summary, tmp_path):
    from vlsi_fast.report import collect
    from vlsi_fast.runs import Run

    (tmp_path / "summary.json").write_text(json.dumps(summary))
    found = collect.demo_scores(collect.read_summary(Run(tmp_path, {})))
    assert [(table["metric"], table["questions"]) for table in found["tables"]] == [
        ("exact facts", 10),
        ("facts F1", 10),
    ]
    exact, f1 = ({s.role: s for s in table["scores"]}["after"] for table in found["tables"])
    assert exact.label == "student after VLsI" and exact.mean == 0.7 and exact.interval[0] < 0.7 < exact.interval[1]
    assert f1.mean == pytest.approx(0.85)
    roles = {s.label: s.role for s in found["tables"][0]["scores"]}
    assert [roles[name] for name in ("sft alone, best steps", "student before")] == ["control", "before"]
    gains = {(each["label"], each["metric"]): each for each in found["differences"]}
    assert set(label for label, _ in gains) == {"sft alone, best steps", "sft alone, VLsI's steps"}
    gain = gains["sft alone, best steps", "exact facts"]
    assert gain["difference"] == 0.5 and gain["interval"][0] < 0.5 < gain["interval"][1]


def test_gains_over_seeds_and_the_bar(summary):
    """Against the better of the two sft arms, paired by seed."""
    import demo_seeds

    def seed(vlsi, best, only):
        changed = {"student_after_accuracy": vlsi, "sft_best_accuracy": best, "sft_only_accuracy": only}
        return summary | changed | {"seconds": 60.0}

    found = demo_seeds.collect([seed(0.70, 0.50, 0.10), seed(0.72, 0.51, 0.70), seed(0.71, 0.52, 0.10)])
    assert found["best_sft"] == "sft_best" and (found["gains"][0]["model"], found["gains"][0]["over"]) == (
        "student_after",
        "sft_best",
    )
    assert found["gains"][0]["values"] == pytest.approx([0.20, 0.21, 0.19]) and found["bar_met"]
    assert found["gains"][0]["half_width_95"] == pytest.approx(4.303 * 0.01 / 3**0.5)
    assert not demo_seeds.collect([seed(0.59, 0.50, 0.1), seed(0.59, 0.50, 0.1)])["bar_met"], "9 points are too few"
    assert not demo_seeds.collect([seed(0.9, 0.5, 0.1), seed(0.5, 0.5, 0.1)])["bar_met"], "the interval holds 0"
    demo_seeds.print_tables(found | {"seeds": 3})


# ---- the whole ----


@pytest.mark.slow
def test_the_demo_end_to_end(tmp_path, monkeypatch, capfd):
    """Every arm for two steps a stage, on two ranks; the report names every arm, and all models speak."""
    monkeypatch.setattr(inputs, "LABELLED", 24)
    monkeypatch.setattr(inputs, "UNLABELLED", 8)
    shutil.copytree(DEMO.with_suffix(""), tmp_path / "demo")
    for file in (DEMO, *(tmp_path / "demo").glob("*.yaml")):
        tree = yaml.safe_load(file.read_text())
        for stage in ("verbalize", "interact", "sft"):
            tree.get(stage, {}).get("training", {}).update({"max_steps": 2} if stage in tree else {})
        if file == DEMO:
            tree["data"]["eval"][0]["limit"] = 6
        (tmp_path / file.relative_to(DEMO.parent if file == DEMO else tmp_path)).write_text(yaml.safe_dump(tree))
    output = tmp_path / "run"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    terminal.hush()
    terminal.hush_bars()  # the command does so while it imports what loads models; this process has imported it before
    assert main(["demo", "--config", str(tmp_path / "demo.yaml"), "--output-dir", str(output)]) == 0
    summary = json.loads((output / "summary.json").read_text())
    for arm in arms.ARMS:
        assert 0 <= summary[f"{arm.name}_accuracy"] <= 1 and 0 <= summary["f1"][arm.name] <= 1
    assert summary["teacher_accuracy"] > summary["student_before_accuracy"]
    assert list(summary["stages"]) == ["verbalize", "interact"]
    assert summary["sft_only_accuracy"] is None and summary["arms"]["last_layer"]["optimizer_steps"] == 2
    assert summary["peak_rss_bytes"] > 1e8 and summary["versions"]["deepspeed"] != "absent"
    assert len((output / "answers.jsonl").read_text().splitlines()) == 6 * (2 + len(arms.ARMS))
    page = html.unescape((output / "report.html").read_text())
    for label in arms.LABELS.values():
        assert (label in page) == (label not in {arm.label for arm in arms.FURTHER})
    for name in ("base", "distilled", "teacher"):
        assert f'data-model="{name}"' in page
    told = capfd.readouterr()
    assert "student after VLsI" in told.out and "Loading weights" not in told.out + told.err
