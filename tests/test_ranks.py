"""Two DeepSpeed ZeRO-3 ranks on the CPU against one plain process."""

import json
import shutil

import pytest
import tiny_runs as runs
import torch

from vlsi_fast import load_config, run
from vlsi_fast.loading import load_backbone
from vlsi_fast.ranks.secondary import resolved
from vlsi_fast.verbalizer import Verbalizers

STAGES = ("verbalize", "interact", "sft")


def plain(workspace, output, accumulation: int, **training) -> dict:
    """Eleven micro-batches of two rows a rank and epoch, more than one epoch, and SGD without clipping: unlike Adam's,
    its steps show the gradients' scale, so that a wrong factor cannot hide."""
    tree = runs.settings(
        workspace,
        output,
        gradient_accumulation_steps=accumulation,
        max_steps=8,
        save_steps=4,
        optim="sgd",
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        **training,
    )
    tree["data"]["train"][0]["limit"] = 44
    return tree


def drawing(workspace, verbalized, output):
    """Config of stage interact with sampled matches, on another run's verbalizers."""
    tree = runs.settings(
        workspace,
        output,
        gradient_accumulation_steps=1,
        max_steps=6,
        save_steps=2,
        save_total_limit=None,
        deepspeed=runs.zero3(),
    ) | {"matching": {}}
    for role in ("student", "teacher"):
        tree[role]["verbalizers"] = str(verbalized / "verbalize" / role)
    return runs.write_config(tree, output.parent / f"{output.name}.yaml")


def other(workspace, output, accumulation: int, **training):
    """Config of a run with the objective, divergence and schedule that are not the paper's, and without sft."""
    tree = plain(workspace, output, accumulation, **training) | {"stages": ["verbalize", "interact"]}
    tree["verbalize"] = {"objective": "both"}
    tree["interact"] = {"divergence": "jsd", "intermediate_schedule": "linear"}
    return runs.write_config(tree, output.parent / f"{output.name}.yaml")


@pytest.fixture(scope="module")
def two_ranks(workspace, tmp_path_factory):
    """All stages in `run`; beside it `whole`, for the test of drawn matches, and `other`."""
    folder = tmp_path_factory.mktemp("ranks")
    tree = plain(workspace, folder / "run", 2, deepspeed=runs.zero3(), gradient_checkpointing=True)
    config = runs.write_config(tree, folder / "config.yaml")
    whole = drawing(workspace, folder / "run", folder / "whole")
    jobs = ("all", config), ("interact", whole), ("all", other(workspace, folder / "other", 2, deepspeed=runs.zero3()))
    runs.train_several("--fresh", *jobs)
    return folder / "run"


@pytest.fixture(scope="module")
def one_rank(workspace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rank")
    config = runs.write_config(plain(workspace, folder / "run", 4), folder / "config.yaml")
    run(load_config(config), "all")
    return folder / "run"


@pytest.mark.parametrize("stage", STAGES)
def test_two_zero3_ranks_equal_one(two_ranks, one_rank, stage):
    records = list(zip(runs.metrics(two_ranks, stage), runs.metrics(one_rank, stage), strict=True))
    assert [two["rows"] for two, _ in records] == [8, 8, 8, 8, 8, 4, 8, 8]  # the sixth ends an epoch
    for two, one in records:
        assert two["answer_tokens"] == one["answer_tokens"]
        assert two["rows"] == one["rows"]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert len(two["peak_memory_bytes"]) == 2


def test_other_losses_on_two_ranks_equal_those_on_one(workspace, two_ranks, tmp_path):
    """Heads are gathered for them, and the weight of the layers falls by the optimizer step."""
    records = run(load_config(other(workspace, tmp_path / "other", 4)), "all")
    assert list(records) == ["verbalize", "interact"]
    for stage in records:
        two, one = (runs.metrics(folder / "other", stage) for folder in (two_ranks.parent, tmp_path))
        assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=1e-4)
        assert [r.get("intermediate_weight") for r in two] == [r.get("intermediate_weight") for r in one]
    assert one[4]["intermediate_weight"] == 0.5


def test_torchrun_without_deepspeed_equals_one(workspace, one_rank, tmp_path):
    """Plain data parallelism, by torch's own launcher."""
    config = runs.write_config(plain(workspace, tmp_path / "run", 2), tmp_path / "config.yaml")
    runs.train_several("--fresh", ("all", config), launcher="torchrun")
    for stage in STAGES:
        assert runs.losses(tmp_path / "run", stage) == pytest.approx(runs.losses(one_rank, stage), rel=1e-4)


