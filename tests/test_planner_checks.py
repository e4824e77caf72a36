"""Checks before a run: each failure provoked for real, and none hides another."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from types import SimpleNamespace

import pytest
import tiny
import tiny_runs as runs
import torch
from PIL import Image

from vlsi_fast.cli import main
from vlsi_fast.config import ConfigError, load_config
from vlsi_fast.planner.checks import command, data, machine
from vlsi_fast.planner.checks.models import check_heads
from vlsi_fast.planner.checks.subject import FAILURE, NOTICE, PASS, UNCHECKED, Failed, Subject
from vlsi_fast.stages import run

Usage = namedtuple("Usage", "total used free")


def config_of(workspace, tmp_path, changes=None):
    path = runs.write_config(runs.settings(workspace, tmp_path / "run"), tmp_path / "config.yaml")
    return load_config(path, changes or {})


def results_of(config, rows=8, **options):
    return {result.name: result for result in command.look(Subject(config, rows=rows, **options))}


def only_failure(results, *names):
    found = {name for name, result in results.items() if result.status == FAILURE}
    assert found == set(names), {n: (r.status, r.detail) for n, r in results.items()}
    for name in names:
        assert results[name].fix
    return results[names[0]]


@pytest.fixture
def models(workspace, tmp_path):
    """Copies of both models that a test may damage."""
    for role in ("student", "teacher"):
        shutil.copytree(workspace / role, tmp_path / role)
    return {f"{role}.path": str(tmp_path / role) for role in ("student", "teacher")}


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_a_good_run_passes(workspace, tmp_path):
    results = results_of(config_of(workspace, tmp_path))
    only_failure_free = {n: r for n, r in results.items() if r.status not in (PASS, NOTICE)}
    assert set(only_failure_free) <= {"GPU memory"}, only_failure_free
    if not torch.cuda.is_available():
        assert results["GPU memory"].status == UNCHECKED and "no GPU" in results["GPU memory"].detail
    assert "8 rows" in results["answer alignment"].detail
    assert "8 of 8 sampled rows" in results["data"].detail
    assert tuple(results) == tuple(name for name in command.CHECKS if name != command.CACHE)  # there is none


def test_other_tokenizer(workspace, tmp_path, models):
    def swap(content):
        vocab = content["model"]["vocab"]
        one, other = list(vocab)[300:302]
        vocab[one], vocab[other] = vocab[other], vocab[one]

    edit(tmp_path / "teacher" / "tokenizer.json", swap)
    results = results_of(config_of(workspace, tmp_path, models))
    assert "2 tokens different ids" in results["tokenizers"].detail
    assert results["tokenizers"].status == FAILURE
    assert results["data"].status == results["disk space"].status == PASS  # not hidden by it


def test_padded_heads_are_cut_with_a_notice(workspace, tmp_path, models):
    def pad(content):
        content["text_config"]["vocab_size"] += 128

    edit(tmp_path / "teacher" / "config.json", pad)
    result = results_of(config_of(workspace, tmp_path, models))["head rows"]
    assert result.status == NOTICE and "both are cut to" in result.detail


def test_tokenizer_beyond_the_head(workspace, tmp_path, models):
    edit(tmp_path / "student" / "config.json", lambda c: c["text_config"].update(vocab_size=100))
    results = results_of(config_of(workspace, tmp_path, models))
    assert "head only 100 rows" in only_failure(results, "head rows").detail


def test_a_video_token_beyond_the_head():
    """No row has one: InternVL's tokenizer may name one that its head has no row for."""
    processor = tiny.make_processor("tiny")
    rows = len(processor.tokenizer)
    processor.tokenizer.add_tokens(["<video>"])
    text = SimpleNamespace(vocab_size=rows)
    model = SimpleNamespace(get_text_config=lambda: text)
    config = SimpleNamespace(verbalizer=SimpleNamespace(translates=False))
    subject = SimpleNamespace(
        roles=["student"], processor=lambda role: processor, model_config=lambda role: model, config=config
    )
    with pytest.raises(Failed, match=f"only {rows} rows"):
        check_heads(subject)
    processor.video_token = "<video>"
    assert check_heads(subject) == f"{rows} rows"


def test_other_chat_template(workspace, tmp_path, models):
    file = next(f for f in (tmp_path / "teacher").iterdir() if f.name == "chat_template.jinja")
    text = file.read_text()
    assert "<|im_end|>" in text
    # a template whose turns end with another token
    file.write_text(text.replace("body(message['content']) + '<|im_end|>\\n'", "body(message['content']) + '!\\n'"))
    results = results_of(config_of(workspace, tmp_path, models))
    failure = only_failure(results, "chat templates", "answer alignment")
    assert "different answer tokens" in failure.detail and "chat template" in failure.fix


