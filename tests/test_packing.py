"""Rows without padding: the same losses and gradients as with it, in every family, by every way to run."""

from functools import cache

import pytest
import tiny_families as families
import torch
from PIL import Image
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from vlsi_fast.acceleration import use_packing
from vlsi_fast.backbones import FAMILIES, family_of
from vlsi_fast.config import ConfigError
from vlsi_fast.config_data import DataConfig
from vlsi_fast.data import Collator
from vlsi_fast.data.collate import blank_image
from vlsi_fast.data.encoding import configure_image_bounds, encode
from vlsi_fast.data.messages import Sample
from vlsi_fast.data.packing import Packer
from vlsi_fast.hidden_states import VerbalizedBackbone
from vlsi_fast.stages.batches import StageCollator
from vlsi_fast.verbalizer import Verbalizers, VerbalizerSpec

NAMES = sorted(FAMILIES)
CONFIG = DataConfig(train=[{"reader": "easy_vqa"}])
ROWS = [  # question, images, answer: of different lengths, several images, none
    ("What shape is in the image?", [(64, 20)], "a red circle"),
    ("yes or no?", [], "no"),
    ("Which of the two?", [(20, 64), (48, 40)], "yes, a blue rectangle"),
    ("Is it red?", [(40, 40)], "yes"),
]
TEXT = [ROWS[1], ("Is there a triangle in it?", [], "yes yes, no")]


@cache
def processor(name):
    return families.make_processor(name)


def picture(size):
    return Image.effect_noise(size, 90).convert("RGB")


def encoded(name, rows):
    made = []
    for question, images, answer in rows:
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
        turns = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        made.append(encode(Sample("row", turns, images), processor(name), CONFIG, picture))
    return made


def batches(name, rows, always_image=False):
    """The same rows padded and packed."""
    made = [{"id": str(i), "skipped": [], "student": row} for i, row in enumerate(encoded(name, rows))]
    config = families.make_model(name, tokenizer=processor(name).tokenizer).config
    for packers in ({}, {"student": Packer(config)}):
        collator = Collator({"student": processor(name)}, always_image, packers)
        yield StageCollator(collator, ("student",))(made)


def spoken(name, batch, architecture, **options):
    """What the model says at the answers, and gradients of the sum of what it says, weighted."""
    model = families.make_model(name, tokenizer=processor(name).tokenizer)
    model.set_attn_implementation(options.get("attention", "sdpa"))
    layers = [1, 2, 3]
    spec = VerbalizerSpec(
        architecture, tuple(layers), 32, 64, 1e-6, model_type=name, backbone_config=model.config.to_dict()
    )
    torch.manual_seed(0)
    verbalizers = Verbalizers(spec, "torch")
    backbone = VerbalizedBackbone(model, layers, verbalizers, train_backbone=True).train()
    if options.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    out, last = backbone(batch["batch"]["student"]["inputs"], batch["batch"]["student"]["index"])
    weight = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
    ((out * weight).sum() + (last * weight[0]).sum()).backward()
    return out, last, {n: p.grad for n, p in backbone.named_parameters() if p.grad is not None}


