"""Verbalizers: the paper's parameter counts, each architecture's formula, storage, independence of layers."""

import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.nn.functional import silu
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding

from vlsi_fast.config import ARCHITECTURES
from vlsi_fast.verbalizer import CONFIG_NAME, WEIGHTS_NAME, Verbalizers, VerbalizerSpec, read_spec

TOKEN_WISE = [name for name in ARCHITECTURES if not name.startswith("decoder")]
WIDTH, INNER, LAYERS = 32, 64, (1, 3)


@pytest.fixture(scope="module")
def backbone_config():
    return tiny.make_model(hidden=WIDTH, layers=4).config


def make_spec(backbone_config, architecture, norm=False, residual=False, layers=LAYERS, output_size=None):
    settings = SimpleNamespace(architecture=architecture, norm=norm, residual=residual)
    return VerbalizerSpec.of(backbone_config, layers, settings, output_size)


def make(backbone_config, architecture, seed=0, **options) -> Verbalizers:
    """Verbalizers with random norms, so that a norm left out is seen."""
    torch.manual_seed(seed)
    module = Verbalizers(make_spec(backbone_config, architecture, **options))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return module


def inputs(spec: VerbalizerSpec, seed=1, rows=2, length=5):
    """Hidden states of each layer, and what the backbone would hand its own layer: causal mask, positions."""
    generator = torch.Generator().manual_seed(seed)
    if not spec.is_decoder:
        return [torch.randn(7, WIDTH, generator=generator) for _ in spec.layers], None
    hidden = [torch.randn(rows, length, WIDTH, generator=generator) for _ in spec.layers]
    config = Qwen2VLConfig(**{k: v for k, v in spec.backbone_config.items() if k != "model_type"})
    positions = torch.arange(length).expand(3, rows, length)
    rotary = Qwen2VLRotaryEmbedding(config.get_text_config())(hidden[0], positions)
    mask = torch.full((length, length), -math.inf).triu(1)[None, None].expand(rows, 1, length, length)
    return hidden, [{"attention_mask": mask, "position_embeddings": rotary}] * len(hidden)


# ---- table 4f ----


