"""What a plan needs to know of a model: exact parameter sizes, read off the stock class built without weights.

    d width        f inner width of the FFN        q, kv  width of queries, and of keys or values        V vocabulary
    E experts of a decoder layer                   k  of them that a token goes to

The model is built on the meta device from its `config.json` alone, so counts are those of the class that will be
loaded, whatever its biases and ties, and nothing is downloaded but that file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from .. import hub
from ..backbones import family_of, require_plain_logits
from ..config import BackboneConfig, ConfigError, LoraSettings, VerbalizerConfig
from ..ranks.sharding import unsharded
from ..verbalizer import Verbalizers, VerbalizerSpec

REAL_CONFIGS = Path(__file__).parent / "real_configs"
"""The facts of real checkpoints, one file each, named after it with `__` for `/`."""


@dataclass(frozen=True)
class ModelShape:
    """One backbone, as numbers. Lists hold the number of elements of each parameter tensor."""

    name: str
    width: int
    inner: int
    queries: int
    keys: int
    heads: int
    vocab: int
    tied: bool
    """The head is the embedding."""
    layers: list[list[int]]
    """Parameters of each decoder layer."""
    active: list[float]
    """Of each decoder layer: parameters that a token meets; of E experts k."""
    together: int
    """Elements of a decoder layer that are gathered at once: its largest tensor, or a router with all its experts."""
    recurrence: list[float]
    """Of each decoder layer: FLOPs of its linear attention's products for a token, beside those with weights; 0 where
    it attends."""
    recurrent: int
    """Numbers a token, in float32, that the largest linear attention holds at its peak; 0: there is none."""
    recurrent_saved: int
    """Likewise what it keeps for backward."""
    routed: int
    """k; 0: there are no experts."""
    expert_inner: int
    """Inner width of all experts of a token together, the shared ones included; 0: there are none."""
    ends: list[int]
    """Parameters outside decoder layers and vision: embedding, final norm, head (once where tied)."""
    vision: list[int]
    lora: list[list[int]]
    """LoRA's parameters in each decoder layer, for the ranks and modules of the run."""
    linears: list[list[tuple[int, int]]]
    """Inputs and outputs of the linear layers of each decoder layer: what int8 and nf4 quantise."""
    lora_ranks: int
    """Width of all LoRA bottlenecks of a layer together."""
    lora_inputs: int
    """Width of the inputs of all linear layers of a decoder layer that LoRA adapts, together."""
    vision_width: int
    vision_inner: int
    vision_depth: int
    patch_values: int
    """Numbers that the processor gives for one image patch."""
    merge: int
    """Image patches that become one token of the language model."""
    told: int
    """Image patches in the unit by which `data.row_sizes` tells them: one, or where images are cut into tiles, whose
    processors know no patches, those of a token."""
    masked: bool
    """Whether rows have an attention mask even where one of them is alone."""
    norm_behind: bool
    """Whether a norm follows a decoder layer's last product (Gemma 3)."""
    kinds: int
    """Kinds of decoder layers by what they attend to: 2 where some have a sliding window."""
    image_size: int
    """Side of a patch, pixels."""
    fixed_image: int | None
    """Tokens of a large image, where its size makes no difference."""
    vision_flops: float
    """FLOPs of the vision tower's products with weights, for one patch."""
    vision_attention: list[tuple[float, float]]
    """FLOPs of its attention for one patch and one that it looks at, with the most patches that it looks at: windows
    (Qwen2.5-VL), tiles (LLaVA-OneVision), or inf: the whole image."""
    has_head: bool = True
    """Whether the head is there; a teacher whose layers speak through the student's has none (`without_head`)."""

    @property
    def depth(self) -> int:
        return len(self.layers)

    def cut(self, depth: int | None) -> ModelShape:
        """The model with only its first `depth` decoder layers, as it is loaded where nothing deeper is read."""
        kept = {name: getattr(self, name)[:depth] for name in ("layers", "active", "recurrence", "lora", "linears")}
        return dataclasses.replace(self, **kept)

    def without_head(self) -> ModelShape:
        """The model as a teacher is loaded that speaks through another's head. A tied head stays as the embedding."""
        ends = list(self.ends)
        if not self.tied:
            ends.remove(self.head)
        return dataclasses.replace(self, ends=ends, has_head=False)

    @property
    def head(self) -> int:
        """Elements of the language head."""
        return self.vocab * self.width

    @property
    def parameters(self) -> list[int]:
        """Every parameter of the stock model, without LoRA."""
        return [*self.vision, *self.ends, *(n for layer in self.layers for n in layer)]

    @property
    def active_parameters(self) -> int:
        """Those that a token meets: all but of the experts that it does not go to."""
        return round(sum(self.parameters) - sum(map(sum, self.layers)) + sum(self.active))

    @property
    def largest(self) -> int:
        """The largest tensor of a decoder layer."""
        return max(max(layer) for layer in self.layers)

    @property
    def ffn(self) -> int:
        """Inner width of the FFN that a token runs through, or of its experts together."""
        return self.expert_inner or self.inner


