"""Model FLOPs of a step against those that PyTorch counts, and the share of a device's peak."""

from types import SimpleNamespace

import pytest
import tiny_runs as runs
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlsi_fast import load_config
from vlsi_fast.loading import load_model_config
from vlsi_fast.stages import STAGE_CLASSES
from vlsi_fast.stages.throughput import Throughput, peak_flops
from vlsi_fast.stages.trainer import StageTrainer


@pytest.mark.parametrize("stage", ["verbalize", "interact", "sft"])
def test_a_step_has_the_flops_that_pytorch_counts(workspace, tmp_path, monkeypatch, stage):
    """Rows of nearly one length, so padding is little; recomputation is none of the model's."""
    counted = {}
    step = StageTrainer.training_step

    def training_step(trainer, *args, **options):
        with FlopCounterMode(display=False) as counter:
            loss = step(trainer, *args, **options)
        at = trainer.state.global_step
        counted[at] = counted.get(at, 0) + counter.get_total_flops()
        return loss

    tree = runs.settings(workspace, tmp_path / "run") | {"sft": {"start_from": "base"}}
    for role in ("student", "teacher"):
        tree[role]["attn_implementation"] = "eager"  # of others, the counter knows nothing on a CPU
    config = load_config(runs.write_config(tree, tmp_path / "run.yaml"))
    if stage == "interact":
        STAGE_CLASSES["verbalize"](config).run()
    monkeypatch.setattr(StageTrainer, "training_step", training_step)
    STAGE_CLASSES[stage](config).run()
    records = runs.metrics(tmp_path / "run", stage)
    assert len(records) == len(counted) == 3
    for i, record in enumerate(records):
        assert record["tflops_per_rank"] * 1e12 * record["step_seconds"] == pytest.approx(counted[i], rel=0.1)
        assert "mfu" not in record  # of a CPU no peak is known
    assert records[-1]["eta_seconds"] == 0 < records[0]["eta_seconds"]


def test_neither_padding_nor_recomputation_nor_ranks_make_more(workspace, monkeypatch):
    def of(ranks=1, device="cpu", **training):
        config = load_config(runs.write_config(runs.settings(workspace, workspace, **training), workspace / "t.yaml"))
        configs = {name: load_model_config(getattr(config, name), name) for name in ("student", "teacher")}
        throughput = Throughput(config.model_copy(update={"dtype": "bfloat16"}), "interact", configs, ranks, device)
        return throughput.of(2.0, 8, 40, [400, 420], [9600, 9600])

    cpu = torch.device("cpu")
    plain = of(device=cpu)
    assert of(device=cpu, gradient_checkpointing=True) == plain
    assert of(4, cpu)["tflops_per_rank"] == pytest.approx(plain["tflops_per_rank"] / 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    known = of(device=SimpleNamespace(type="cuda"))
    assert known["mfu"] == pytest.approx(plain["tflops_per_rank"] / 312)


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peaks_by_name(name, tflops):
    assert peak_flops(name) == (tflops and tflops * 1e12)