def test_wrong_image_token(workspace, tmp_path, models):
    edit(tmp_path / "student" / "config.json", lambda c: c.update(image_token_id=7))
    results = results_of(config_of(workspace, tmp_path, models))
    assert "the model expects 7" in only_failure(results, "image tokens").detail


def test_wrong_patch_size(workspace, tmp_path, models):
    edit(tmp_path / "student" / "config.json", lambda c: c["vision_config"].update(patch_size=16))
    results = results_of(config_of(workspace, tmp_path, models))
    assert "patches of 8 pixels, the model takes 16" in only_failure(results, "image tokens").detail


def test_missing_dataset(workspace, tmp_path):
    missing = [{"reader": "messages", "path": str(tmp_path / "none.jsonl")}]
    results = results_of(config_of(workspace, tmp_path, {"data.train": missing}))
    failure = only_failure(results, "data")
    assert "none.jsonl" in failure.detail and "data.train[0]" in failure.fix
    assert results["answer alignment"].status == UNCHECKED


def test_unreadable_images(workspace, tmp_path):
    path = runs.make_rows(tmp_path / "data", 8)
    for i in (0, 2, 4):
        file = tmp_path / "data" / "images" / f"{i}.png"
        file.write_bytes(file.read_bytes()[:60])
    source = [{"reader": "messages", "path": str(path)}]
    results = results_of(config_of(workspace, tmp_path, {"data.train": source}))
    failure = only_failure(results, "data")
    assert "3 of 8 sampled rows cannot be used (truncated_image 3)" in failure.detail
    allowed = results_of(config_of(workspace, tmp_path, {"data.train": source, "data.max_skipped_share": 0.5}))
    assert allowed["data"].status == NOTICE and "5 of 8" in allowed["data"].detail


def test_one_bad_row_of_many_is_a_notice(workspace, tmp_path):
    path = runs.make_rows(tmp_path / "data", 8)
    Image.new("L", (1, 1)).save(tmp_path / "data" / "images" / "0.png")
    (tmp_path / "data" / "images" / "0.png").unlink()
    source = [{"reader": "messages", "path": str(path)}]
    result = results_of(config_of(workspace, tmp_path, {"data.train": source}))["data"]
    assert result.status == NOTICE and "missing_image" in result.detail


def test_surprise_is_the_binomial_tail():
    assert not data._surprising(1, 8, 0.01)  # 1 - 0.99^8 = 0.077
    assert data._surprising(2, 8, 0.01)  # 0.0027
    assert data._surprising(1, 8, 0.0) and not data._surprising(8, 8, 1.0)


def test_full_disk(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))
    results = results_of(config_of(workspace, tmp_path))
    assert "save_total_limit" in only_failure(results, "disk space").fix


def test_disk_need_is_what_the_stages_write(workspace, tmp_path):
    """Against the files of a true run; it keeps one checkpoint fewer than there may be for a moment."""
    config = config_of(workspace, tmp_path, {"training.save_steps": 1, "training.save_total_limit": 2})
    run(config)
    files = [f for f in (tmp_path / "run").rglob("*.safetensors")]
    files += list((tmp_path / "run").rglob("optimizer.pt"))
    written = sum(f.stat().st_size for f in files)
    need = machine.checkpoint_bytes(Subject(config))
    assert written < need < 1.6 * written


def test_small_gpu(workspace, tmp_path, monkeypatch):
    Properties = namedtuple("Properties", "total_memory")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties(2**30))
    subject = Subject(config_of(workspace, tmp_path))
    (result,) = command.look(subject, ("GPU memory",))
    assert result.status == FAILURE and "stage verbalize needs" in result.detail and "plan" in result.fix
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties(80 * 2**30))
    (result,) = command.look(subject, ("GPU memory",))
    assert result.status == PASS


def test_self_check_sees_a_wrong_operator(workspace, tmp_path, monkeypatch):
    import vlsi_kernels

    true = vlsi_kernels.layer_kl_matrix
    monkeypatch.setattr(vlsi_kernels, "layer_kl_matrix", lambda *a, **k: true(*a, **k) + 1e-3)
    assert "itself" in only_failure(results_of(config_of(workspace, tmp_path)), "KL self-check").detail


def test_missing_teacher_leaves_the_student_checked(workspace, tmp_path):
    results = results_of(config_of(workspace, tmp_path, {"teacher.path": str(tmp_path / "none")}))
    failure = only_failure(results, "models")
    assert "teacher" in failure.detail and str(tmp_path / "none") in failure.detail
    assert results["data"].status == PASS and results["tokenizers"].status == UNCHECKED


