"""`vlsi-fast inspect`: every kind of folder, whole and damaged, without torch and never with a traceback."""

import json
import shutil
import subprocess
import sys

import pytest
import tiny_families as families
import tiny_runs as runs
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from vlsi_fast import load_config, run
from vlsi_fast.cli import main
from vlsi_fast.config_data import DataConfig
from vlsi_fast.data.build import build
from vlsi_fast.inspection.folders import inspect_folder
from vlsi_fast.verbalizer import Verbalizers


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of all stages, two steps each."""
    folder = tmp_path_factory.mktemp("inspect")
    runs.make_models(folder)
    runs.make_rows(folder, 12)
    tree = runs.settings(folder, folder / "run", max_steps=2, save_steps=1)
    run(load_config(runs.write_config(tree, folder / "config.json")), "all")
    return folder / "run"


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def show(folder, capsys) -> tuple[int, str]:
    """Exit code and the words printed."""
    code = main(["inspect", str(folder)])
    printed = capsys.readouterr()
    return code, " ".join((printed.out + printed.err).split())


def test_a_run_without_torch(finished):
    code = "import sys; from vlsi_fast.cli import main; code = main(['inspect', sys.argv[1], '--json']); "
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules; sys.exit(code)"
    command = [sys.executable, "-c", code, str(finished)]
    done = subprocess.run(command, env=runs.environment(), text=True, capture_output=True, timeout=runs.LIMIT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kind"] == "run" and list(found["stages"]) == ["verbalize", "interact", "sft"]
    assert "all stages are finished" in found["next"] and found["problems"] == []
    for name, stage in found["stages"].items():
        assert (stage["state"], stage["steps"], stage["of"], stage["ranks"]) == ("finished", 2, 2, 1)
        assert stage["last_step"]["loss"] == pytest.approx(runs.losses(finished, name)[-1])
        assert {each["now"] for each in stage["parents"]} == {"there, the same"}
    settings = found["settings"]
    assert settings["lora.rank"] == 8 and settings["student.layers"] == [1, 2, 3]
    assert "seed" not in settings and "verbalize.training" not in settings  # the defaults
    parents = {each["role"] for each in found["stages"]["interact"]["parents"]}
    assert parents == {"student", "teacher", "student_verbalizers", "teacher_verbalizers"}


def test_parts_of_a_run(finished, capsys):
    """Parameters counted from headers are those of the modules that the folders make."""
    student = AutoModelForImageTextToText.from_pretrained(finished / "sft" / "student")
    found = inspect_folder(finished / "sft" / "student")
    count = sum(p.numel() for p in student.parameters())
    assert (found["kind"], found["parameters"], found["dtype"]) == ("checkpoint", count, "F32")
    vision = sum(p.numel() for p in student.model.visual.parameters())
    assert found["parts"]["vision"] == vision and sum(found["parts"].values()) == count
    assert "stage sft" in found["made_by"] and found["problems"] == []
    verbalizers = Verbalizers.from_pretrained(finished / "verbalize" / "teacher")
    found = inspect_folder(finished / "verbalize" / "teacher")
    assert found["kind"] == "verbalizers" and found["layers"] == [1, 2, 3, 4, 5]
    assert found["parameters"] == sum(p.numel() for p in verbalizers.parameters())
    found = inspect_folder(finished / "interact" / "adapter")
    assert (found["kind"], found["rank"], found["base_now"]) == ("adapter", 8, "there")
    found = inspect_folder(finished / "interact" / "checkpoint-2")
    assert (found["kind"], found["step"], found["of"], found["engine"]) == ("training checkpoint", 2, 2, "plain")
    assert found["trained_parameters"] == inspect_folder(finished / "interact" / "adapter")["parameters"]
    for path in ("", "interact", "interact/checkpoint-1", "interact/adapter", "sft/student", "verbalize/student"):
        code, words = show(finished / path, capsys)
        assert code == 0 and "problem" not in words, path


@pytest.mark.parametrize("model_type", families.FAMILIES)
def test_every_family(model_type, tmp_path):
    families.save(tmp_path, model_type, layers=3)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="30KB")
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    found = inspect_folder(tmp_path)
    assert found["problems"] == [] and found["files"] > 1
    assert (found["decoder_layers"], found["dtype"]) == (3, "BF16")
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["parts"]["head"] == model.lm_head.weight.numel()
    language = [*model.get_decoder().parameters(), model.lm_head.weight]
    assert found["parts"]["vision"] == found["parameters"] - sum(p.numel() for p in language)


def test_what_is_resumable(copy, capsys):
    path = copy / "interact" / "vlsi_stage.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"state": "running", "summary": {}}))
    (copy / "interact" / "metrics.jsonl").open("a").write('{"step": 3, "lo')  # being written
    code, words = show(copy / "interact", capsys)
    assert code == 0 and "--resume goes on after step 2" in words and "4 rows a step must stay" in words
    assert "--stage interact --resume" in inspect_folder(copy)["next"]
    assert "--resume goes on from here" in show(copy / "interact" / "checkpoint-2", capsys)[1]
    damaged = copy / "interact" / "checkpoint-2"
    (damaged / "trainer_state.json").unlink()
    assert "--resume goes on after step 1" in show(copy / "interact", capsys)[1]
    code, words = show(copy / "interact" / "checkpoint-2", capsys)
    assert code == 1 and "is incomplete" in words and "checkpoint-1 and removes this one" in words
    shutil.rmtree(copy / "interact" / "checkpoint-1")
    assert "every checkpoint is damaged" in show(copy / "interact", capsys)[1]
    (damaged / "manifest.json").unlink()
    assert "starts from step 0" in show(copy / "interact", capsys)[1]
    assert "the run ended while writing it" in show(damaged, capsys)[1]


def damage(path, text=None):
    """Cut a file off in its middle, or put something else there."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if text is None else text.encode())