def read_config(settings: BackboneConfig, role: str, path: str | None = None):
    """transformers config of a role: from `path` (a JSON file or a folder with config.json), else from its checkpoint.

    A Hub name is looked for in the machine's cache, then among the shipped ones (`real_configs`), then on the Hub.

    Raises:
        ConfigError: no config to be found; the message names the option that takes one.
    """
    from transformers import AutoConfig

    source = Path(path or settings.path)
    file = source / "config.json" if source.is_dir() else source
    if path is None and not source.is_dir():
        file = _cached(settings.path) or shipped_config(settings.path)
    if file is not None:
        if not file.is_file():
            raise ConfigError(f"{role}: {file} does not exist; a plan needs the model's config.json (no weights)")
        config = _config_of(file, role)
    else:
        try:
            config = AutoConfig.from_pretrained(settings.path, **hub.options(settings.path))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{role}.path: {hub.explain(settings.path, error)}. A plan needs its config.json and no weights: put "
                f"that file somewhere and pass --{role}-config FILE"
            ) from None
    try:
        require_plain_logits(config)
        family_of(config)
    except ValueError as error:
        raise ConfigError(f"{role}: {error}") from None
    return config


def shipped_config(name: str) -> Path | None:
    """The file of a checkpoint's facts that comes with the package, or None (see real_configs/README.md)."""
    file = REAL_CONFIGS / f"{name.replace('/', '__')}.json"
    return file if file.is_file() else None