def test_a_run_stops_before_it_starts(workspace, tmp_path, monkeypatch):
    config = config_of(workspace, tmp_path, {"training.max_steps": 1, "sft.start_from": "base"})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))
    with pytest.raises(command.PreflightError, match="cannot start(.|\n)*disk space(.|\n)*fix:"):
        run(config, "sft")
    assert not (tmp_path / "run" / "sft" / "vlsi_stage.json").exists()
    config = config_of(workspace, tmp_path, {"training.max_steps": 1, "preflight": False, "sft.start_from": "base"})
    assert run(config, "sft")["sft"]["state"] == "finished"


def test_command(workspace, tmp_path, capsys, models):
    path = str(runs.write_config(runs.settings(workspace, tmp_path / "run"), tmp_path / "config.yaml"))
    assert main(["check", "--config", path, "--rows", "4"]) == 0
    table = capsys.readouterr().out
    assert "answer alignment" in table and "KL self-check" in table
    edit(tmp_path / "student" / "config.json", lambda c: c.update(image_token_id=7))
    changed = [f"--{name}={value}" for name, value in models.items()]
    assert main(["check", "--config", path, "--rows", "4", "--json", *changed]) == 1
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert found["image tokens"]["status"] == "FAILURE" and found["image tokens"]["fix"]
    assert main(["check", "--config", str(tmp_path / "none.yaml")]) == 2


# ---- said before anything is loaded ----


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def loaded(*arguments, **options):
        raise AssertionError("a model's files were opened")

    monkeypatch.setattr("vlsi_fast.stages.role.load_model_config", loaded)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"training.deepspeed": "nope.json"}, ConfigError, "file nope.json does not exist; configs/zero3.json"),
        ({"training.deepspeed": "README.md"}, ConfigError, "README.md is not valid JSON"),
        ({"training.report_to": ["wandb"]}, ConfigError, "the package of wandb is not installed; pip install it"),
        ({"data.eval": [{"reader": "llava", "path": "none.json"}]}, FileNotFoundError, r"data.eval\[0\]: .*none.json"),
        ({"data.eval": [{"reader": "hf", "path": "none/*.parquet"}]}, FileNotFoundError, "remove the source"),
    ],
)
def test_what_a_stage_would_miss_too_late(workspace, tmp_path, nothing_is_loaded, monkeypatch, changes, error, message):
    import transformers.integrations

    monkeypatch.chdir(runs.ROOT)
    monkeypatch.setattr(transformers.integrations, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(error, match=message):
        run(config_of(workspace, tmp_path, changes), "verbalize")


def test_sources_are_named_once_and_those_of_eval_are_opened(workspace, tmp_path):
    missing = [{"reader": "messages", "path": str(tmp_path / "none.jsonl")}]
    config = config_of(workspace, tmp_path, {"data.train": missing})
    detail = only_failure(results_of(config), "data").detail
    assert detail == f"data.train[0].path: {tmp_path / 'none.jsonl'} does not exist or is not a file"
    (tmp_path / "none.jsonl").write_text("no rows\n")
    rows = [{"reader": "messages", "path": str(workspace / "rows.jsonl")}]
    config = config_of(workspace, tmp_path, {"data.train": rows, "data.eval": rows + missing})
    detail = only_failure(results_of(config), "data").detail
    assert detail.count("data.eval[1]") == 1


def test_small_numbers_are_told_apart(workspace, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 1000))
    detail = only_failure(results_of(config_of(workspace, tmp_path)), "disk space").detail
    assert detail.startswith("1000 B free at") and "0.0" not in detail and detail.endswith("MiB")


def test_a_student_larger_than_its_teacher(workspace, tmp_path, capsys):
    swapped = {"student.path": str(workspace / "teacher"), "teacher.path": str(workspace / "student")}
    swapped |= {"student.layers": [1], "teacher.layers": [1]}
    config = config_of(workspace, tmp_path, swapped | {"training.max_steps": 1})
    result = results_of(config)["model sizes"]
    assert result.status == NOTICE and "are student.path and teacher.path swapped?" in result.detail
    run(config, "verbalize")
    assert capsys.readouterr().err.count("teacher.path swapped?") == 1
    assert results_of(config_of(workspace, tmp_path))["model sizes"].status == PASS


def test_help_needs_no_torch():
    code = "import sys; from vlsi_fast.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, env=runs.environment(), capture_output=True)
    assert done.returncode == 0, done.stderr
