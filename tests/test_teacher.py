"""How the teacher is held: one loss in every mode, nothing of it in checkpoints, only the layers that are used."""

import importlib.util
import json

import pytest
import tiny_runs as runs
import torch

from vlsi_fast import load_config, run, teacher
from vlsi_fast.backbones import family_of
from vlsi_fast.config import ConfigError
from vlsi_fast.lineage import LineageError
from vlsi_fast.loading import load_backbone
from vlsi_fast.stages.trainer import StageTrainer

STAGES = ("verbalize", "interact")
MODES = ("zero3", "replicated", "offload")


def tree_of(workspace, output, mode, accumulation=2, **training) -> dict:
    """SGD without clipping: its steps show the gradients' scale."""
    tree = runs.settings(
        workspace,
        output,
        gradient_accumulation_steps=accumulation,
        max_steps=3,
        optim="sgd",
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        **training,
    )
    tree["teacher"]["mode"] = mode
    return tree


def in_process(workspace, output, mode, stage, sections=None, **training):
    """Run a stage in this process, without DeepSpeed."""
    tree = tree_of(workspace, output, mode, 4, **training)
    for name, value in (sections or {}).items():
        tree[name] = tree.get(name, {}) | value
    return run(load_config(runs.write_config(tree, output.parent / f"{output.name}.yaml")), stage)


# ---- the same loss in every mode ----


@pytest.fixture(scope="module")
def on_two_ranks(workspace, tmp_path_factory):
    """Folder with one run a mode, two ranks under DeepSpeed ZeRO-3."""
    folder = tmp_path_factory.mktemp("modes")
    jobs = []
    for mode in MODES:
        training = {"save_steps": 2, "deepspeed": runs.zero3(), "gradient_checkpointing": True}
        tree = tree_of(workspace, folder / mode, mode, **training)
        config = runs.write_config(tree, folder / f"{mode}.yaml")
        jobs += [(stage, config) for stage in STAGES]
    runs.train_several("--fresh", *jobs, launcher="torchrun")
    return folder


@pytest.fixture(scope="module")
def in_one_process(workspace, tmp_path_factory):
    """Folder with one run of replicated and of offload in one plain process."""
    folder = tmp_path_factory.mktemp("plain")
    for mode in MODES[1:]:
        for stage in STAGES:
            in_process(workspace, folder / mode, mode, stage)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mode", MODES[1:])
def test_same_loss_on_two_zero3_ranks(on_two_ranks, mode, stage):
    """To the last digit: where the weights come from changes no operation."""
    assert runs.losses(on_two_ranks / mode, stage) == runs.losses(on_two_ranks / "zero3", stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_equal_one_process(on_two_ranks, in_one_process, stage):
    for mode in MODES:
        one = runs.losses(in_one_process / "replicated", stage)
        assert runs.losses(on_two_ranks / mode, stage) == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_same_loss_in_one_process(in_one_process, stage):
    found = runs.losses(in_one_process / "offload", stage)
    assert found == runs.losses(in_one_process / "replicated", stage)
    assert found[0] != found[-1]


@pytest.mark.slow
def test_a_run_is_continued_in_another_mode(on_two_ranks):
    """Placement is no part of a run's identity, and a checkpoint holds nothing of the teacher."""
    expected = runs.losses(on_two_ranks / "zero3", "interact")
    runs.rewind(on_two_ranks / "zero3" / "interact", 2)
    tree = json.loads((on_two_ranks / "zero3.yaml").read_text())
    tree["teacher"]["mode"] = "offload"
    config = runs.write_config(tree, on_two_ranks / "continued.yaml")
    runs.train_several("--resume", ("interact", config), launcher="torchrun")
    assert runs.losses(on_two_ranks / "zero3", "interact") == expected


# ---- nothing of the teacher is trained, moved or saved ----


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_no_teacher_weights_in_zero3_checkpoints(on_two_ranks, mode):
    for stage in STAGES:
        (folder,) = (on_two_ranks / mode / stage).glob("checkpoint-2")
        parts = sorted(folder.glob("global_step*/*_optim_states.pt"))
        assert len(parts) == 2
        names = set()
        for file in folder.glob("global_step*/*_model_states.pt"):
            names |= torch.load(file, weights_only=False)["module"].keys()
        assert names and not [n for n in names if "teacher.model." in n]


@pytest.mark.parametrize("mode", MODES[1:])
def test_teacher_is_outside_the_module_tree(workspace, in_one_process, tmp_path, monkeypatch, mode):
    seen = {}

    def look(self, *arguments, **keywords):
        held = self.module.teacher.held
        tree = {id(p) for p in self.module.parameters()}
        seen["inside"] = [n for n, p in held.model.named_parameters() if id(p) in tree]
        seen["names"] = [n for n, _ in self.module.named_parameters() if n.startswith("teacher.model")]
        self.module.to(torch.float64)
        seen["dtype"] = held.head_weight.dtype
        raise InterruptedError

    monkeypatch.setattr(StageTrainer, "train", look)
    sections = {
        "teacher": {"mode": mode, "verbalizers": str(in_one_process / "replicated" / "verbalize" / "teacher")},
        "student": {"verbalizers": str(in_one_process / "replicated" / "verbalize" / "student")},
    }
    with pytest.raises(InterruptedError):
        in_process(workspace, tmp_path / "run", mode, "interact", sections)
    assert seen == {"inside": [], "names": [], "dtype": torch.float32}


# ---- only the layers that are needed, once a micro-batch ----


def test_cut_model_equals_the_whole_one_below_the_cut(workspace):
    whole, cut = (load_backbone(workspace / "teacher", "float32", depth=depth) for depth in (None, 3))
    layers = [family_of(model.config).decoder_layers(model) for model in (whole, cut)]
    assert [len(part) for part in layers] == [6, 3]
    ids = torch.arange(40).view(2, 20)
    hidden = [model(input_ids=ids, output_hidden_states=True).hidden_states for model in (whole, cut)]
    for k in (0, 1, 2):  # the last entry has been through the final norm
        assert torch.equal(hidden[0][k], hidden[1][k]), k
    outputs = []
    for part, model in zip(layers, (whole, cut)):
        hook = part[2].register_forward_hook(lambda module, inputs, output: outputs.append(output))
        model(input_ids=ids)
        hook.remove()
    first, second = (o[0] if isinstance(o, tuple) else o for o in outputs)
    assert torch.equal(first, second)


@pytest.fixture
def layer_calls(monkeypatch):
    """Forwards of each of the teacher's decoder layers, as {index: count}, of all runs in a test."""
    calls: dict[int, int] = {}
    load = teacher.load_teacher

    def counted(*arguments):
        held = load(*arguments)
        for i, layer in enumerate(family_of(held.model.config).decoder_layers(held.model)):
            layer.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls.get(i, 0) + 1))
        return held

    monkeypatch.setattr("vlsi_fast.stages.stage.load_teacher", counted)
    return calls


