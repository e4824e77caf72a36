"""A run's folder as tools read it."""

import json

import pytest

from vlsi_fast.config import ConfigError
from vlsi_fast.lineage import write_record
from vlsi_fast.runs import open_run

CONFIG = {"output_dir": "x", "teacher": {"path": "big"}, "student": {"path": "small"}, "data": {"train": []}}


def record(folder, stage, state="finished", **config):
    write_record(folder / stage, {"stage": stage, "state": state, "config": CONFIG | config})


def test_the_student_is_that_of_the_last_finished_stage(tmp_path):
    record(tmp_path, "verbalize")
    with pytest.raises(FileNotFoundError, match="--stage interact"):
        open_run(tmp_path).student  # noqa: B018
    record(tmp_path, "interact")
    record(tmp_path, "sft", state="running")
    run = open_run(tmp_path)
    assert run.student == tmp_path / "interact" / "student" and run.last_stage == "sft"
    record(tmp_path, "sft")
    assert open_run(tmp_path / "sft").student == tmp_path / "sft" / "student"  # a stage's folder names its run
    assert run.base("teacher") == "big"


def test_the_stages_behind_a_student(tmp_path):
    for stage in ("verbalize", "interact"):
        record(tmp_path, stage, interact={"intermediate": "kld", "headless": False})
    record(tmp_path, "sft", sft={"start_from": "interact"})
    run = open_run(tmp_path)
    assert run.stages_behind("sft") == ["verbalize", "interact", "sft"]
    assert run.stages_behind("interact") == ["verbalize", "interact"]
    assert run.student_of("interact") == tmp_path / "interact" / "student"
    with pytest.raises(FileNotFoundError, match="makes no student"):
        run.student_of("verbalize")
    record(tmp_path, "interact", state="running", interact={"intermediate": "none", "headless": False})
    record(tmp_path, "sft", sft={"start_from": "base"})
    run = open_run(tmp_path)
    assert run.stages_behind("sft") == ["sft"] and run.stages_behind("interact") == ["interact"]
    with pytest.raises(FileNotFoundError, match="is not finished"):
        run.student_of("interact")


def test_verbalizers_are_those_named_or_the_runs_own(tmp_path):
    record(tmp_path, "interact", teacher={"path": "big", "verbalizers": str(tmp_path / "elsewhere")})
    (tmp_path / "elsewhere").mkdir()
    run = open_run(tmp_path)
    assert run.verbalizers("teacher") == tmp_path / "elsewhere"
    with pytest.raises(FileNotFoundError, match="--stage verbalize"):
        run.verbalizers("student")


def test_a_cut_off_line_of_metrics_is_left_out(tmp_path):
    record(tmp_path, "sft")
    (tmp_path / "sft" / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert open_run(tmp_path).metrics("sft") == [{"step": 1}] and open_run(tmp_path).metrics("interact") == []


def test_a_damaged_record_says_what_to_do(tmp_path):
    record(tmp_path, "sft")
    path = tmp_path / "sft" / "vlsi_stage.json"
    for text in (path.read_text()[:40], "[]"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="restore it from a copy, or delete"):
            open_run(tmp_path)


def test_no_run_and_a_newer_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        open_run(tmp_path)
    record(tmp_path, "sft")
    path = tmp_path / "sft" / "vlsi_stage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(ConfigError, match="update vlsi-fast"):
        open_run(tmp_path)