def compare(one, other):
    """Both orders of summation are float32's."""
    for a, b in zip(one[:2], other[:2]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
    assert one[2].keys() == other[2].keys()
    scale = max(g.abs().max() for g in one[2].values())
    for name, gradient in one[2].items():
        torch.testing.assert_close(gradient, other[2][name], rtol=1e-4, atol=2e-6 * float(scale), msg=name)


@pytest.mark.parametrize("architecture", ["verb_ffn", "decoder"])
@pytest.mark.parametrize("name", NAMES)
def test_packed_is_padded(name, architecture):
    """Rows of several images, one and none; decoder verbalizers attend too; under gradient checkpointing."""
    padded, packed = batches(name, ROWS)
    tokens = padded["facts"]["tokens"]
    assert packed["facts"]["positions"] == packed["facts"]["tokens"] == tokens and packed["facts"]["padding"] == 0
    assert padded["facts"]["positions"] - padded["facts"]["padding"] == tokens and padded["facts"]["padding"] > 20
    inputs = packed["batch"]["student"]["inputs"]
    assert "attention_mask" not in inputs and inputs["input_ids"].shape == (1, tokens)
    assert torch.equal(packed["batch"]["student"]["labels"], padded["batch"]["student"]["labels"])
    compare(spoken(name, padded, architecture), spoken(name, packed, architecture, checkpointing=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_blank_image_is_a_row_of_its_own(name):
    """A batch without images runs the vision tower all the same, and says the same."""
    (plain, _), (_, packed) = batches(name, TEXT), batches(name, TEXT, always_image=True)
    assert packed["facts"]["padding"] > 0, "the blank image's tokens are nobody's"
    one, other = spoken(name, plain, "decoder"), spoken(name, packed, "decoder")
    vision = {n for n in other[2].keys() - one[2].keys()}
    model = families.make_model(name)
    assert vision and all("language_model" not in n for n in vision)
    assert not any(other[2][n].any() for n in vision)
    assert family_of(model.config).vision(model)
    compare(one, (*other[:2], {n: g for n, g in other[2].items() if n not in vision}))


@pytest.mark.parametrize("name", NAMES)
def test_a_blank_image_is_as_small_as_the_processor_allows(name):
    """A run's lower bound on pixels makes it no larger, and holds for the run's images afterwards."""
    made, image = families.make_processor(name), Image.new("RGB", (32, 32))
    if name != "llava_onevision":
        configure_image_bounds(made, 8192, 16384)
    usual = made(text=[made.image_token], images=[image], return_tensors="pt")["input_ids"]
    tokens = int((blank_image(made)["input_ids"] == made.image_token_id).sum())
    assert tokens <= 4 if name != "llava_onevision" else tokens < usual.shape[1]
    assert torch.equal(made(text=[made.image_token], images=[image], return_tensors="pt")["input_ids"], usual)


def test_the_last_token_of_a_row_does_not_predict_the_next_rows_first():
    rows = encoded("qwen2_vl", ROWS[:2])
    for row in rows:
        row["labels"] = row["input_ids"].clone()
    made = [{"id": "0", "skipped": [], "student": row} for row in rows]
    packer = Packer(families.make_model("qwen2_vl").config)
    both = [
        StageCollator(Collator({"student": processor("qwen2_vl")}, packers=packers), ("student",))(made)
        for packers in ({}, {"student": packer})
    ]
    counts = [batch["facts"]["answer_tokens"] for batch in both]
    assert counts[0] == counts[1] == sum(row["input_ids"].shape[1] - 1 for row in rows)


# ---- attention that gets row bounds instead of a mask ----


calls = []


def bounded_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    cu_seq_lens_q=None,
    cu_seq_lens_k=None,
    max_length_q=None,
    max_length_k=None,
    scaling=None,
    **kwargs,
):
    """What flash-attention's varlen function computes, a row at a time."""
    assert attention_mask is None and torch.equal(cu_seq_lens_q, cu_seq_lens_k)
    assert isinstance(max_length_q, int), "a tensor would be waited for"
    assert max_length_q == max_length_k == cu_seq_lens_q.diff().max()
    calls.append(module)
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    bounds = cu_seq_lens_q.tolist()
    rows = [
        torch.nn.functional.scaled_dot_product_attention(
            query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=module.is_causal, scale=scaling
        )
        for a, b in zip(bounds, bounds[1:])
    ]
    return torch.cat(rows, dim=2).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("name", NAMES)
def test_row_bounds_reach_the_language_models_attention_alone(name):
    """As flash-attention gets them: without a mask, rows kept apart by their bounds, in backbone and verbalizers."""
    AttentionInterface.register("bounded", bounded_attention)
    AttentionMaskInterface.register("bounded", flash_attention_mask)
    padded, packed = batches(name, ROWS)
    language_only = {"text_config": "bounded", "vision_config": "sdpa"}
    calls.clear()
    compare(spoken(name, padded, "decoder"), spoken(name, packed, "decoder", attention=language_only))
    assert len(calls) == 4 + 3, "four layers of the backbone and three verbalizers"


# ---- which runs pack ----


def test_auto_packs_for_flash_attention_alone():
    for name, packed in {"flash_attention_2": True, "flash_attention_3": True, "sdpa": False, "eager": False}.items():
        assert use_packing("auto", name) is packed
        assert use_packing(True, name) and not use_packing(False, name)
    with pytest.raises(ConfigError, match="paged.* is not known to keep packed rows apart: set attn_implementation"):
        use_packing(True, "paged|sdpa")
    assert not use_packing("auto", "paged|sdpa")
