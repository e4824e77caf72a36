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


def test_no_run_and_a_newer_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run"):
        open_run(tmp_path)
    record(tmp_path, "sft")
    path = tmp_path / "sft" / "vlsi_stage.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(ConfigError, match="update vlsi-fast"):
        open_run(tmp_path)
