"""How often a training step waits for the device: once, for the numbers that it logs."""

import contextlib
from collections import Counter

import pytest
import tiny_families
import tiny_runs as runs
import torch
import varlen_standin
from accelerate.state import AcceleratorState, PartialState
from device_waits import DEVICE, FakeDevice
from transformers import TrainingArguments

from vlsi_fast import acceleration, run
from vlsi_fast.backbones import FAMILIES
from vlsi_fast.config import RunConfig
from vlsi_fast.stages.trainer import StageTrainer

STEPS = 2


STOCK = {"llava_onevision": {"pack_image_features": 1}}
"""Waits of the stock forward that remain, by function: each a micro-batch and model."""


# Rows with linear attention are padded, and the stock model reads their mask. Experts' products have no kernel for a
# device that is a CPU and says that it is none.
SKIPPED = {*tiny_families.RECURRENT, *(name for name in FAMILIES if FAMILIES[name].sparse_block)}


@pytest.fixture(scope="module", params=sorted(set(FAMILIES) - SKIPPED))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory, family):
    """Models with verbalizers, and rows."""
    folder = tmp_path_factory.mktemp("waits")
    runs.make_rows(folder, 8)
    tiny_families.save(folder / "teacher", family, hidden=48, layers=6, seed=1)
    tiny_families.save(folder / "student", family, hidden=32, layers=4, seed=2)
    run(config_of(folder), "verbalize")
    return folder


def config_of(folder, **roles):
    settings = runs.settings(folder, folder / "out", max_steps=STEPS, max_grad_norm=0)
    settings |= {"impl": "torch", "liger": False, "matching": {"strategy": "multinomial"}, "sft": {"method": "lora"}}
    settings["data"]["padding_free"] = True if roles else "auto"
    for role in ("teacher", "student"):
        settings[role] |= roles
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


def test_a_step_waits_for_what_it_logs_alone(folder, device, family, monkeypatch):
    """Packed, with attention that has the rows' bounds (Gemma 3: padded, with masks): neither our code nor the stock
    models wait before it."""
    varlen_standin.install(monkeypatch)
    monkeypatch.setattr(acceleration, "varlen_problem", lambda *arguments: None)  # a CPU, and float32
    packed = {} if FAMILIES[family].images_look_ahead else {"attn_implementation": "flash_varlen"}
    run(config_of(folder, **packed), "interact")
    micro_batches = 2 * STEPS
    logged = {"vlsi_fast/stages/trainer.py": STEPS}  # the step's record
    logged["transformers/trainer.py"] = 2 * STEPS + 2  # loss and gradient norm, and once before and after all steps
    # gradient clipping groups by the device that C++ sees, here the CPU; on a GPU nothing is copied
    logged["accelerate/accelerator.py"] = STEPS
    found = Counter()
    for place, count in device.waits.items():
        found[place.split(":")[0]] += count
    found.pop("varlen_standin.py", None)
    for file, times in logged.items():
        assert found.pop(file, 0) <= times
    for file in [file for file in found if file.startswith("safetensors/")]:  # the checkpoint and the result
        del found[file]
    allowed = 2 * micro_batches * sum(STOCK.get(family, {}).values())
    assert sum(found.values()) == allowed, device.waits


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
