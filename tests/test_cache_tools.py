"""`check`, `inspect`, `report` and `export` on runs whose teacher is on disk, and nowhere else."""

import json
import shutil

import pytest
import tiny_runs as runs
from safetensors.torch import load_file, save_file

from vlsi_fast import load_config, run
from vlsi_fast.cli import main
from vlsi_fast.inspection.folders import inspect_folder
from vlsi_fast.planner.checks import command
from vlsi_fast.planner.checks.command import PreflightError
from vlsi_fast.planner.checks.subject import FAILURE, NOTICE, PASS, UNCHECKED, Subject
from vlsi_fast.stages import STAGE_CLASSES
from vlsi_fast.teacher_cache.build import Chosen, build
from vlsi_fast.teacher_cache.store import CacheReader


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run that was verbalized, its cache in int8, and stage interact from it; then the teacher was deleted."""
    folder = tmp_path_factory.mktemp("learned")
    runs.make_models(folder)
    runs.make_rows(folder)
    tree = runs.settings(folder, folder / "run", save_steps=3)
    path = runs.write_config(tree, folder / "config.json")
    config = load_config(path)
    STAGE_CLASSES["verbalize"](config).run()
    build(config, Chosen(numbers="int8", progress=False))
    run(load_config(path, {"teacher.mode": "cached"}), "interact")
    tree["teacher"]["mode"] = "cached"
    runs.write_config(tree, path)
    shutil.move(folder / "teacher", folder / "elsewhere")
    return folder


@pytest.fixture
def copy(learned, tmp_path):
    """Its config on a copy of its results; the models are the same ones."""
    shutil.copytree(learned / "run", tmp_path / "run")
    tree = json.loads((learned / "config.json").read_text()) | {"output_dir": str(tmp_path / "run")}
    tree["stages"], tree["student"]["verbalizers"] = ["interact"], str(tmp_path / "run" / "verbalize" / "student")
    return runs.write_config(tree, tmp_path / "config.json")


def looked(path, **changes):
    config = load_config(path, changes)
    return {each.name: each for each in command.look(Subject(config, tuple(config.stages), rows=8))}


# ---- check ----


def test_a_run_without_its_teacher_passes(copy):
    results = looked(copy)
    assert all(each.status in (PASS, NOTICE) for each in results.values() if each.name != "GPU memory"), results
    # 3 steps of 4 rows
    assert results[command.CACHE].detail.startswith("12 of 12 sampled rows that interact reads are in")
    assert "5 target layers" in results["models"].detail and results["answer alignment"].status == PASS


def test_the_device_without_a_teacher(copy, capsys):
    assert main(["check", "--config", str(copy), "--rows", "2", "--json", "--device"]) == 0
    lines = {line["name"]: line["status"] for line in json.loads(capsys.readouterr().out)}
    assert lines["device: layer_kl_matrix, widths 32 and 32"] == "pass" and set(lines.values()) <= {
        "pass",
        "not checked",
    }
    assert not any("48" in name for name in lines)  # the teacher's width


def test_rows_that_are_not_there_are_counted(copy):
    found = looked(copy, **{"training.max_steps": 9})[command.CACHE]
    assert found.status == FAILURE and "12 of 36 sampled rows" in found.detail
    assert "`vlsi-fast teacher build`" in found.fix and "first that is not: rows.jsonl#" in found.detail
    config = load_config(copy, {"training.max_steps": 9})
    shutil.rmtree(config.stage_dir("interact"))
    with pytest.raises(PreflightError, match=r"teacher's cache(?s:.*)12 of 36 *│?\s*sampled"):  # before any weight
        run(config, "interact")


def test_a_cache_that_is_not_there_or_of_something_else(copy, tmp_path):
    found = looked(copy, **{"teacher.cache": str(tmp_path / "none")})
    assert found[command.CACHE].status == FAILURE and "holds no cache" in found[command.CACHE].detail
    assert "teacher build" in found[command.CACHE].fix and found["data"].status == PASS
    found = looked(copy, **{"interact.temperature": 2.0})[command.CACHE]
    assert found.status == FAILURE and "interact.temperature: 1.0 in the cache, 2.0 in this run" in found.detail
    other = shutil.copytree(load_config(copy).student.path, tmp_path / "student")
    weights = load_file(other / "model.safetensors")
    head = next(name for name in weights if "embed_tokens" in name)  # tied
    weights[head] += 0.1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    found = looked(copy, **{"student.path": str(other)})[command.CACHE]
    assert found.status == FAILURE and "the student's language head" in found.detail


def test_a_cut_shard_is_found(copy, tmp_path):
    (shard,) = (tmp_path / "run" / "teacher_cache" / "shards").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-8])
    found = looked(copy)[command.CACHE]
    assert found.status == FAILURE and "1 problems" in found.detail and "teacher build" in found.fix


def test_the_cache_is_looked_at_only_where_it_is_read(copy, learned):
    assert command.CACHE not in looked(learned / "config.json", **{"teacher.mode": "auto"})
    assert command.CACHE not in looked(copy, stages=["sft"], **{"sft.start_from": "base"})
    # stage verbalize needs the teacher itself
    results = looked(learned / "config.json")
    assert results["models"].status == FAILURE and results["answer alignment"].status == UNCHECKED


# ---- inspect ----


def test_inspect_a_cache(copy, learned, tmp_path, capsys):
    cache = tmp_path / "run" / "teacher_cache"
    found = inspect_folder(cache)
    assert (found["kind"], found["form"], found["numbers"]) == ("teacher's cache", "targets", "int8")
    assert found["layers"] == [1, 2, 3, 4, 5] and found["last_layer"] and found["problems"] == []
    reader = CacheReader(cache)
    assert found["rows"] == len(reader) == 12 and found["refused"] == 0
    assert found["cache_bytes"] == sum(file.stat().st_size for file in (cache / "shards").glob("*.safetensors"))
    # 6 layers of 32 numbers, a scale and an entropy
    assert found["answer_tokens"] * 6 * (6 + 32) < found["cache_bytes"] < found["answer_tokens"] * 6 * (6 + 32) + 4000
    assert 0 < found["rounding"]["kl_mean"] < found["rounding"]["kl_max"]
    now = {each["role"]: each["now"] for each in found["parents"]}
    assert now == {
        "teacher": "not found from here",
        "teacher_verbalizers": "there, the same",
        "student's head": "there, the same",
    }
    assert main(["inspect", str(cache)]) == 0
    assert "teacher's cache" in capsys.readouterr().out
    shutil.rmtree(cache / "shards")
    (cache / "teacher" / "config.json").unlink()
    assert main(["inspect", str(cache)]) == 1
    assert "config.json is missing" in capsys.readouterr().out
    (cache / "manifest.json").write_text("{")
    assert "is damaged" in inspect_folder(cache)["problems"][0]["what"]


def test_what_a_cache_was_made_for_may_change(learned, tmp_path):
    """Another teacher, verbalizers and student in their places."""
    folder = shutil.copytree(learned, tmp_path / "moved")
    manifest = folder / "run" / "teacher_cache" / "manifest.json"
    tree = json.loads(manifest.read_text().replace(str(learned), str(folder)))
    manifest.write_text(json.dumps(tree))
    shutil.copytree(folder / "student", folder / "teacher")
    shutil.rmtree(folder / "run" / "verbalize" / "teacher")
    shutil.copytree(folder / "run" / "verbalize" / "student", folder / "run" / "verbalize" / "teacher")
    shutil.rmtree(folder / "student")
    shutil.copytree(folder / "elsewhere", folder / "student")
    found = inspect_folder(folder / "run" / "teacher_cache")
    assert {each["now"] for each in found["parents"]} == {"there, but CHANGED since"}


def test_inspect_a_run_from_a_cache(copy, tmp_path):
    found = inspect_folder(tmp_path / "run")
    assert found["teacher_cache"] == {
        "path": str(tmp_path / "run" / "teacher_cache"),
        "form": "targets",
        "numbers": "int8",
        "rows": 12,
        "answer_tokens": found["teacher_cache"]["answer_tokens"],
        "cache_bytes": found["teacher_cache"]["cache_bytes"],
    }
    assert found["problems"] == []
    parents = {each["role"]: each["now"] for each in found["stages"]["interact"]["parents"]}
    assert parents["teacher"] == "not found from here" and parents["teacher_verbalizers"] == "there, the same"


# ---- report and export ----


def test_report_and_export_without_the_teacher(copy, tmp_path):
    folder = tmp_path / "run"
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert "int8" in (tmp_path / "page.html").read_text()
    assert main(["export", "--run", str(folder), "--out", str(tmp_path / "exported"), "--license", "mit"]) == 0
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "kept on disk, int8" in card and "distill" in card