def _cached(name: str) -> Path | None:
    """config.json of a Hub name in this machine's cache, without asking the Hub."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no Hub name
        return None
    return Path(found) if isinstance(found, str) else None


def _config_of(file: Path, role: str):
    from transformers import AutoConfig

    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{role}: {file} is not valid JSON ({error}); give a transformers config.json") from None
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise ConfigError(f"{role}: {file} names no model_type: is it a transformers config.json?")
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def build_on_meta(config) -> nn.Module:
    """The stock model without weights."""
    from transformers import AutoModelForImageTextToText

    with unsharded(), torch.device("meta"):  # at the start of a stage ZeRO-3 is on, and would partition it
        return AutoModelForImageTextToText.from_config(config)


def model_shape(config, name: str, lora: LoraSettings) -> ModelShape:
    """Numbers of a stock model; `lora` as the run would inject it."""
    model, family = build_on_meta(config), family_of(config)
    text, vision = config.get_text_config(), config.vision_config
    layers = family.decoder_layers(model)
    parts = family.vision(model)
    tower = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
    vision_parameters = [*tower.parameters(), *(part for part in parts if isinstance(part, nn.Parameter))]
    inside = {id(p) for p in [*layers.parameters(), *vision_parameters]}
    pattern = lora.target_modules or family.lora_targets
    adapted: list[list[int]] = [[] for _ in layers]
    ranks = inputs = 0
    for name_, module in model.named_modules():
        if isinstance(module, nn.Linear) and re.fullmatch(pattern, name_):
            at = next((i for i, layer in enumerate(layers) if any(m is module for m in layer.modules())), 0)
            adapted[at] += [lora.rank * module.in_features, lora.rank * module.out_features]
            if at == 0:
                ranks, inputs = ranks + lora.rank, inputs + module.in_features
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    inner = getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio)
    depth = getattr(vision, "depth", None) or vision.num_hidden_layers
    merge, side = family.merge(config), side_of(vision.patch_size)
    classed = any(name.endswith("cls_token") for name, _ in tower.named_parameters())
    seen = 1 + (side / side_of(vision.image_size)) ** 2 if classed else 1.0
    experts, delta = _Experts(text), _DeltaRule(text)
    return ModelShape(
        name=name,
        width=text.hidden_size,
        inner=text.intermediate_size,
        queries=text.num_attention_heads * head_dim,
        keys=text.num_key_value_heads * head_dim,
        heads=text.num_attention_heads,
        vocab=family.head(model).weight.shape[0],
        tied=bool(config.tie_word_embeddings),
        layers=[[p.numel() for p in layer.parameters()] for layer in layers],
        active=[sum(p.numel() * experts.share(p) for p in layer.parameters()) for layer in layers],
        together=max(experts.together(layer, family.sparse_block) for layer in layers),
        recurrence=[delta.flops if hasattr(layer, "linear_attn") else 0.0 for layer in layers],
        recurrent=delta.held,
        recurrent_saved=delta.saved,
        routed=experts.routed,
        expert_inner=experts.inner,
        ends=[p.numel() for p in model.parameters() if id(p) not in inside],
        vision=[p.numel() for p in vision_parameters],
        lora=adapted,
        linears=[_linears(layer) for layer in layers],
        lora_ranks=ranks,
        lora_inputs=inputs,
        vision_width=width,
        vision_inner=inner,
        vision_depth=depth,
        patch_values=getattr(vision, "in_channels", 3) * getattr(vision, "temporal_patch_size", 1) * side**2,
        merge=merge,
        told=1 if hasattr(vision, "spatial_merge_size") else merge,
        masked=family.images_look_ahead,
        norm_behind=any(hasattr(layer, "post_feedforward_layernorm") for layer in layers),
        kinds=1 + ("sliding_attention" in (getattr(text, "layer_types", None) or ())),
        image_size=side,
        fixed_image=family.tiles * (side_of(vision.image_size) // side) ** 2 // merge if family.tiles else None,
        vision_flops=_vision_flops(tower, depth, merge, seen),
        vision_attention=_vision_attention(vision, width, depth, side, seen),
    )


def side_of(size: int | list[int] | tuple[int, ...]) -> int:
    """Of a square that a config gives as one number or two."""
    return size if isinstance(size, int) else size[0]


class _Experts:
    """The experts of a language model, by its config: the stock classes hold a layer's as parameters [E, ..]."""

    def __init__(self, text):
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        self.count = next((getattr(text, name) for name in names if getattr(text, name, None)), 0)
        self.routed = text.num_experts_per_tok if self.count else 0
        shared = getattr(text, "n_shared_experts", None) or 0
        self.inner = (self.routed + shared) * text.moe_intermediate_size if self.count else 0

    def share(self, parameter) -> float:
        """Of a parameter's elements, those that a token meets."""
        is_expert = self.count and parameter.dim() == 3 and parameter.shape[0] == self.count
        return self.routed / self.count if is_expert else 1.0

    def together(self, layer: nn.Module, sparse_block: str | None) -> int:
        """See `ModelShape.together`."""
        blocks = [m for m in layer.modules() if type(m).__name__ == sparse_block]
        return max([p.numel() for p in layer.parameters()] + [sum(p.numel() for p in b.parameters()) for b in blocks])


