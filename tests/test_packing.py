"""Rows without padding: the same losses and gradients as with it, in every family, by every way to run."""

import pytest
import tiny_families as families
import torch
import varlen_standin
from kernels_util import relative_error
from packed_rows import ATTENDING, NAMES, PACKED, ROWS, TEXT, batches, compare, encoded, processor, spoken
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from vlsi_fast.acceleration import use_packing
from vlsi_fast.attention import VARLEN, set_varlen, varlen_problem
from vlsi_fast.backbones import family_of
from vlsi_fast.config import ConfigError
from vlsi_fast.data import Collator
from vlsi_fast.data.collate import blank_image
from vlsi_fast.data.encoding import configure_image_bounds
from vlsi_fast.data.packing import Packer, join_image_inputs
from vlsi_fast.stages.batches import StageCollator, to_device


@pytest.mark.parametrize("name, architecture", [each for each in families.ARCHITECTURES if each[0] in PACKED])
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


@pytest.mark.parametrize("name", PACKED)
def test_a_blank_image_is_a_row_of_its_own(name):
    """A batch without images runs the vision tower all the same, and says the same."""
    (plain, _), (_, packed) = batches(name, TEXT), batches(name, TEXT, always_image=True)
    assert packed["facts"]["padding"] > 0, "the blank image's tokens are nobody's"
    one, other = spoken(name, plain, ATTENDING[name]), spoken(name, packed, ATTENDING[name])
    vision = {n for n in other[2].keys() - one[2].keys()}
    model = families.make_model(name)
    assert vision and all("language_model" not in n for n in vision)
    assert not any(other[2][n].any() for n in vision)
    assert family_of(model.config).vision(model)
    compare(one, (*other[:2], {n: g for n, g in other[2].items() if n not in vision}))


@pytest.mark.parametrize("name", [name for name in PACKED if name in families.GRIDS])
def test_image_inputs_of_joined_batches_are_those_of_all_images(name):
    packer = Packer(families.make_model(name).config)
    grids = [torch.tensor(sizes) for sizes in ([[1, 4, 6]], [[1, 2, 2], [1, 10, 4]], [[1, 8, 8]])]
    joined, whole = (
        join_image_inputs([packer.image_inputs(grid) for grid in grids]),
        packer.image_inputs(torch.cat(grids)),
    )
    assert joined.keys() == whole.keys() and len(whole) >= 3
    for key, value in whole.items():
        torch.testing.assert_close(joined[key], value, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_a_blank_image_is_as_small_as_the_processor_allows(name):
    """A run's lower bound on pixels makes it no larger, and holds for the run's images afterwards."""
    made, image = families.make_processor(name), Image.new("RGB", (32, 32))
    if name in families.GRIDS:
        configure_image_bounds(made, 8192, 16384)
    usual = made(text=[made.image_token], images=[image], return_tensors="pt")["input_ids"]
    tokens = int((blank_image(made)["input_ids"] == made.image_token_id).sum())
    assert tokens <= 4 if name != "llava_onevision" else tokens < usual.shape[1]  # SmolVLM: one tile of 4
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


def attending_verbalizers(name):
    return 3 if ATTENDING[name] == "decoder" else 0


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


@pytest.mark.parametrize("name", PACKED)
def test_row_bounds_reach_the_language_models_attention_alone(name):
    """As flash-attention gets them: without a mask, rows kept apart by their bounds, in backbone and verbalizers."""
    AttentionInterface.register("bounded", bounded_attention)
    AttentionMaskInterface.register("bounded", flash_attention_mask)
    padded, packed = batches(name, ROWS)
    language_only = {"text_config": "bounded", "vision_config": "sdpa"}
    calls.clear()
    compare(spoken(name, padded, ATTENDING[name]), spoken(name, packed, ATTENDING[name], attention=language_only))
    assert len(calls) == 4 + attending_verbalizers(name), "four layers of the backbone and three verbalizers"


# ---- torch's own varlen_attn; the CPU has none, so a stand-in of each signature ----


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("standin, kv_heads", zip(varlen_standin.SIGNATURES.values(), (2, 1, 1)))
def test_varlen_is_sdpa(monkeypatch, name, standin, kv_heads):
    """Language model, decoder verbalizers and the trained vision tower; rows of several images of different sizes."""
    calls = varlen_standin.install(monkeypatch, standin)
    padded, packed = batches(name, ROWS)
    stock = spoken(name, padded, ATTENDING[name], kv_heads=kv_heads)
    assert not calls
    compare(stock, spoken(name, packed, ATTENDING[name], attention=VARLEN, kv_heads=kv_heads))
    causal = [call for call in calls if call.causal]
    assert len(causal) == 4 + attending_verbalizers(name) and len(calls) - len(causal) == 2, "one a layer; vision"
    lengths = packed["batch"]["student"]["inputs"]["packed"]["cu_seq_lens_q"].diff()
    assert all(torch.equal(call.lengths, lengths) and call.longest == lengths.max() for call in causal)
    images = [call.lengths.tolist() for call in calls if not call.causal]
    assert all(len(lengths) >= 4 for lengths in images), "four images, and windows or tiles of them"
    assert name not in families.GRIDS or any(len(set(lengths)) > 1 for lengths in images)


@pytest.mark.parametrize("name", PACKED)
def test_varlen_under_gradient_checkpointing(monkeypatch, name):
    calls = varlen_standin.install(monkeypatch)
    _, packed = batches(name, ROWS)
    once = spoken(name, packed, ATTENDING[name], attention=VARLEN)
    count = len(calls)
    again = spoken(name, packed, ATTENDING[name], attention=VARLEN, checkpointing=True)
    assert len(calls) > 2 * count, "layers ran again"
    compare(once, again)


@pytest.mark.parametrize("name", PACKED)
def test_varlen_takes_no_padding(monkeypatch, name):
    varlen_standin.install(monkeypatch)
    padded, _ = batches(name, ROWS)
    with pytest.raises(ValueError, match="was given padded ones or a cache: set data.padding_free to auto"):
        spoken(name, padded, "verb_ffn", attention=VARLEN)


class Calls(TorchDispatchMode):
    """Counts calls of torch's own operator."""

    def __init__(self):
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.forward += func is torch.ops.torch_attn._varlen_attn.default
        self.backward += func is torch.ops.torch_attn._varlen_attn_backward.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", PACKED)
def test_no_layer_waits_for_the_device(name):
    """On the meta device, where there are no values to wait for, by torch's own operator, forward and backward."""
    model = families.make_model(name, kv_heads=1).to(torch.bfloat16).to("meta")
    set_varlen(model)
    hidden = torch.empty(1, 20, 32, dtype=torch.bfloat16, device="meta", requires_grad=True)
    bounds = torch.empty(4, dtype=torch.int32, device="meta")
    positions = torch.empty((4, 1, 20) if name in families.GRIDS else (1, 20), dtype=torch.long, device="meta")
    keywords = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 9, "max_length_k": 9}
    with Calls() as calls:
        out = model.get_decoder()(inputs_embeds=hidden, position_ids=positions, use_cache=False, **keywords)
        assert out.last_hidden_state.shape == (1, 20, 32) and (calls.forward, calls.backward) == (4, 0)
        out.last_hidden_state.sum().backward()
        assert calls.backward == 4
    if name not in families.GRIDS:
        return
    _, packed = batches(name, ROWS)
    inputs = packed["batch"]["student"]["inputs"]
    patches = inputs["pixel_values"].bfloat16().to("meta").requires_grad_()
    made = {key: value for key, value in inputs.items() if key.startswith("image_")}
    made = {key: value.to("meta") if isinstance(value, torch.Tensor) else value for key, value in made.items()}
    with Calls() as calls:
        grid = torch.as_tensor(made.pop("image_grid_thw"))  # on the host, but for GLM's embedding of positions
        grid = grid.to("meta") if name == "glm4v" else grid
        seen = model.model.visual(patches, grid, **{key.removeprefix("image_"): made[key] for key in made})
        assert calls.forward == 2, "one call a layer for all images"
        seen.pooler_output.sum().backward()
        assert calls.backward == 2


