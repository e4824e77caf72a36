"""Loading under ZeRO-3, tensor by tensor: stock values, memory of a rank, and errors that every rank raises alike."""

import json
import os
import re
import subprocess
import sys

import pytest
import tiny
import tiny_runs as runs
import torch
from safetensors.torch import load_file, save_file

BROKEN = {
    "missing": r"missing: model\.language_model\.layers\.1\.mlp\.up_proj\.weight \(1\)",
    "unknown": r"not known to the model: .*stray\.weight \(1\)",
    "shape": r"norm\.weight has shape \(7,\), its config.json asks for \(64,\)",
    "untied": "config.json ties .*embed_tokens.weight.* but they differ; set tie_word_embeddings to false",
    "no_file": "model-00002-of-00009.safetensors, .* is missing; download",
}


def make_checkpoints(folder) -> None:
    tiny.make_model(hidden=512, layers=12, heads=8, vocab_size=8192).save_pretrained(
        folder / "large", max_shard_size="20MB"
    )
    tiny.make_model(hidden=64, layers=3, heads=4, tied=True).save_pretrained(folder / "tied")
    state = load_file(folder / "tied" / "model.safetensors")
    assert "visual.patch_embed.proj.weight" in state, "save_pretrained no longer writes the older names"
    new = {
        f"model.{k}" if k.startswith("visual.") else k.replace("model.", "model.language_model.", 1): v
        for k, v in state.items()
    }
    up, norm, embedding = "model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"
    variants = {
        "new_names": new,
        "missing": {k: v for k, v in state.items() if k != up},
        "unknown": state | {"model.stray.weight": torch.ones(3)},
        "shape": state | {norm: torch.ones(7)},
        "untied": state | {"lm_head.weight": state[embedding] + 1},
        "both_equal": state | {"lm_head.weight": state[embedding].clone()},
    }
    config = (folder / "tied" / "config.json").read_text()
    for name, tensors in variants.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(config)
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
    (folder / "no_file").mkdir()
    for name in ("config.json", "model.safetensors.index.json"):
        (folder / "no_file" / name).write_text((folder / "large" / name).read_text())
    first = "model-00001-of-00009.safetensors"
    os.link(folder / "large" / first, folder / "no_file" / first)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """dtype -> what each rank reports."""
    folder = tmp_path_factory.mktemp("checkpoints")
    make_checkpoints(folder)
    cases = {"float32": ["large", "tied", "new_names", "both_equal", *BROKEN], "bfloat16": ["tied"]}
    found = {}
    for dtype, names in cases.items():
        port = str(26000 + os.getpid() % 500)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
        script = str(runs.ROOT / "tests" / "sharded_loading.py")
        done = subprocess.run(
            [*command, script, str(folder), dtype, *names], cwd=runs.ROOT, timeout=runs.LIMIT, text=True,
            # freed blocks go back to the system at once, so that resident memory is what is held
            env=runs.environment(MALLOC_MMAP_THRESHOLD_="65536", HF_HUB_OFFLINE="1"),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:]
        found[dtype] = [json.loads((folder / f"report_{dtype}_{r}.json").read_text()) for r in range(2)]
    return found


@pytest.mark.parametrize("name", ["large", "tied", "new_names", "both_equal"])
def test_values_are_stock(reports, name):
    """Parameters and buffers, of checkpoints with the Hub's older names and with today's, and of tied heads."""
    assert [report[name].get("differing") for report in reports["float32"]] == [[], []], reports["float32"][0][name]


def test_rotary_frequencies_are_not_rounded(reports):
    """zero.Init rounds what is made inside it to bfloat16, and transformers 5.17 let it."""
    assert [report["tied"]["differing"] for report in reports["bfloat16"]] == [[], []]


def test_no_rank_ever_holds_the_whole_model(reports):
    """Its half, and beside it a few tensors; from_pretrained came to 1.6 times the model on rank 0."""
    for report in reports["float32"]:
        large = report["large"]
        assert large["shards"] < 0.51 * large["size"]
        assert large["shards"] < large["peak"] < 0.85 * large["size"]


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_is_told_on_every_rank(reports, name):
    for report in reports["float32"]:
        assert re.search(BROKEN[name], report[name]["error"]), report[name]
