"""int8 and nf4 teachers on the CPU, where bitsandbytes is installed: it has slow kernels there, and the guard that asks
for a GPU is lifted for them. No GPU has run them yet."""

import logging

import pytest
import tiny
import tiny_runs as runs
import torch
from torch import nn

from vlsi_fast import load_config, run, teacher
from vlsi_fast.backbones import family_of
from vlsi_fast.loading import load_backbone

bitsandbytes = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of each cast to float16 anew

STAGES = ("verbalize", "interact")
CLASSES = {"int8": "Linear8bitLt", "nf4": "Linear4bit"}
# Relative errors of a layer's output. int8 rounds weights and inputs to 1 / 127 of their largest; nf4 has 16 levels.
ERRORS = {"int8": (1e-3, 0.03), "nf4": (0.03, 0.15)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models and rows; the teacher's widths are multiples of 32, which bitsandbytes' CPU kernel of nf4 asks for."""
    folder = tmp_path_factory.mktemp("quantized")
    for role, options in (
        ("teacher", {"hidden": 128, "layers": 6, "seed": 1}),
        ("student", {"hidden": 32, "layers": 4, "seed": 2, "tied": True}),
    ):
        processor = tiny.make_processor("tiny", patch_size=8, min_pixels=1024, max_pixels=1024)
        tiny.make_model(tokenizer=processor.tokenizer, patch_size=8, **options).save_pretrained(folder / role)
        processor.save_pretrained(folder / role)
    runs.make_rows(folder, 16)
    return folder


@pytest.fixture(scope="module")
def ran(folder):
    """(mode, stage) -> the held teacher and the stage's module, of runs in bfloat16."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlsi_fast.stages.stage.resolve_mode", lambda mode, device: mode)
        for mode in ("replicated", *CLASSES):
            tree = runs.settings(folder, folder / mode, max_steps=2) | {"dtype": "bfloat16"}
            tree["teacher"]["mode"] = mode
            config = load_config(runs.write_config(tree, folder / f"{mode}.yaml"))
            for stage in STAGES:

                def kept(*arguments, key=(mode, stage)):
                    found[key] = teacher.load_teacher(*arguments)
                    return found[key]

                patch.setattr("vlsi_fast.stages.stage.load_teacher", kept)
                run(config, stage)
    return found


def decoder_layers(model):
    return family_of(model.config).decoder_layers(model)


@pytest.mark.parametrize("stage, depth", [("verbalize", 5), ("interact", 6)])
@pytest.mark.parametrize("mode", CLASSES)
def test_only_the_decoder_layers_are_quantized(ran, mode, stage, depth):
    """And only those that are read are there."""
    model = ran[mode, stage].model
    family = family_of(model.config)
    layers = decoder_layers(model)
    linears = [type(m).__name__ for m in layers.modules() if isinstance(m, nn.Linear)]
    assert len(layers) == depth and linears == [CLASSES[mode]] * 7 * depth
    kept = [family.head(model), family.final_norm(model), *family.vision(model)]
    assert all(type(m) is nn.Linear for part in kept for m in part.modules() if isinstance(m, nn.Linear))
    assert {p.dtype for part in kept for p in part.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("mode", CLASSES)
def test_every_layer_says_what_the_whole_one_says(ran, mode):
    """Within the rounding of its weights: the right weights are in the right place."""
    found = (decoder_layers(ran[name, "interact"].model) for name in ("replicated", mode))
    whole, quantized = (dict(layers.named_modules()) for layers in found)
    low, high = ERRORS[mode]
    for name, linear in quantized.items():
        if isinstance(linear, nn.Linear):
            x = torch.randn(64, linear.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
            with torch.no_grad():
                expected = whole[name](x).float()
                error = float((linear(x).float() - expected).norm() / expected.norm())
            assert low < error < high, name


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mode", CLASSES)
def test_losses_are_close_to_those_of_the_whole_teacher(folder, ran, mode, stage):
    found, whole = (runs.losses(folder / name, stage) for name in (mode, "replicated"))
    assert found == pytest.approx(whole, rel=0.02) and found != whole


@pytest.mark.parametrize("mode", CLASSES)
def test_the_student_is_not_quantized(folder, ran, mode):
    """LoRA was trained and merged into a stock checkpoint; nothing else of the student moved."""
    base = dict(load_backbone(folder / "student", "bfloat16").named_parameters())
    distilled = dict(load_backbone(folder / mode / "interact" / "student", "bfloat16").named_parameters())
    moved = {name for name in base if not torch.equal(base[name], distilled[name])}
    assert moved and all("language_model.layers" in name and name.endswith("proj.weight") for name in moved)