DAMAGES = {
    "no student": ("interact", lambda f: shutil.rmtree(f / "student"), "makes it again from the adapter"),
    "no adapter": ("interact", lambda f: shutil.rmtree(f / "adapter"), "adapter is missing"),
    "no verbalizers": ("verbalize", lambda f: shutil.rmtree(f / "teacher"), "run --stage verbalize again"),
    "cut weights": ("sft", lambda f: damage(f / "student" / "model.safetensors"), "is damaged or cut off"),
    "no weights": ("sft", lambda f: (f / "student" / "model.safetensors").unlink(), "holds no *.safetensors"),
    "cut config": ("sft", lambda f: damage(f / "student" / "config.json"), "config.json is damaged"),
    "no tokenizer": ("sft", lambda f: (f / "student" / "tokenizer.json").unlink(), "has no tokenizer"),
    "cut adapter": ("interact", lambda f: damage(f / "adapter" / "adapter_model.safetensors"), "cut off"),
    "cut record": ("sft", lambda f: damage(f / "vlsi_stage.json"), "vlsi_stage.json is damaged"),
    "no record": ("sft", lambda f: (f / "vlsi_stage.json").unlink(), "vlsi_stage.json is missing"),
    "odd record": ("sft", lambda f: damage(f / "vlsi_stage.json", '{"facts": 3}'), "not as this version writes"),
    "bad line": ("sft", lambda f: damage(f / "metrics.jsonl", "{\n{}\n"), "line 1 is damaged"),
    "spec": ("verbalize", lambda f: damage(f / "student" / "verbalizer_config.json", '{"layers": [1]}'), "says [1]"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damages_are_named_with_a_fix(name, copy, capsys):
    stage, spoil, said = DAMAGES[name]
    spoil(copy / stage)
    for folder in (copy / stage, copy):  # the run shows its stages' problems
        code, words = show(folder, capsys)
        assert code == 1 and said in words and "fix: " in words, words


def test_changed_and_lost_parents_are_told(copy, capsys):
    record = json.loads((copy / "sft" / "vlsi_stage.json").read_text())
    record["facts"]["student"]["path"] = "moved/away"
    (copy / "sft" / "vlsi_stage.json").write_text(json.dumps(record))
    config = copy / "interact" / "student" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token_id": 1}))
    states = {each["role"]: each["now"] for each in inspect_folder(copy / "sft")["parents"]}
    assert states == {"student": "not found from here", "distilled student": "there, but CHANGED since"}


def test_a_missing_shard_and_a_missing_layer(tmp_path):
    families.save(tmp_path, "qwen2_vl")
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: value for name, value in weights.items() if ".layers.2." not in name}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    (only,) = inspect_folder(tmp_path)["problems"]
    assert "holds 3 decoder layers, its config says 4" in only["what"]
    AutoModelForImageTextToText.from_pretrained(tmp_path).save_pretrained(tmp_path, max_shard_size="60KB")
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    assert inspect_folder(tmp_path)["problems"] == []
    lost = sorted(tmp_path.glob("model-*.safetensors"))[0]
    lost.unlink()
    assert [each["what"] for each in inspect_folder(tmp_path)["problems"]] == [f"{lost} is missing"]


def test_built_data(tmp_path, capsys):
    rows = runs.make_rows(tmp_path / "in", 6)
    config = DataConfig(train=[{"reader": "messages", "path": str(rows), "name": "dots"}])
    build(config, tmp_path / "out", 10**6)
    found = inspect_folder(tmp_path / "out")
    assert (found["kind"], found["rows"], found["shards"], found["problems"]) == ("data", 6, 1, [])
    assert found["sources"] == [{"source": "dots", "rows": 6, "read": 6, "shards": 1}]
    shard = next((tmp_path / "out").rglob("*.parquet"))
    damage(shard)
    code, words = show(tmp_path / "out", capsys)
    assert code == 1 and "bytes" in words and "build it again" in words
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "build.jsonl").write_text("{}\n")
    assert "the build is not finished" in show(tmp_path / "out", capsys)[1]


def test_folders_that_hold_nothing_known(finished, tmp_path, capsys):
    code, words = show(tmp_path, capsys)
    assert code == 2 and "holds nothing that vlsi-fast or transformers writes" in words
    shutil.copytree(finished / "interact" / "adapter", tmp_path / "lora")
    assert f"look at {tmp_path / 'lora'}" in show(tmp_path, capsys)[1]
    assert show(tmp_path / "none", capsys) == (2, f"vlsi-fast: {tmp_path / 'none'} does not exist")
    assert "give the folder that it is in" in show(finished / "sft" / "metrics.jsonl", capsys)[1]
