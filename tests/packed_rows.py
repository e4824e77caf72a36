"""Rows of several images, one and none, padded and packed, in every family, and what a model says of them."""

from __future__ import annotations

from functools import cache

import tiny_families as families
import torch
from PIL import Image

from vlsi_fast.attention import VARLEN, set_varlen
from vlsi_fast.backbones import FAMILIES
from vlsi_fast.config_data import DataConfig
from vlsi_fast.data import Collator
from vlsi_fast.data.encoding import encode
from vlsi_fast.data.messages import Sample
from vlsi_fast.data.packing import Packer
from vlsi_fast.hidden_states import VerbalizedBackbone
from vlsi_fast.stages.batches import StageCollator
from vlsi_fast.verbalizer import Verbalizers, VerbalizerSpec

NAMES = sorted(FAMILIES)
ATTENDING = {name: "decoder" if name in families.DECODERS else "verb_ffn" for name in NAMES}
"""Verbalizers that attend too, where the family has them."""
PACKED = [name for name in NAMES if not FAMILIES[name].images_look_ahead and name not in families.RECURRENT]
"""Families whose rows can be packed."""
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
    model = families.make_model(name, tokenizer=processor(name).tokenizer, kv_heads=options.get("kv_heads"))
    attention = options.get("attention", "sdpa")
    set_varlen(model) if attention == VARLEN else model.set_attn_implementation(attention)
    layers = [1, 2, 3]
    spec = VerbalizerSpec(
        architecture, tuple(layers), 32, 64, 1e-6, model_type=name, backbone_config=model.config.to_dict()
    )
    torch.manual_seed(0)
    verbalizers = Verbalizers(spec, "torch")
    backbone = VerbalizedBackbone(model, layers, verbalizers, train_backbone=True).train()
    backbone.to(options.get("device"))
    for parameter in backbone.parameters():  # not rotary embeddings' buffers, which stay in float32
        parameter.data = parameter.data.to(options.get("dtype"))
    if options.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    out, last = backbone(batch["batch"]["student"]["inputs"], batch["batch"]["student"]["index"])
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape)
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
