"""The demo: its shipped models, how they were made, and the command end to end on a few rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs as runs
import yaml

from vlsi_fast import load_config
from vlsi_fast.data import load_processor
from vlsi_fast.demo import models
from vlsi_fast.loading import load_backbone
from vlsi_fast.scoring import exact_match

DEMO = runs.ROOT / "configs" / "demo.yaml"


def test_models_are_small_and_share_one_tokenizer():
    files = [file for file in models.MODELS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 15e6
    teacher, student = (load_processor(models.MODELS / role).tokenizer for role in ("teacher", "student"))
    assert teacher.get_vocab() == student.get_vocab() == models.make_tokenizer(models.easy_vqa_texts()).get_vocab()
    sizes = {role: load_backbone(models.MODELS / role, "float32").num_parameters() for role in ("teacher", "student")}
    assert 2.5e6 < sizes["teacher"] < 3.5e6 and 0.4e6 < sizes["student"] < 0.7e6


def test_models_are_what_the_recipe_makes():
    """Same architecture as the committed recipe; only the weights were trained."""
    tokenizer = models.make_tokenizer(models.easy_vqa_texts())
    for role in ("teacher", "student"):
        fresh = models.make_model(models.SIZES[role], tokenizer)
        shipped = load_backbone(models.MODELS / role, "float32")
        shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (fresh, shipped)]
        assert shapes[0] == shapes[1]


def test_teacher_knows_and_student_does_not():
    """On 400 test questions; `benchmarks/results/demo_seeds.json` has all of them."""
    data = load_config(DEMO, {"data.eval.0.limit": 400}).data
    scores = {role: exact_match(models.MODELS / role, data)["accuracy"] for role in ("teacher", "student")}
    assert scores["teacher"] >= 0.95
    assert scores["student"] < scores["teacher"] - 0.05


def test_captions_say_what_the_questions_tell():
    _, triples = models.easy_vqa_train()
    known = dict(models.captions())
    assert len(known) > 3000
    for question, answer, image in triples:
        if image not in known:
            continue
        color, shape = known[image].split()
        if answer in models.COLORS:
            assert answer == color
        elif answer in models.SHAPES:
            assert answer == shape
        elif question in (f"is there a {shape}?", f"is there a {color} shape?"):
            assert answer == "yes"


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


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    tree = yaml.safe_load(DEMO.read_text())
    for section in ("train", "eval"):
        tree["data"][section][0]["limit"] = 60
    tree["training"] |= {"per_device_train_batch_size": 4, "save_steps": 100}
    for stage in ("verbalize", "interact", "sft"):
        tree[stage]["training"]["max_steps"] = 2
    config = runs.write_config(tree, folder / "demo.yaml")
    command = [str(Path(sys.executable).with_name("vlsi-fast")), "demo", "--config", str(config)]
    command += ["--output_dir", str(folder / "run")]
    done = subprocess.run(
        command, cwd=runs.ROOT, env=runs.environment(), timeout=600, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return command, folder / "run", done


def test_demo_writes_its_summary(demo_run):
    _, output, done = demo_run
    assert done.returncode == 0, done.stdout[-3000:]
    summary = json.loads((output / "summary.json").read_text())
    for name in ("teacher", "student_before", "student_after", "sft_only"):
        assert 0 <= summary[f"{name}_accuracy"] <= 1
    assert summary["teacher_accuracy"] > summary["student_before_accuracy"]
    assert list(summary["stages"]) == ["verbalize", "interact", "sft"]
    for stage in summary["stages"].values():
        assert stage["optimizer_steps"] == 2 and stage["answer_tokens"] > 0 and stage["seconds"] > 0
    assert summary["peak_rss_bytes"] > 1e8 and summary["versions"]["deepspeed"] != "absent"
    control = json.loads((output / "control" / "sft" / "vlsi_stage.json").read_text())
    assert control["summary"]["optimizer_steps"] == 6, "the control has the three stages' steps"
    assert "student after VLsI" in done.stdout
    page = (output / "report.html").read_text()
    assert str(output / "report.html") in done.stdout.replace("\n", "")
    for cell in ("base", "distilled", "teacher"):  # each of four questions was put to all three models
        assert page.count(f'<th class="text" scope="col">{cell}</th>') == 4


def test_demo_does_not_overwrite(demo_run):
    command, _, done = demo_run
    assert done.returncode == 0
    again = subprocess.run(command, cwd=runs.ROOT, env=runs.environment(), text=True, capture_output=True, timeout=120)
    assert again.returncode == 2 and "--fresh" in again.stderr
