"""How often a training step waits for the device: once, for the numbers that it logs."""

import contextlib

import pytest
import tiny_families
import tiny_runs as runs
import torch
from accelerate.state import AcceleratorState, PartialState
from device_waits import DEVICE, FakeDevice
from transformers import TrainingArguments

from vlsi_fast import run
from vlsi_fast.config import RunConfig
from vlsi_fast.stages.trainer import StageTrainer

STEPS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models with verbalizers, and rows."""
    folder = tmp_path_factory.mktemp("waits")
    runs.make_rows(folder)
    tiny_families.save(folder / "teacher", "qwen2_vl", hidden=48, layers=6, seed=1)
    tiny_families.save(folder / "student", "qwen2_vl", hidden=32, layers=4, seed=2)
    run(config_of(folder), "verbalize")
    return folder


def config_of(folder, padding_free=True):
    settings = runs.settings(folder, folder / "out", max_steps=STEPS, max_grad_norm=0)
    settings |= {"impl": "torch", "liger": False, "matching": {"strategy": "multinomial"}}
    settings["data"]["padding_free"] = padding_free
    return RunConfig.model_validate(settings)


@pytest.fixture
def device(monkeypatch):
    """A `FakeDevice` on which the training loop, and it alone, runs."""
    device, inside = FakeDevice(), []
    plain, loop = TrainingArguments.device, StageTrainer._inner_training_loop

    def on_device(trainer, *args, **options):
        inside.append(True)
        for state in (AcceleratorState, PartialState):
            monkeypatch.setitem(state._shared_state, "device", DEVICE)
        with device:
            trainer.model.to(DEVICE)
            for held in filter(None, (getattr(part, "held", None) for part in trainer.model.modules())):
                held.model.to(DEVICE)
                held.final_norm.to(DEVICE)
            device.waits.clear()
            return loop(trainer, *args, **options)

    own = property(lambda args: DEVICE if inside else plain.__get__(args, TrainingArguments))
    monkeypatch.setattr(TrainingArguments, "device", own)
    monkeypatch.setattr(StageTrainer, "_inner_training_loop", on_device)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 0)
    return device


def test_a_step_waits_for_what_it_logs_alone(folder, device):
    run(config_of(folder), "interact")
    own = {place: count for place, count in device.waits.items() if place.startswith(("vlsi_fast/", "vlsi_kernels/"))}
    (place,) = own
    assert place.startswith("vlsi_fast/stages/trainer.py") and place.endswith(" tolist")
    assert own[place] == STEPS


@pytest.mark.parametrize(
    "waits, expected",
    [
        (lambda x: x.sum().item(), "item"),
        (lambda x: x[x > 0], "__getitem__"),
        (lambda x: torch.ones(3).to(DEVICE), "blocking copy to the device"),
        (lambda x: torch.tensor([1.0], device=DEVICE), "blocking copy to the device"),
        (lambda x: x.cpu(), "copy to the host"),
        (lambda x: torch.repeat_interleave(x, (x > 0).long()), "repeat_interleave"),
        (lambda x: f"{x.sum()}", "__format__"),
        (lambda x: bool((x > 0).all()), "__bool__"),
    ],
)
def test_waits_are_seen(waits, expected):
    """What the counter is for."""
    with FakeDevice() as device:
        x = torch.ones(3, device=DEVICE)
        waits(x)
    (place,) = device.waits
    assert place.startswith("test_waits.py:") and place.endswith(expected)


def test_what_does_not_wait_is_not_counted():
    with FakeDevice() as device:
        x = torch.ones(3).pin_memory().to(DEVICE, non_blocking=True)
        y = (x[torch.tensor([0, 1]).pin_memory().to(DEVICE, non_blocking=True)] * 2).sum() + 1
        torch.where(x > 0, x, 0).masked_scatter(x > 0, x)
        torch.ones(3).sum().item()
        assert y.device == DEVICE and y.is_cuda
    assert not device.waits