def test_results_of_two_ranks_equal_those_of_one(workspace, two_ranks, one_rank):
    """Weights, and what training changed of them."""
    for stage, source in (("interact", workspace), ("sft", one_rank / "interact")):
        start = dict(load_backbone(source / "student", "float32").named_parameters())
        two, one = (load_backbone(folder / stage / "student", "float32") for folder in (two_ranks, one_rank))
        moved = 0.0
        for (name, a), (_, b) in zip(two.named_parameters(), one.named_parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)
            moved = max(moved, float((b - start[name]).abs().max()))
        assert moved > 1e-3, stage
    for role in ("student", "teacher"):
        two, one = (Verbalizers.from_pretrained(folder / "verbalize" / role) for folder in (two_ranks, one_rank))
        for (name, a), (_, b) in zip(two.named_parameters(), one.named_parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


def test_parameters_were_sharded(two_ranks):
    """ZeRO-3 writes each rank's part; frozen weights are in none of them."""
    folder = two_ranks / "interact" / "checkpoint-4"
    parts = sorted(folder.glob("global_step*/*_optim_states.pt"))
    assert len(parts) == 2
    total = sum(p.numel() for p in load_backbone(two_ranks / "interact" / "student", "float32").parameters())
    trainable = sum(
        v.numel() for v in torch.load(parts[0], weights_only=False)["optimizer_state_dict"]["fp32_flat_groups"]
    )
    assert 0 < trainable < total / 4


@pytest.mark.slow
def test_ranks_draw_their_own_matches(workspace, two_ranks, tmp_path):
    """And a two-rank run continues to the same losses. (test_scaling.py kills ranks.)"""
    whole = runs.metrics(two_ranks.parent / "whole", "interact")
    assert any(max(row) == 1 for record in whole for row in record["matches"]), "both ranks always drew alike"
    shutil.copytree(two_ranks.parent / "whole", tmp_path / "resumed")
    runs.rewind(tmp_path / "resumed" / "interact", 2)
    runs.train_several("--resume", ("interact", drawing(workspace, two_ranks, tmp_path / "resumed")))
    resumed = runs.metrics(tmp_path / "resumed", "interact")
    keep = ("step", "loss", "matches", "answer_tokens")
    assert [{k: r[k] for k in keep} for r in resumed] == [{k: r[k] for k in keep} for r in whole]
    times = [[r["step_seconds"] for r in records] for records in (resumed, whole)]
    assert times[0][:2] == times[1][:2] and times[0][2:] != times[1][2:], "steps 3 to 6 were made again"


def other_paths(workspace, output, accumulation, deepspeed=None):
    """Config: decoder verbalizers, no loss on the last layer, trained student verbalizers."""
    tree = plain(workspace, output, accumulation, deepspeed=deepspeed) | {
        "verbalizer": {"architecture": "decoder", "norm": True},
        "interact": {"last": "none", "train_student_verbalizers": True},
        "verbalize": {"training": {"max_steps": 2}},
    }
    tree["training"]["max_steps"] = 3
    return runs.write_config(tree, output.parent / f"{output.name}.yaml")


@pytest.fixture(scope="module")
def other_paths_on_one_rank(workspace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("other") / "one"
    config = other_paths(workspace, folder, 2)
    for stage in ("verbalize", "interact"):
        run(load_config(config), stage)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_other_paths_go_through_on_two_ranks(workspace, other_paths_on_one_rank, tmp_path, launcher):
    """Same as in one process."""
    stages = ("verbalize", "interact")
    config = other_paths(workspace, tmp_path / "two", 1, runs.zero3() if launcher == "deepspeed" else None)
    runs.train_several("--fresh", *((stage, config) for stage in stages), launcher=launcher)
    for stage in stages:
        expected = runs.losses(other_paths_on_one_rank, stage)
        assert runs.losses(tmp_path / "two", stage) == pytest.approx(expected, rel=2e-4)


def test_zero3_preset_is_what_deepspeed_reads():
    """Flat dotted keys would be ignored without a word."""
    from deepspeed.runtime.config import DeepSpeedConfig

    preset = json.loads((runs.ROOT / "configs" / "zero3.json").read_text())
    for name in ("gradient_accumulation_steps", "train_batch_size", "train_micro_batch_size_per_gpu"):
        preset[name] = 1
    preset |= {"gradient_clipping": 1.0, "bf16": {"enabled": False}}
    preset = resolved(preset, ranks=16, node=8)
    assert preset["zero_optimization"]["zero_hpz_partition_size"] == 8
    effective = DeepSpeedConfig(preset).zero_config
    assert effective.stage == 3
    for name, value in preset["zero_optimization"].items():
        attribute = {"stage3_param_persistence_threshold": "param_persistence_threshold"}.get(name, name)
        attribute = attribute.removeprefix("stage3_")
        assert getattr(effective, attribute) == value, name
