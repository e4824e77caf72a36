"""Runs that end before their last step, and go on: SIGTERM, hours that are over; checkpoints by the clock."""

import os
import signal

import pytest
import tiny_runs as runs
import torch
from safetensors.torch import load_file
from test_stages import start

from vlsi_fast.config import ConfigError
from vlsi_fast.errors import StoppedEarly
from vlsi_fast.lineage import read_record
from vlsi_fast.ranks import watch
from vlsi_fast.stages.leaving import Leaving

SFT = {"start_from": "base"}


def checkpoints(folder) -> list[str]:
    return sorted(path.name for path in (folder / "sft").glob("checkpoint-*"))


def same_result(a, b) -> bool:
    """Losses and weights."""
    weights = [load_file(folder / "sft" / "student" / "model.safetensors") for folder in (a, b)]
    return runs.losses(a, "sft") == runs.losses(b, "sft") and all(
        torch.equal(weight, weights[1][name]) for name, weight in weights[0].items()
    )


@pytest.fixture(scope="module")
def whole(workspace, tmp_path_factory):
    """A run of three steps that nothing stops."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    start(workspace, folder, "sft", sft=SFT)
    return folder


def test_sigterm_saves_and_the_run_goes_on(workspace, whole, tmp_path, monkeypatch):
    wishes = Leaving.wishes

    def asked(self):
        assert signal.getsignal(signal.SIGTERM) is watch._noted  # else this would end the tests
        os.kill(os.getpid(), signal.SIGTERM)
        return wishes(self)

    monkeypatch.setattr(Leaving, "wishes", asked)
    with pytest.raises(StoppedEarly, match=r"stage sft after optimizer step 1 of 3, since it was asked .*--resume"):
        start(workspace, tmp_path / "run", "sft", sft=SFT)
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert checkpoints(tmp_path / "run") == ["checkpoint-1"]
    assert read_record(tmp_path / "run" / "sft")["state"] == "running"
    start(workspace, tmp_path / "run", "sft", resume=True, sft=SFT)
    assert same_result(tmp_path / "run", whole)


def test_a_run_ends_when_its_hours_are_over(workspace, whole, tmp_path):
    for made in (1, 2):
        with pytest.raises(StoppedEarly, match=rf"step {made} of 3, since its time is over \(max_hours\)"):
            start(workspace, tmp_path / "run", "sft", made > 1, sft=SFT, max_hours=1e-9)
    start(workspace, tmp_path / "run", "sft", resume=True, sft=SFT)  # another limit is no other run
    assert same_result(tmp_path / "run", whole)
    with pytest.raises(StoppedEarly, match="stage verbalize after optimizer step 1 "):
        start(workspace, tmp_path / "all", max_hours=1e-9)
    assert read_record(tmp_path / "all" / "verbalize")["state"] == "running"
    assert not (tmp_path / "all" / "interact").exists()


def test_the_last_step_is_no_early_end(workspace, whole, tmp_path):
    training = {"max_steps": 1}
    start(workspace, tmp_path / "run", "sft", training=training, sft=SFT, max_hours=1e-9)
    assert read_record(tmp_path / "run" / "sft")["state"] == "finished"


def test_checkpoints_by_the_clock(workspace, tmp_path):
    for name, minutes, expected in (("often", 1e-9, [1, 2, 3]), ("never", None, [3])):
        training = {"save_minutes": minutes, "save_total_limit": None}
        start(workspace, tmp_path / name, "sft", training=training, sft=SFT)
        assert checkpoints(tmp_path / name) == [f"checkpoint-{step}" for step in expected]


def test_another_way_to_stop_is_refused(workspace, tmp_path):
    with pytest.raises(ConfigError, match="enable_jit_checkpoint"):
        start(workspace, tmp_path / "run", training={"extra": {"enable_jit_checkpoint": True}})


def test_a_trainer_that_ends_by_itself_has_not_finished(workspace, tmp_path, monkeypatch):
    def stop(self, args, state, control, **kwargs):
        control.should_training_stop = True

    monkeypatch.setattr(Leaving, "on_step_end", stop)
    with pytest.raises(StoppedEarly, match="step 1 of 3, since the Trainer ended"):
        start(workspace, tmp_path / "run", "sft", sft=SFT)
    assert read_record(tmp_path / "run" / "sft")["state"] == "running"