# ---- which runs pack ----


QWEN = families.make_model("qwen2_vl").config


def test_auto_packs_for_flash_attention_alone():
    flash = dict.fromkeys(("flash_attention_2", "flash_attention_3", VARLEN), True)
    for name, packed in (flash | {"sdpa": False, "eager": False}).items():
        assert use_packing("auto", name, QWEN) is packed
        assert use_packing(True, name, QWEN) and not use_packing(False, name, QWEN)
    with pytest.raises(ConfigError, match="paged.* is not known to keep packed rows apart: set attn_implementation"):
        use_packing(True, "paged|sdpa", QWEN)
    assert not use_packing("auto", "paged|sdpa", QWEN)


def test_gemma3_is_not_packed():
    """The stock mask of packed rows is wrong in its sliding-window layers: shown, so that a mended one is noticed."""
    padded, packed = batches("gemma3", ROWS)
    right, wrong = spoken("gemma3", padded, "verb_ffn"), spoken("gemma3", packed, "verb_ffn")
    assert (right[1] - wrong[1]).abs().max() > 1e-2
    compare(*(spoken("gemma3", batch, "decoder") for batch in batches("gemma3", TEXT)))  # without images it is right
    config = families.make_model("gemma3").config
    with pytest.raises(ConfigError, match="packed rows is wrong for gemma3.*data.padding_free to auto or false"):
        use_packing(True, "sdpa", config)
    assert not use_packing("auto", "sdpa", config) and not use_packing(False, "sdpa", config)


@pytest.mark.parametrize("name", families.RECURRENT)
def test_linear_attention_is_never_packed(name):
    """Its state would run on from row to row, whatever attention runs."""
    config = families.make_model(name).config
    for attention in ("flash_attention_2", "sdpa"):
        assert not use_packing("auto", attention, config) and not use_packing(False, attention, config)
        with pytest.raises(ConfigError, match=f"{name} has linear-attention layers, .* set data.padding_free to auto"):
            use_packing(True, attention, config)
    assert "linear-attention layers, whose rows are padded" in varlen_problem("bfloat16", torch.device("cuda"), config)
    _, packed = batches(name, ROWS)
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):  # nor does the stock model, without fla
        spoken(name, packed, "verb_ffn")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", PACKED)
def test_whole_models_on_the_gpu(name):
    """Backbone, vision tower and decoder verbalizers in bfloat16: at most twice as far from float32 with sdpa as
    bfloat16 with sdpa is."""
    device = torch.device("cuda")
    padded, packed = batches(name, ROWS)

    def said(batch, **options):
        batch = {"batch": to_device(batch["batch"], device)}
        return spoken(name, batch, ATTENDING[name], device=device, kv_heads=1, **options)

    truth = said(padded)
    plain, ours = said(padded, dtype=torch.bfloat16), said(packed, dtype=torch.bfloat16, attention=VARLEN)
    for part in range(2):
        assert relative_error(ours[part], truth[part]) <= 2 * relative_error(plain[part], truth[part])
    gradients = [torch.cat([made[2][key].flatten().double() for key in truth[2]]) for made in (truth, plain, ours)]
    assert relative_error(gradients[2], gradients[0]) <= 2 * relative_error(gradients[1], gradients[0])
