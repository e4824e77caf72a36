"""A tracker's run for each stage: named, grouped, closed however the stage ends. Tensorboard is real, others fake."""

import json
import os
import sys

import pytest
import tiny_runs as runs
from test_stages import start
from transformers.integrations import MLflowCallback, TensorBoardCallback

from vlsi_fast.errors import StoppedEarly
from vlsi_fast.stages import trackers
from vlsi_fast.stages.trainer import StageTrainer

WANDB = """
import os
from types import SimpleNamespace
run, config, told = None, {}, []
def init(**options):
    global run
    assert run is None, "a run is open already"
    run = SimpleNamespace(summary={}, _label=lambda **k: None, name=options.get("name"))
    told.append(("init", options["name"], os.environ["WANDB_RUN_GROUP"]))
def log(numbers):
    told.append(("log", run.name, numbers))
def finish(exit_code=None):
    global run
    told.append(("finish", run.name, exit_code))
    run = None
class Config(dict):
    def update(self, other, allow_val_change=False):
        super().update(other)
config = Config()
"""
MLFLOW = """
from types import SimpleNamespace
__version__ = "2.0.0"
utils = SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=250, MAX_PARAMS_TAGS_PER_BATCH=100))
told, _run = [], None
def is_tracking_uri_set(): return True
def get_tracking_uri(): return "here"
def active_run(): return _run
def log_params(params): pass
def log_metrics(metrics, step): told.append(("log", _run.name, step))
def start_run(run_name, nested):
    global _run
    assert _run is None, "a run is open already"
    _run = SimpleNamespace(name=run_name, info=SimpleNamespace(run_id=1))
    told.append(("start", run_name))
def end_run(status="FINISHED"):
    global _run
    told.append(("end", _run.name, status))
    _run = None
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Makes a package of that name and source; gives the module."""
    monkeypatch.setenv("WANDB_DISABLED", "")
    made = []

    def make(name: str, source: str):
        folder = tmp_path / "packages" / name
        (folder / "sdk" / "lib").mkdir(parents=True)
        (folder / "__init__.py").write_text(source)
        (folder / "sdk" / "lib" / "config_util.py").write_text("class ConfigError: pass\n")  # WandbCallback imports it
        monkeypatch.syspath_prepend(tmp_path / "packages")
        made.append(name)
        __import__(name)
        return sys.modules[name]

    yield make
    for name in [each for each in sys.modules if each.split(".")[0] in made]:
        del sys.modules[name]


def data_of(workspace) -> dict:
    return {"eval": [{"reader": "messages", "path": str(workspace / "rows.jsonl"), "limit": 3}]}


def test_each_stage_has_a_run_of_its_own(workspace, tmp_path, fake):
    wandb = fake("wandb", WANDB)
    training = {"report_to": ["wandb"], "max_steps": 2, "eval_steps": 2}
    start(workspace, tmp_path / "mine", training=training, data=data_of(workspace))
    names = ["mine-verbalize", "mine-interact", "mine-sft"]
    assert [told for told in wandb.told if told[0] == "init"] == [("init", name, "mine") for name in names]
    assert [told for told in wandb.told if told[0] == "finish"] == [("finish", name, 0) for name in names]
    kinds = [(kind, name) for kind, name, _ in wandb.told]
    assert kinds == sorted(kinds, key=lambda each: names.index(each[1]))  # none tells after the next has begun
    logged = {name: {} for name in names}
    for kind, name, numbers in wandb.told:
        logged[name] |= numbers if kind == "log" else {}
    assert "eval/exact_match" in logged["mine-sft"] and "eval/exact_match" not in logged["mine-verbalize"]
    assert "eval/loss/last" in logged["mine-interact"] and "train/loss/last" in logged["mine-interact"]
    assert "WANDB_RUN_GROUP" not in os.environ


