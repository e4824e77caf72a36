"""Every family, every loss of interact, and LoRA in bfloat16, on two ZeRO-3 CPU ranks against one plain process.

test_ranks.py has Qwen2-VL and the default losses. Here all runs share one launch. Micro-batches are of one row, and
every second row has no image, so that in many steps only one of the two ranks has one.
"""

import gc
import json

import pytest
import tiny_families as families
import tiny_runs as runs
import torch
from safetensors.torch import load_file

from vlsi_fast import load_config, run
from vlsi_fast.data.mixing import EpochOrder
from vlsi_fast.loading import load_backbone

STAGES = ("verbalize", "interact", "sft")
ROWS, STEPS = 24, 2
# teacher, student; the last two cross families. The teacher with experts routes other tokens on each rank
ALONE = ("gemma3", "glm4v", "internvl", "llava_onevision", "qwen2_5_vl", "qwen3_5", "qwen3_vl", "smolvlm")
PAIRS = {name: (name, name) for name in ALONE}
PAIRS["experts"] = ("qwen3_vl_moe", "qwen3_vl")
PAIRS["across"] = ("qwen2_vl", "llava_onevision")
LOSSES = {
    "ce": {"intermediate": "ce", "last": "none"},
    "l2": {"intermediate": "l2", "last": "l2"},
    "headless": {"intermediate": "l2", "last": "kld", "headless": True},
    "bfloat16": {},
}
TRANSLATED = {"translated": {}, "translated_offload": {"mode": "offload"}, "translated_window": {"window": 2}}
"""The pair across families, whose teacher speaks the student's language: how it is held."""
SPEAKERS = "qwen3_vl"
"""Pair whose verbalizers, made in one process, the losses are tried with."""

pytestmark = pytest.mark.slow


def zero3(threshold: int) -> dict:
    """The shipped preset with its persistence threshold, in parameters, lowered to tiny models."""
    preset = json.loads((runs.ROOT / "configs" / "zero3.json").read_text())
    preset["zero_optimization"]["stage3_param_persistence_threshold"] = threshold
    return preset


