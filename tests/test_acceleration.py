"""Faster parts of the backbones: chosen where they apply, refused with the fix where they do not."""

import copy
import importlib
import json
from types import SimpleNamespace

import pytest
import tiny_families
import tiny_runs as runs
import torch
import varlen_standin

from vlsi_fast import load_config
from vlsi_fast.acceleration import apply_liger, attention_name, use_liger
from vlsi_fast.attention import VARLEN
from vlsi_fast.backbones import FAMILIES
from vlsi_fast.config import ConfigError
from vlsi_fast.data.answering.teacher import Teacher
from vlsi_fast.stages import STAGE_CLASSES, stage
from vlsi_fast.viewer import columns

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def config_of(workspace, output, **sections):
    tree = runs.settings(workspace, output, max_steps=1) | {"sft": {"start_from": "base"}} | sections
    return load_config(runs.write_config(tree, output.parent / f"{output.name}.yaml"))


# ---- attention ----


MODEL = tiny_families.make_model("qwen2_vl").config


def gpu(monkeypatch, capability=(8, 0), installed=()):
    """A CUDA device of torch's that can do flash-attention, and these versions of flash-attn."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    for version in (2, 3):
        found = version in installed
        monkeypatch.setattr(f"transformers.utils.is_flash_attn_{version}_available", lambda found=found: found)


@pytest.mark.parametrize(
    "installed, capability, padding_free, expected",
    [
        ((), (8, 0), "auto", VARLEN),
        ((), (8, 0), True, VARLEN),
        ((), (9, 0), "auto", VARLEN),
        ((), (8, 0), False, "sdpa"),
        ((), (7, 5), "auto", "sdpa"),
        ((2,), (8, 0), "auto", "flash_attention_2"),
        ((2,), (8, 0), False, "flash_attention_2"),
        ((2, 3), (9, 0), "auto", "flash_attention_3"),
        ((2, 3), (8, 0), "auto", "flash_attention_2"),
        ((3,), (8, 0), "auto", VARLEN),
        ((3,), (10, 0), False, "sdpa"),
    ],
)
def test_auto_attention(monkeypatch, installed, capability, padding_free, expected):
    gpu(monkeypatch, capability, installed)
    for dtype in ("bfloat16", "float16"):
        assert attention_name("auto", dtype, CUDA, padding_free, MODEL) == expected
    assert attention_name("auto", "float32", CUDA, padding_free, MODEL) == "sdpa"
    assert attention_name("auto", "bfloat16", CPU, padding_free, MODEL) == "sdpa"
    for name in ("sdpa", "eager", "flash_attention_2"):
        assert attention_name(name, "float32", CPU, padding_free, MODEL) == name


def test_images_that_look_ahead_need_a_mask(monkeypatch):
    """Gemma 3's image tokens attend to each other in both directions: no flash-attention, whatever is installed."""
    gpu(monkeypatch, (9, 0), (2, 3))
    model = tiny_families.make_model("gemma3").config
    for padding_free in ("auto", False):
        assert attention_name("auto", "bfloat16", CUDA, padding_free, model) == "sdpa"
    assert attention_name("eager", "bfloat16", CUDA, "auto", model) == "eager"
    for name in ("flash_attention_2", "flash_attention_3", VARLEN):
        with pytest.raises(ConfigError, match=f"is {name}, but in gemma3 .* Set attn_implementation to sdpa or auto"):
            attention_name(name, "bfloat16", CUDA, "auto", model)


def changed(**fields):
    config = copy.deepcopy(MODEL)
    vars(config.text_config).update(fields)
    return config


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("float32", CUDA, "auto", MODEL), "takes half precision, and dtype is float32: set dtype to bfloat16"),
        (
            ("bfloat16", CPU, "auto", MODEL),
            "needs an NVIDIA GPU, and this runs on cpu: set attn_implementation to auto",
        ),
        (
            ("bfloat16", CUDA, False, MODEL),
            "packed rows alone: set data.padding_free to auto, or attn_implementation to",
        ),
        (("bfloat16", CUDA, "auto", changed(layer_types=["sliding_attention"])), "has sliding-window layers"),
        (("bfloat16", CUDA, "auto", changed(attention_dropout=0.1)), "has attention_dropout"),
    ],
)
def test_varlen_that_cannot_run_is_refused(monkeypatch, arguments, said):
    gpu(monkeypatch)
    assert attention_name(VARLEN, "bfloat16", CUDA, "auto", MODEL) == VARLEN
    with pytest.raises(ConfigError, match=f"attn_implementation is {VARLEN}, but .*{said}"):
        attention_name(VARLEN, *arguments)
    assert attention_name("auto", *arguments) == "sdpa"