@pytest.mark.parametrize(
    "architecture, millions",
    [
        ("mlp", 89.9),
        ("mlp_x2", 179.8),
        ("verb_ffn", 269.7),
        ("verb_ffn_x2", 539.5),
        ("ffn", 1425.8),
        ("ffn_x2", 2851.6),
        ("decoder", 1631.3),
        ("decoder_x2", 3262.6),
    ],
)
def test_parameter_counts_of_table_4f(architecture, millions):
    """At the true shape of Qwen2-VL-7B with the paper's seven target layers."""
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        }
    )
    with torch.device("meta"):
        module = Verbalizers(make_spec(config, architecture, layers=range(2, 28, 4)))
    assert all(p.is_meta for p in module.parameters()) and len(module.layers) == 7
    assert round(sum(p.numel() for p in module.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_norm_is_all_that_norm_adds(backbone_config, architecture):
    def count(norm):
        return sum(p.numel() for p in Verbalizers(make_spec(backbone_config, architecture, norm)).parameters())

    norms = (2 if architecture.startswith("decoder") else 1) * (2 if architecture.endswith("_x2") else 1)
    assert count(True) - count(False) == norms * WIDTH * len(LAYERS)


# ---- formulas ----


def plain_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def plain_block(state: dict, x, i: int, spec: VerbalizerSpec):
    """One token-wise block, from the table's words."""
    part = {name.removeprefix(f"blocks.{i}."): w for name, w in state.items() if name.startswith(f"blocks.{i}.")}
    h = silu(x) if i == 1 and "linear" in part else x
    h = plain_norm(h, part["norm.weight"], spec.rms_norm_eps) if spec.norm else h
    if "linear" in part:
        h = h @ part["linear"].T
    else:
        h = (silu(h @ part["gate"].T) * (h @ part["up"].T)) @ part["down"].T
    return x + h if spec.residual else h


def rotated(x, position: int):
    """Rotary embedding of one head's vector at one position, as pairs (j, j + half); base 1e6 is Qwen2's."""
    half = len(x) // 2
    angle = position * 1e6 ** (-torch.arange(half, dtype=torch.float64) * 2 / len(x))
    a, b = x[:half], x[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


def plain_attention(state: dict, x, heads: int):
    """Causal self-attention of one row [T, d], token by token and head by head."""
    size = x.shape[1] // heads
    q, k, v = (x @ state[f"self_attn.{name}_proj.weight"].T for name in "qkv")
    rows = []
    for t in range(len(x)):
        parts = []
        for j in range(heads):
            head = slice(j * size, (j + 1) * size)
            query = rotated(q[t, head], t)
            scores = torch.stack([query @ rotated(k[u, head], u) for u in range(t + 1)]) / size**0.5
            parts.append(scores.softmax(0) @ v[: t + 1, head])
        rows.append(torch.cat(parts) @ state["self_attn.o_proj.weight"].T)
    return torch.stack(rows)


def plain_decoder(state: dict, x, spec: VerbalizerSpec, heads: int):
    def norm(h, name):
        return plain_norm(h, state[f"{name}.weight"], spec.rms_norm_eps) if spec.norm else h

    x = x + torch.stack([plain_attention(state, row, heads) for row in norm(x, "input_layernorm")])
    h = norm(x, "post_attention_layernorm")
    gate, up, down = (state[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    return x + (silu(h @ gate.T) * (h @ up.T)) @ down.T


def plain(module: Verbalizers, layer: int, x):
    state = {name: w.detach().double() for name, w in module.layers[str(layer)].state_dict().items()}
    x, spec = x.double(), module.spec
    for i in range(2 if spec.architecture.endswith("_x2") else 1):
        if spec.is_decoder:
            part = {name.removeprefix(f"blocks.{i}."): w for name, w in state.items() if f"blocks.{i}." in name}
            x = plain_decoder(part, x, spec, heads=2)
        else:
            x = plain_block(state, x, i, spec)
    return x


def perturbed(module: Verbalizers) -> Verbalizers:
    """Random weights where a residual starts at zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return module


VARIANTS = [(a, norm, residual) for a in TOKEN_WISE for norm in (False, True) for residual in (False, True)]
VARIANTS += [(a, norm, False) for a in ("decoder", "decoder_x2") for norm in (False, True)]


@pytest.mark.parametrize("architecture, norm, residual", VARIANTS)
def test_formula(backbone_config, architecture, norm, residual):
    module = perturbed(make(backbone_config, architecture, norm=norm, residual=residual))
    hidden, attention = inputs(module.spec)
    spoken = module(hidden, attention)
    assert spoken.shape == (len(LAYERS), *hidden[0].shape)
    for layer, x, y in zip(LAYERS, hidden, spoken):
        wanted = plain(module, layer, x)
        torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=2e-5 * wanted.abs().max().item())


def test_decoder_has_no_biases(backbone_config):
    names = [name for name, _ in Verbalizers(make_spec(backbone_config, "decoder", norm=True)).named_parameters()]
    assert not [name for name in names if "bias" in name]


@pytest.mark.parametrize("architecture", TOKEN_WISE)
@pytest.mark.parametrize("norm", [False, True])
def test_residual_starts_as_the_identity(backbone_config, architecture, norm):
    module = make(backbone_config, architecture, norm=norm, residual=True)
    hidden, _ = inputs(module.spec)
    torch.testing.assert_close(module(hidden), torch.stack(hidden), rtol=0, atol=0)
    assert not torch.allclose(make(backbone_config, architecture, norm=norm)(hidden), torch.stack(hidden), atol=0.1)
    module(hidden).square().sum().backward()
    assert all(
        layer.blocks[-1].get_parameter(name).grad.any()
        for layer in module.layers.values()
        for name in ("linear" if "mlp" in architecture else "down",)
    )


def test_output_size_widens(backbone_config):
    module = make(backbone_config, "verb_ffn", output_size=48)
    hidden, _ = inputs(module.spec)
    assert module(hidden).shape == (2, 7, 48)
    assert {tuple(p.shape) for p in module.parameters()} == {(48, WIDTH), (48, 48)}
    assert make_spec(backbone_config, "verb_ffn", output_size=WIDTH).output_size is None


def test_output_follows_the_order_of_the_layers(backbone_config):
    module = make(backbone_config, "mlp", layers=(3, 1, 2))
    hidden = [torch.full((1, WIDTH), float(i)) for i in range(3)]
    weights = [module.layers[str(k)].blocks[0].linear for k in (3, 1, 2)]
    wanted = torch.stack([h @ w.T for h, w in zip(hidden, weights)])
    torch.testing.assert_close(module(hidden), wanted)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_do_not_share_gradients(backbone_config, architecture):
    module = perturbed(make(backbone_config, architecture, norm=True))
    hidden, attention = inputs(module.spec)
    module(hidden, attention)[1].square().sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in module.layers["1"].parameters())
    assert all(p.grad.any() for p in module.layers["3"].parameters())


# ---- storage ----


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("norm", [False, True])
def test_saved_verbalizers_load_alone(backbone_config, tmp_path, architecture, norm):
    module = make(backbone_config, architecture, norm=norm)
    module.save_pretrained(tmp_path / "deep" / "folder")
    torch.manual_seed(99)
    loaded = Verbalizers.from_pretrained(tmp_path / "deep" / "folder")
    assert json.loads(json.dumps(asdict(loaded.spec))) == json.loads(json.dumps(asdict(module.spec)))
    hidden, attention = inputs(module.spec)
    assert torch.equal(loaded(hidden, attention), module(hidden, attention))


def test_stored_spec_is_readable(backbone_config, tmp_path):
    make(backbone_config, "ffn", norm=True, residual=True).save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [WEIGHTS_NAME, CONFIG_NAME]
    assert json.loads((tmp_path / CONFIG_NAME).read_text()) == {
        "architecture": "ffn",
        "layers": [1, 3],
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "rms_norm_eps": backbone_config.get_text_config().rms_norm_eps,
        "norm": True,
        "residual": True,
        "output_size": None,
        "translates": False,
        "model_type": "qwen2_vl",
        "backbone_config": None,
        "made_for": {},
    }
    assert read_spec(tmp_path) == make_spec(backbone_config, "ffn", True, True)


@pytest.mark.parametrize("name", [CONFIG_NAME, WEIGHTS_NAME])
def test_missing_files(backbone_config, tmp_path, name):
    make(backbone_config, "mlp").save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no verbalizers \\({name} is missing\\); run the verbalize"):
        Verbalizers.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": 16}, r"layers.1.blocks.0.linear: stored shape \(32, 32\), expected \(16, 16\)"),
        ({"layers": [1, 2]}, r"missing \['layers.2.blocks.0.linear'\], unknown \['layers.3.blocks.0.linear'\]"),
        ({"norm": True}, r"missing \['layers.1.blocks.0.norm.weight', .*unknown \[\]"),
        ({"architecture": "mlp_x2"}, r"missing \['layers.1.blocks.1.linear', 'layers.3.blocks.1.linear'\]"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_their_spec(backbone_config, tmp_path, change, message):
    make(backbone_config, "mlp").save_pretrained(tmp_path)
    fields = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps(fields | change))
    with pytest.raises(ValueError, match=message):
        Verbalizers.from_pretrained(tmp_path)
