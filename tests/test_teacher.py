"""How the teacher is held: the same loss in every mode, no weight of it in checkpoints, only the layers that are needed."""

import json
import os
import shutil
import subprocess

import pytest
import tiny_runs as runs

STAGES = ("verbalize", "interact")
MODES = ("zero3", "replicated", "offload")


def zero3() -> dict:
    """The shipped preset with every parameter sharded: tiny ones would otherwise be kept whole."""
    preset = json.loads((runs.ROOT / "configs" / "zero3.json").read_text())
    preset["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return preset


def tree_of(workspace, output, mode, accumulation=2, **training) -> dict:
    """SGD without clipping: its steps show the gradients' scale."""
    tree = runs.settings(
        workspace, output, gradient_accumulation_steps=accumulation, max_steps=3, optim="sgd", learning_rate=0.05,
        lr_scheduler_type="constant", max_grad_norm=0.0, **training,
    )  # fmt: skip
    tree["teacher"]["mode"] = mode
    return tree


def launch(config, stage, launcher, *arguments):
    """Run a stage on two ranks (deepspeed, torchrun), or in one plain process (None)."""
    command = runs.train_command(config, stage, *arguments, ranks=2 * (launcher == "deepspeed"))
    if launcher == "torchrun":
        port = str(27000 + os.getpid() % 500)
        command[1:1] = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    done = subprocess.run(
        command, cwd=runs.ROOT, env=runs.environment(), timeout=600, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def on_two_ranks(workspace, tmp_path_factory):
    """Mode -> folder of a run under DeepSpeed ZeRO-3."""
    folder = tmp_path_factory.mktemp("modes")
    for mode in MODES:
        tree = tree_of(workspace, folder / mode, mode, save_steps=2, deepspeed=zero3(), gradient_checkpointing=True)
        config = runs.write_config(tree, folder / f"{mode}.yaml")
        for stage in STAGES:
            launch(config, stage, "deepspeed")
    return folder


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mode", MODES[1:])
def test_same_loss_on_two_zero3_ranks(on_two_ranks, mode, stage):
    found, expected = (runs.losses(on_two_ranks / m, stage) for m in (mode, "zero3"))
    assert found == expected