def test_a_run_is_closed_where_the_stage_ends_before_its_time(workspace, tmp_path, fake, monkeypatch):
    wandb = fake("wandb", WANDB)
    options = {"report_to": ["wandb", "tensorboard"], "extra": {"run_name": "named"}}
    with pytest.raises(StoppedEarly):
        start(workspace, tmp_path / "early", "sft", training=options, sft={"start_from": "base"}, max_hours=1e-9)
    assert wandb.told[-1] == ("finish", "named-sft", 0)

    def fail(self):
        raise RuntimeError("broken")

    begin, begun = TensorBoardCallback.on_train_begin, []
    monkeypatch.setattr(
        TensorBoardCallback, "on_train_begin", lambda self, *a, **k: (begun.append(self), begin(self, *a, **k))[1]
    )
    monkeypatch.setattr(StageTrainer, "_finish_step", fail)
    with pytest.raises(RuntimeError, match="broken"):
        start(workspace, tmp_path / "failed", "sft", training=options, sft={"start_from": "base"})
    assert wandb.told[-1] == ("finish", "named-sft", 1) and wandb.run is None
    assert [callback.tb_writer for callback in begun] == [None]


def test_a_run_that_was_open_before_stays_open(workspace, tmp_path, fake, monkeypatch):
    wandb = fake("wandb", WANDB)
    monkeypatch.setenv("WANDB_RUN_GROUP", "theirs")
    wandb.init(name="notebook")
    training = {"report_to": ["wandb"], "max_steps": 1}
    start(workspace, tmp_path / "run", "sft", training=training, sft={"start_from": "base"})
    assert wandb.run.name == "notebook" and {told[0] for told in wandb.told[1:]} == {"log"}
    assert os.environ["WANDB_RUN_GROUP"] == "theirs"


def test_mlflow_closes_no_run_but_its_own(workspace, tmp_path, fake, monkeypatch):
    """transformers' callback ends whatever run is open when it is deleted: that may be the next stage's."""
    mlflow = fake("mlflow", MLFLOW)
    begin, kept = MLflowCallback.on_train_begin, []
    monkeypatch.setattr(
        MLflowCallback, "on_train_begin", lambda self, *a, **k: (kept.append(self), begin(self, *a, **k))[1]
    )
    training = {"report_to": ["mlflow"], "max_steps": 1}
    for name in ("one", "two"):
        start(workspace, tmp_path / name, "sft", training=training, sft={"start_from": "base"})
    assert [told for told in mlflow.told if told[0] != "log"] == [
        ("start", "one-sft"),
        ("end", "one-sft", "FINISHED"),
        ("start", "two-sft"),
        ("end", "two-sft", "FINISHED"),
    ]
    mlflow.start_run("of someone else", False)
    for callback in kept:
        callback.__del__()
    assert mlflow.active_run() is not None
    mlflow.end_run()
    monkeypatch.setattr(StageTrainer, "_finish_step", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        start(workspace, tmp_path / "failed", "sft", training=training, sft={"start_from": "base"})
    assert mlflow.told[-1] == ("end", "failed-sft", "FAILED")


def test_a_tracker_that_cannot_close_does_not_hide_the_error(fake, capfd):
    wandb = fake("wandb", WANDB + "\ndef finish(exit_code): raise OSError('no network')\n")
    with pytest.raises(ValueError, match="the real one"), trackers.tracked([], "group"):
        wandb.init(name="run")
        raise ValueError("the real one")
    assert "wandb could not close its run: OSError: no network" in capfd.readouterr().err


def test_a_module_that_only_bears_the_name_is_left_alone(fake):
    fake("wandb", "")
    with trackers.tracked([], "group"):
        pass


def test_tensorboard_has_the_evaluations(workspace, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    training = {"report_to": ["tensorboard"], "eval_steps": 2}
    start(workspace, tmp_path / "run", "sft", training=training, sft={"start_from": "base"}, data=data_of(workspace))
    events = EventAccumulator(str(tmp_path / "run" / "sft" / "tensorboard"))
    events.Reload()
    lines = (tmp_path / "run" / "sft" / "eval.jsonl").read_text().splitlines()
    told = [(event.step, event.value) for event in events.Scalars("eval/loss")]
    assert told == [(r["step"], pytest.approx(r["loss"])) for r in map(json.loads, lines)]
    assert [step for step, _ in told] == [2, 3]
    assert len(events.Scalars("train/loss")) == len(runs.losses(tmp_path / "run", "sft")) == 3