class _DeltaRule:
    """The gated delta rule of linear attention (Gated DeltaNet), as transformers' plain implementation computes it: in
    float32, in chunks of C = 64 tokens. flash-linear-attention's kernels hold less.

    h heads of values, k and v widths of a head's keys and values. Products with weights are not part of it.

        a token's products   h (4 C k + 2 C v + 6 k v): keys and queries with keys, values twice within the chunk, and
                             the state that is read twice and written once; its triangular systems are not counted
        at its peak          queries, keys, values, scaled and decayed ones, both solutions and the output: h (11 v),
                             and three [C, C] matrices a chunk: h (3 C)
        kept for backward    those, the inputs of the products with the state and of the systems: h (18 v + 5 C), and
                             the states of all chunks: h (3 k v / C)
    """

    CHUNK = 64

    def __init__(self, text):
        heads = getattr(text, "linear_num_value_heads", None) or 0
        if not heads:
            self.flops, self.held, self.saved = 0.0, 0, 0
            return
        keys, values, chunk = text.linear_key_head_dim, text.linear_value_head_dim, self.CHUNK
        self.flops = heads * (4.0 * chunk * keys + 2 * chunk * values + 6 * keys * values)
        self.held = heads * (11 * values + 3 * chunk)
        self.saved = heads * (18 * values + 5 * chunk + 3 * keys * values // chunk)


def _linears(layer: nn.Module) -> list[tuple[int, int]]:
    return [(m.in_features, m.out_features) for m in layer.modules() if isinstance(m, nn.Linear)]


def _vision_attention(vision, width: int, depth: int, side: int, seen: float) -> list[tuple[float, float]]:
    """Scores and their product with the values, 4 x width a block; `seen` positions a patch."""
    windows = depth - len(vision.fullatt_block_indexes) if hasattr(vision, "window_size") else 0
    # GLM's image_size is that of its learned positions alone: its tower takes images of any size
    tiled = hasattr(vision, "image_size") and not hasattr(vision, "spatial_merge_size")
    whole = (side_of(vision.image_size) // side) ** 2 if tiled else math.inf
    found = [(4.0 * width * (depth - windows) * seen**2, whole)]
    return [*found, (4.0 * width * windows, (vision.window_size // side) ** 2)] if windows else found


def _vision_flops(tower: nn.Module, depth: int, merge: int, seen: float) -> float:
    """Products of a patch: the blocks run on every patch, layers outside (projectors) on a `merge`-th. `seen` positions
    a patch: InternVL's blocks have one more for each tile."""
    found = (m for m in tower.modules() if isinstance(m, nn.ModuleList) and m is not tower and len(m) == depth)
    blocks = {id(inner) for inner in next(found, nn.ModuleList()).modules()}
    per_patch = 0.0
    for module in tower.modules():
        if isinstance(module, nn.Linear):
            per_patch += 2.0 * module.weight.numel() * (seen if id(module) in blocks else 1 / merge)
        elif isinstance(module, nn.Conv2d | nn.Conv3d):
            per_patch += 2.0 * module.weight.numel()
        elif not isinstance(module, nn.Embedding):  # a projector's own matrix (Gemma 3)
            matrices = (p for p in module.parameters(recurse=False) if p.dim() == 2)
            per_patch += sum(2.0 * p.numel() for p in matrices) / merge
    return per_patch


def verbalizer_sizes(
    config, layers: list[int], settings: VerbalizerConfig, output: int | None, translates: bool = False
) -> list[list[int]]:
    """Parameters of the verbalizer of each of these layers."""
    spec = VerbalizerSpec.of(config, layers, settings, output, translates=translates)
    with unsharded(), torch.device("meta"):
        module = Verbalizers(spec)
    return [[p.numel() for p in module.layers[str(k)].parameters()] for k in layers]


def shards(sizes: list[int], ranks: int) -> int:
    """Elements that one rank keeps of these tensors under ZeRO-3: each is padded to a multiple of the ranks."""
    return sum(math.ceil(n / ranks) for n in sizes)