@pytest.mark.parametrize(
    "capability, built, said", [((7, 5), True, "capability 8.0"), ((8, 0), False, "this build of")]
)
def test_varlen_needs_a_gpu_and_a_build_that_have_it(monkeypatch, capability, built, said):
    gpu(monkeypatch, capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    with pytest.raises(ConfigError, match=said):
        attention_name(VARLEN, "bfloat16", CUDA, True, MODEL)
    assert attention_name("auto", "bfloat16", CUDA, True, MODEL) == "sdpa"


def losses(run):
    lines = [json.loads(line) for line in (run / "sft" / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_a_stage_with_varlen_has_the_losses_of_sdpa(workspace, tmp_path, monkeypatch):
    """The CPU stands in for a GPU; a whole stage loads, packs, trains and records, and a padded run says the same."""
    calls = varlen_standin.install(monkeypatch)
    monkeypatch.setattr("vlsi_fast.acceleration.varlen_problem", lambda dtype, device, config: None)
    for name, attention, padding_free in (("padded", "sdpa", False), ("varlen", VARLEN, "auto")):
        tree = runs.settings(workspace, tmp_path / name, max_steps=2) | {"sft": {"start_from": "base"}}
        tree["student"]["attn_implementation"], tree["data"]["padding_free"] = attention, padding_free
        config = load_config(runs.write_config(tree, tmp_path / f"{name}.yaml"))
        summary = STAGE_CLASSES["sft"](config).run()["summary"]
        assert summary["attention"] == {"student": attention}
        assert summary["padding_free"] == {"student": padding_free == "auto"} and bool(calls) == (attention == VARLEN)
    assert losses(tmp_path / "varlen") == pytest.approx(losses(tmp_path / "padded"), rel=1e-5)
    assert len(losses(tmp_path / "varlen")) == 2


def test_where_models_write_varlen_is_sdpa(workspace, tmp_path, monkeypatch):
    """Rows there are padded, or one row grows by a cache."""
    tree = runs.settings(workspace, tmp_path / "run")
    tree["teacher"]["attn_implementation"] = VARLEN
    config = load_config(runs.write_config(tree, tmp_path / "config.yaml"))
    assert Teacher.of(config, None, None, "cpu").attention == "sdpa"
    opened = []
    monkeypatch.setattr(columns, "open_speaker", lambda *names, **given: opened.append(given["attn_implementation"]))
    for attention in (VARLEN, "auto", "eager"):
        config.teacher.attn_implementation = attention
        source = columns.Source("teacher", "teacher", config.teacher.path, tmp_path)
        columns.open_source(SimpleNamespace(config=config), source)
    assert opened == ["sdpa", "sdpa", "eager"]


def test_the_choice_reaches_the_model_and_the_record_and_is_no_part_of_the_run(workspace, tmp_path, monkeypatch):
    """A run may go on with another attention: on another machine `auto` may be another one."""
    loaded, load = [], stage.load_backbone

    def recorded(folder, dtype, attention="sdpa", depth=None):
        loaded.append(attention)
        return load(folder, dtype, attention, depth)

    monkeypatch.setattr(stage, "load_backbone", recorded)
    config = config_of(workspace, tmp_path / "run")
    assert config.student.attn_implementation == "auto"
    record = STAGE_CLASSES["sft"](config).run()
    assert loaded[0] == "sdpa" and record["summary"]["attention"] == {"student": "sdpa"}
    config.student.attn_implementation = "eager"
    assert STAGE_CLASSES["sft"](config).run(resume=True)["state"] == "finished"
    record = STAGE_CLASSES["sft"](config.model_copy(update={"output_dir": str(tmp_path / "eager")})).run()
    assert record["summary"]["attention"] == {"student": "eager"}


# ---- liger-kernel ----


@pytest.fixture
def stock_classes():
    """liger-kernel replaces names in transformers' modules; they are put back behind the test."""
    modules = [
        importlib.import_module(f"transformers.models.{n}.modeling_{n}")
        for n in ("llama", "qwen2", "qwen3", "qwen3_moe")
    ]
    before = [dict(vars(module)) for module in modules]
    yield
    for module, names in zip(modules, before):
        vars(module).update(names)


def liger_installed(monkeypatch, installed):
    monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda: installed)


def test_where_liger_is_used(monkeypatch):
    liger_installed(monkeypatch, True)
    assert use_liger("auto", CUDA) and use_liger(True, CUDA)
    assert not use_liger("auto", CPU) and not use_liger(False, CUDA)
    with pytest.raises(ConfigError, match="need a CUDA device and the stage runs on cpu; use auto"):
        use_liger(True, CPU)
    liger_installed(monkeypatch, False)
    assert not use_liger("auto", CUDA) and not use_liger(False, CUDA)
    with pytest.raises(ConfigError, match="pip install liger-kernel"):
        use_liger(True, CUDA)


def test_liger_that_cannot_run_is_refused_before_weights_are_loaded(workspace, tmp_path, monkeypatch):
    liger_installed(monkeypatch, False)
    monkeypatch.setattr(stage, "load_backbone", None)
    with pytest.raises(ConfigError, match="pip install liger-kernel"):
        STAGE_CLASSES["sft"](config_of(workspace, tmp_path / "run", liger=True)).run()
    assert not (tmp_path / "run").exists()


def test_the_config_takes_auto_true_and_false_alone(workspace, tmp_path):
    assert config_of(workspace, tmp_path / "run").liger == "auto"
    for text, value in (("true", True), ("false", False), ("auto", "auto")):
        path = runs.write_config(runs.settings(workspace, tmp_path / "run"), tmp_path / "config.yaml")
        assert load_config(path, ["--liger", text]).liger is value or value == "auto"
    with pytest.raises(ConfigError, match="liger"):
        config_of(workspace, tmp_path / "run", liger="yes please")


@pytest.mark.parametrize("family", tiny_families.LIGER)
def test_liger_patches_norms_and_mlp_but_no_loss(stock_classes, family):
    """On the stock model itself: what is bound to its modules, and that its forward and the losses are untouched."""
    pytest.importorskip("liger_kernel")
    from liger_kernel.transformers.rms_norm import LigerRMSNorm
    from liger_kernel.transformers.swiglu import LigerSwiGLUMLP

    model, cross_entropy = tiny_families.make_model(family), torch.nn.functional.cross_entropy
    names = set(model.state_dict())
    name = {"qwen3_vl": "qwen3", "qwen3_vl_moe": "qwen3_moe", "smolvlm": "llama"}.get(family, "qwen2")
    assert apply_liger(model, required=True) == name
    adapter = FAMILIES[family]
    norms = [adapter.final_norm(model)]
    for layer in adapter.decoder_layers(model):
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
        norms += [layer.self_attn.q_norm, layer.self_attn.k_norm] if family in tiny_families.QUERY_NORMS else []
        if adapter.sparse_block is None:
            assert layer.mlp.forward.__func__ is LigerSwiGLUMLP.forward
        else:
            parts = [layer.mlp, layer.mlp.experts, layer.mlp.gate]
            assert not any("liger" in part.forward.__func__.__module__ for part in parts)
    assert all(norm.forward.__func__ is LigerRMSNorm.forward for norm in norms)
    assert all(norm.variance_epsilon == model.config.get_text_config().rms_norm_eps for norm in norms)
    for module in (model, model.model, model.get_decoder()):
        assert "forward" not in vars(module) and "liger" not in type(module).forward.__module__
    assert torch.nn.functional.cross_entropy is cross_entropy
    assert set(model.state_dict()) == names


def test_gemma3_has_no_liger():
    pytest.importorskip("liger_kernel")
    model = tiny_families.make_model("gemma3")
    stock = [module.forward for module in model.modules()]
    assert apply_liger(model) is None and stock == [module.forward for module in model.modules()]
    with pytest.raises(ConfigError, match="no part of liger-kernel is used for gemma3_text; set it to auto or false"):
        apply_liger(model, required=True)


@pytest.mark.parametrize("family, rope", [("qwen2_vl", False), ("llava_onevision", True)])
def test_the_right_call_is_made(monkeypatch, family, rope):
    patch = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    calls = []
    monkeypatch.setitem(patch.MODEL_TYPE_TO_APPLY_LIGER_FN, "qwen2", lambda **options: calls.append(options))
    model = tiny_families.make_model(family)
    apply_liger(model)
    losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    assert calls == [{"model": model.get_decoder(), "rope": rope, "rms_norm": True, "swiglu": True, **losses}]


def test_a_model_that_liger_does_not_know(monkeypatch):
    patch = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    monkeypatch.setattr(patch, "MODEL_TYPE_TO_APPLY_LIGER_FN", {})
    model = tiny_families.make_model("qwen3_vl")
    assert apply_liger(model) is None
    with pytest.raises(ConfigError, match="no part of liger-kernel is used for qwen3_vl_text; set it to auto or false"):
        apply_liger(model, required=True)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(tiny_families.LIGER)))
def test_families_without_liger(family):
    pytest.importorskip("liger_kernel")
    model = tiny_families.make_model(family)
    assert apply_liger(model) is None
    with pytest.raises(ConfigError, match="no part of liger-kernel is used for .*; set it to auto or false"):
        apply_liger(model, required=True)


def test_the_stage_patches_both_models_before_lora(workspace, tmp_path, monkeypatch):
    """CPU stands in for CUDA, and the patch for one that changes nothing."""
    patched = []

    def recorded(model, required):
        assert not required and not any("lora" in name for name, _ in model.named_modules())
        patched.append(model)
        return "qwen2"

    monkeypatch.setattr(stage, "use_liger", lambda asked, device: asked is not False)
    monkeypatch.setattr(stage, "apply_liger", recorded)
    interact = {"intermediate": "none", "last": "kld"}
    record = STAGE_CLASSES["interact"](config_of(workspace, tmp_path / "run", interact=interact, liger="auto")).run()
    assert len(patched) == 2 and record["summary"]["liger"] == {"student": "qwen2", "teacher": "qwen2"}
    record = STAGE_CLASSES["sft"](config_of(workspace, tmp_path / "off", liger=False)).run()
    assert len(patched) == 2 and record["summary"]["liger"] == {}