def write(folder, name, output, ranks, **sections):
    """A config of pair or loss `name`; SGD without clipping, whose steps show the gradients' scale."""
    pair = SPEAKERS if name in LOSSES else "across" if name in TRANSLATED else name
    teacher, student = PAIRS[pair]
    tree = runs.settings(
        folder,
        output,
        max_steps=STEPS,
        gradient_checkpointing=True,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4 // ranks,
        optim="sgd",
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    if ranks > 1:  # 1000: a tied head and the linear layers are sharded, norms are kept whole, as at real sizes
        tree["training"]["deepspeed"] = zero3(1000 if name == "qwen2_5_vl" else 0)
    tree["teacher"]["path"] = str(folder / f"teacher_{teacher}")
    tree["student"]["path"] = str(folder / f"student_{student}")
    if name in TRANSLATED:
        tree["verbalizer"], tree["teacher"] = {"language": "student"}, tree["teacher"] | TRANSLATED[name]
        if name != "translated":
            for role in ("teacher", "student"):
                tree[role]["verbalizers"] = str(folder / "one" / "translated" / "verbalize" / role)
    if name in LOSSES:
        tree["interact"] = LOSSES[name]
        tree["dtype"] = "bfloat16" if name == "bfloat16" else "float32"
        for role in ("teacher", "student"):
            tree[role]["verbalizers"] = str(folder / "one" / SPEAKERS / "verbalize" / role)
    return runs.write_config(tree, output.parent / f"{output.name}.yaml")


def jobs():
    """(stage, pair or loss); stage sft, which has no teacher, only of LLaVA-OneVision and Qwen3-VL."""
    found = [(stage, name) for name in PAIRS for stage in STAGES if stage != "sft" or name in ("across", "qwen3_vl")]
    return found + [("verbalize", "translated")] + [("interact", name) for name in (*TRANSLATED, *LOSSES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, rows, and each run twice: `one/NAME` in this process, `two/NAME` on two ranks."""
    folder = tmp_path_factory.mktemp("families")
    for name in {name for pair in PAIRS.values() for name in pair}:
        families.save(folder / f"teacher_{name}", name, hidden=48, layers=6, seed=1, tied=name == "qwen2_5_vl")
        families.save(folder / f"student_{name}", name, hidden=32, layers=4, seed=2, tied=True)
    path = runs.make_rows(folder, ROWS)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[::2]:
        del row["images"]
        row["messages"][0]["content"] = row["messages"][0]["content"].removeprefix("<image>")
    path.write_text("\n".join(map(json.dumps, rows)))
    for ranks in ("one", "two"):
        (folder / ranks).mkdir()
    for stage, name in jobs():
        run(load_config(write(folder, name, folder / "one" / name, 1)), stage)
        gc.freeze()  # as in run_several.py
    gc.unfreeze()
    launched = [(stage, write(folder, name, folder / "two" / name, 2)) for stage, name in jobs()]
    runs.train_several("--fresh", *launched, launcher="torchrun")
    return folder


@pytest.mark.parametrize("stage, name", jobs())
def test_two_zero3_ranks_equal_one_process(folder, stage, name):
    one, two = (runs.metrics(folder / ranks / name, stage) for ranks in ("one", "two"))
    assert len(one) == len(two) == STEPS
    for a, b in zip(one, two, strict=True):
        assert (a["rows"], a["answer_tokens"]) == (b["rows"], b["answer_tokens"]) and a["rows"] == 4
        assert len(b["peak_memory_bytes"]) == 2 and a.get("matches") == b.get("matches")
        parts = [part for part in a if part.startswith("loss")]
        tolerance = 1e-2 if name == "bfloat16" else 1e-5
        assert [b[part] for part in parts] == pytest.approx([a[part] for part in parts], rel=tolerance)
    assert one[0]["loss"] != one[1]["loss"]


def test_one_rank_alone_has_an_image_in_every_stage():
    """As ranks take turns in the order of rows; else these runs would not show what they are for."""
    order = list(EpochOrder([ROWS], 0).rows(0, ROWS))
    for stage in range(len(STAGES)):
        used = order[stage * 4 * STEPS : (stage + 1) * 4 * STEPS]
        pairs = [(used[i] % 2, used[i + 1] % 2) for i in range(0, len(used), 2)]
        assert {(0, 1), (1, 0)} & set(pairs), pairs


def test_lora_of_a_bfloat16_run(folder):
    """In bfloat16 under DeepSpeed, whose optimizer has float32 copies; merged into the weights as it is stored."""
    interact = folder / "two" / "bfloat16" / "interact"
    adapter = load_file(interact / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in adapter.values()} == {torch.bfloat16}
    parts = list((interact / f"checkpoint-{STEPS}").glob("global_step*/*_optim_states.pt"))
    assert len(parts) == 2
    copies = [torch.load(p, weights_only=False)["optimizer_state_dict"]["fp32_flat_groups"] for p in parts]
    copies = [value for part in copies for value in part]
    assert {value.dtype for value in copies} == {torch.float32}
    assert sum(value.numel() for value in copies) >= sum(value.numel() for value in adapter.values())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in copies), "only copies of rounded weights"

    base = dict(load_backbone(folder / f"student_{SPEAKERS}", "float32").named_parameters())
    merged = dict(load_backbone(interact / "student", "float32").named_parameters())
    moved = 0
    for name, weight in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
        if key.format("A") in adapter:  # alpha is the rank: the product counts once
            change = adapter[key.format("B")].float() @ adapter[key.format("A")].float()
            moved += bool(change.abs().max() > 0)
            torch.testing.assert_close(merged[name], weight.bfloat16().float() + change, rtol=2**-8, atol=2**-12)
        else:
            assert torch.equal(merged[name], weight.bfloat16().float()), name
    assert moved == 7 * 4
