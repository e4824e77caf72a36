"""Run by test_shard_loading.py on two ranks: load checkpoints under ZeRO-3 and write a JSON report a rank."""

import gc
import json
import sys
from pathlib import Path

import deepspeed
import tiny_runs as runs
import torch
import torch.distributed as dist
from transformers import AutoModelForImageTextToText
from transformers.integrations import deepspeed as integration
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from vlsi_fast.loading import load_backbone


def status(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def peak_while(load) -> tuple[torch.nn.Module, int]:
    """What `load` returns, and the growth of resident memory at its highest."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = status("VmRSS")
    return load(), status("VmHWM") - before


def differing(model: torch.nn.Module, folder: Path, dtype: str) -> list[str]:
    """Names of parameters and buffers that are not those of an unsharded stock model."""
    kept = integration._hf_deepspeed_config_weak_ref
    integration._hf_deepspeed_config_weak_ref = None
    stock = AutoModelForImageTextToText.from_pretrained(folder, dtype=getattr(torch, dtype))
    integration._hf_deepspeed_config_weak_ref = kept
    found = []
    for own, theirs in (
        (model.named_parameters(), stock.named_parameters()),
        (model.named_buffers(), stock.named_buffers()),
    ):
        own, theirs = dict(own), dict(theirs)
        found += [f"{name} missing" for name in theirs.keys() - own.keys()]
        for name, tensor in own.items():
            whole = tensor
            if hasattr(tensor, "ds_id"):
                with deepspeed.zero.GatheredParameters([tensor]):
                    whole = tensor.detach().clone()
            if whole.dtype != theirs[name].dtype or not torch.equal(whole, theirs[name]):
                found.append(name)
    return found


def main() -> None:
    workspace, dtype = Path(sys.argv[1]), sys.argv[2]
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "bf16": {"enabled": dtype != "float32"}}
    config = HfDeepSpeedConfig(settings)
    report = {}
    load_backbone(workspace / "tied", dtype)  # imports, so that memory below is that of weights
    for name in sys.argv[3:]:
        folder = workspace / name
        try:
            model, peak = peak_while(lambda folder=folder: load_backbone(folder, dtype))
        except (ValueError, FileNotFoundError) as error:
            report[name] = {"error": str(error)}
            continue
        size = sum(p.ds_numel * p.element_size() for p in model.parameters())
        shards = sum(p.ds_tensor.numel() * p.element_size() for p in model.parameters())
        report[name] = {"size": size, "shards": shards, "peak": peak, "differing": differing(model, folder, dtype)}
    del config
    (workspace / f"report_{dtype}_{dist.get_rank()}.json").write_text(json.dumps(report))
    runs.leave_ranks()


if __name__ == "__main__":
    main()