@pytest.mark.parametrize(
    ("stage", "last", "depth"), [("verbalize", "kld", 5), ("interact", "kld", 6), ("interact", "none", 5)]
)
def test_needed_layers_run_once_a_micro_batch(workspace, in_one_process, tmp_path, layer_calls, stage, last, depth):
    """Two steps of two micro-batches, with gradient checkpointing of the student."""
    folders = {role: in_one_process / "replicated" / "verbalize" / role for role in ("teacher", "student")}
    speakers = {} if stage == "verbalize" else {role: {"verbalizers": str(f)} for role, f in folders.items()}
    training = {"max_steps": 2, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}
    sections = speakers | {"interact": {"last": last}, "training": training}
    tree = runs.settings(workspace, tmp_path / "run")
    sections["training"] = tree["training"] | training
    in_process(workspace, tmp_path / "run", "replicated", stage, sections)
    assert layer_calls == dict.fromkeys(range(depth), 4)


# ---- int8 and nf4: what is asked of bitsandbytes, and what is said where it cannot work ----


@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_quantization_leaves_head_and_vision_alone(workspace, mode):
    config = teacher.quantization(workspace / "teacher", mode)
    assert set(config.llm_int8_skip_modules) == {"lm_head", "model.visual", "model.language_model.norm"}
    assert (config.load_in_8bit, config.load_in_4bit) == (mode == "int8", mode == "nf4")
    if mode == "nf4":
        assert config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
        assert config.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.parametrize("mode", ["int8", "nf4"])
def test_quantized_modes_say_what_they_need(workspace, tmp_path, monkeypatch, mode):
    with pytest.raises(ConfigError, match=f"{mode} needs an NVIDIA GPU.*use zero3 .*replicated, or offload"):
        in_process(workspace, tmp_path / "run", mode, "verbalize")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install bitsandbytes, or use zero3"):
        teacher.resolve_mode(mode, torch.device("cuda"))


def test_zero3_needs_zero3(workspace, tmp_path):
    with pytest.raises(ConfigError, match="training.deepspeed to a ZeRO stage 3.*auto, replicated or offload"):
        in_process(workspace, tmp_path / "run", "zero3", "verbalize")
    assert teacher.resolve_mode("auto", torch.device("cpu")) == "replicated"


def test_only_the_teacher_has_a_mode(workspace, tmp_path):
    tree = runs.settings(workspace, tmp_path / "run")
    tree["student"]["mode"] = "offload"
    with pytest.raises(ConfigError, match="student.mode: no such option"):
        load_config(runs.write_config(tree, tmp_path / "config.yaml"))


def test_what_a_quantized_teacher_made_belongs_to_it(workspace, in_one_process, tmp_path, monkeypatch):
    """Verbalizers of a whole-precision teacher are refused for an int8 one; the check comes before any loading."""
    monkeypatch.setattr("vlsi_fast.stages.stage.resolve_mode", lambda mode, device: mode)
    folders = {role: in_one_process / "replicated" / "verbalize" / role for role in ("teacher", "student")}
    sections = {role: {"verbalizers": str(folder)} for role, folder in folders.items()}
    sections["teacher"]["mode"] = "int8"
    with pytest.raises(LineageError, match="teacher.quantization is None in the verbalize stage and 'int8' here"):
        in_process(workspace, tmp_path / "run", "int8", "interact", sections)


def test_offload_keeps_the_runs_numbers_for_gathering():
    config = teacher.offload_config(runs.zero3(), "bfloat16", True)["zero_optimization"]
    assert config["stage"] == 3 and config["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert config["stage3_max_live_parameters"] == 1000000000 and config["stage3_param_persistence_threshold"] == 0
