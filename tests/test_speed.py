"""What keeps the device busy: the wait for data is measured, and batches are made ahead by workers that live on."""

import multiprocessing
import time

import pytest
import tiny_runs as runs
import torch

from vlsi_fast import load_config
from vlsi_fast.data import VlsiDataset
from vlsi_fast.stages import STAGE_CLASSES, leaving
from vlsi_fast.stages import trainer as stages_trainer
from vlsi_fast.stages.sft import SftModule


def start(workspace, output, stage="sft", workers=0, training=None, **sections):
    tree = runs.settings(workspace, output, **(training or {})) | {"sft": {"start_from": "base"}} | sections
    tree["data"] = tree["data"] | {"num_workers": workers}
    config = load_config(runs.write_config(tree, output.parent / f"{output.name}.yaml"))
    return STAGE_CLASSES[stage](config).run()


def slow(monkeypatch, owner, name, seconds):
    function = getattr(owner, name)

    def slower(*args, **kwargs):
        time.sleep(seconds)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, slower)


# ---- the wait for data ----


def test_wait_for_slow_rows_is_counted(workspace, tmp_path, monkeypatch):
    """Twelve rows of 0.2 s: at least 2.4 s, and no more than the stage took."""
    slow(monkeypatch, VlsiDataset, "__getitem__", 0.2)
    summary = start(workspace, tmp_path / "run")["summary"]
    records = runs.metrics(tmp_path / "run", "sft")
    waits = [record["data_wait_share"] * record["step_seconds"] for record in records]
    assert all(0 < record["data_wait_share"] < 1 for record in records)
    assert sum(waits) >= 12 * 0.2
    assert summary["data_wait_share"] == pytest.approx(sum(waits) / summary["seconds"])


def test_slow_compute_is_no_wait(workspace, tmp_path, monkeypatch):
    slow(monkeypatch, SftModule, "forward", 1.0)
    start(workspace, tmp_path / "run")
    for record in runs.metrics(tmp_path / "run", "sft"):
        assert (1 - record["data_wait_share"]) * record["step_seconds"] > 1.0


def test_workers_take_the_wait_away_and_end_with_the_stage(workspace, tmp_path, monkeypatch):
    """Rows are loaded while the step before computes; two epochs, one set of workers."""
    slow(monkeypatch, VlsiDataset, "__getitem__", 0.1)
    slow(monkeypatch, SftModule, "forward", 0.5)
    started, begin = [], multiprocessing.Process.start

    def counted(self):
        started.append(self)
        begin(self)

    monkeypatch.setattr("multiprocessing.process.BaseProcess.start", counted)
    training = {"max_steps": -1, "num_train_epochs": 2}
    data = runs.settings(workspace, tmp_path)["data"]
    data["train"][0]["limit"] = 12
    start(workspace, tmp_path / "run", workers=2, training=training, data=data)
    records = runs.metrics(tmp_path / "run", "sft")
    assert len(records) == 6 and len(started) == 2
    waits = [record["data_wait_share"] * record["step_seconds"] for record in records]
    assert sum(waits[1:3] + waits[4:]) < 4 * 4 * 0.1 / 2  # without workers: 0.4 s a step
    deadline = time.time() + 60
    while any(process.is_alive() for process in started):
        assert time.time() < deadline, "the stage's workers are still alive"
        time.sleep(0.1)


def test_wait_is_the_mean_over_ranks(workspace, tmp_path, monkeypatch):
    """A second rank that waited 0.25 s in each step."""
    steps, waited = [], -5 - leaving.WISHES  # of two ranks: the wait, four peaks, the wishes

    def reduce_with_another_rank(total):
        if total.dim():  # the step's sums, not the count of answer tokens
            steps.append(float(total[waited]))
            total[waited] += 0.25

    start_records = stages_trainer.StageTrainer._finish_step

    def two_ranks(self):
        with monkeypatch.context() as patch:
            patch.setattr(stages_trainer, "world_size", lambda: 2)
            patch.setattr(torch.distributed, "all_reduce", reduce_with_another_rank)
            start_records(self)

    monkeypatch.setattr(stages_trainer.StageTrainer, "_finish_step", two_ranks)
    start(workspace, tmp_path / "run")
    found = [r["data_wait_share"] * r["step_seconds"] for r in runs.metrics(tmp_path / "run", "sft")]
    assert found == pytest.approx([(own + 0.25) / 2 for own in steps])
