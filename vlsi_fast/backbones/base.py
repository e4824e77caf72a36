"""What an adapter tells about a family: where in the stock class the parts are that VLsI reads."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ..config_files import ConfigError

LANGUAGE_LINEARS = r".*\.(language|text)_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
"""LoRA targets of a language model with Qwen's and Llama's names: attention and FFN; no vision tower's names have
`language_model` or `text_model` in them."""
LANGUAGE_ATTENTION = r".*\.language_model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj"
"""The same without the FFN, whose weights are experts."""


@dataclass(frozen=True)
class Family:
    """One family of stock Hugging Face vision-language models. `model` is always the `..ForConditionalGeneration`."""

    model_type: str
    """transformers `config.model_type`."""
    backbone: Callable[[nn.Module], nn.Module]
    """The model without its head; its forward returns `last_hidden_state` after the final norm, [B, T, d]."""
    decoder_layers: Callable[[nn.Module], nn.ModuleList]
    """Decoder layers of the language model, shallow to deep."""
    final_norm: Callable[[nn.Module], nn.Module]
    """Norm between the last decoder layer and the head."""
    head: Callable[[nn.Module], nn.Linear]
    """Language head; its weight is [V, d] and may be tied to the embeddings."""
    vision: Callable[[nn.Module], list[nn.Module | nn.Parameter]]
    """All that is not language model: vision tower, projector, lone parameters. Frozen unless asked for."""
    lora_targets: str
    """Regular expression (full match) over module names: the linear layers of the language model."""
    new_decoder_layer: Callable[[object, int], nn.Module]
    """Build one decoder layer from (config, index)."""
    processor: str
    """Class of the processor, by its transformers name; `data.processors` knows each with and without torchvision."""
    layers_added_to: Callable[[object], int] = lambda config: 0
    """How many of the first decoder layers have something added to their output before the next one reads it."""
    merge: Callable[[object], int] = lambda config: getattr(config.vision_config, "spatial_merge_size", 1) ** 2
    """Image patches that become one token of the language model."""
    tiles: int = 0
    """Tiles of a large image, where the published processors cut every image into tiles of the vision tower's size
    whatever its own is, the whole image once more among them. 0: an image's tokens follow from its pixels."""
    images_look_ahead: bool = False
    """Whether an image's tokens attend to each other in both directions: only an attention with a mask can do that."""
    sparse_block: str | None = None
    """Class, by name, of the modules that route tokens to experts; None: every token meets every weight."""


def default_layers(depth: int) -> list[int]:
    """The paper's target layers for a language model of `depth` layers: 2, 6, 10, .. (section 4.1b)."""
    return list(range(2, depth, 4)) or [1]


def plain_decoder_layer(config, index: int) -> nn.Module:
    """`new_decoder_layer` where the language model is a plain one (Qwen2, Llama, ..): the class that it names itself.

    Raises:
        ValueError: that language model has no one class of decoder layers.
    """
    from transformers import AutoModel

    text = config.get_text_config()
    model = AutoModel._model_mapping[type(text)]
    names = [name for name in model._no_split_modules or [] if name.endswith("Layer")]
    if len(names) != 1:
        raise ValueError(
            f"{model.__name__} has no one class of decoder layers ({', '.join(names) or 'none named'}), so it has no "
            "decoder verbalizers; use verbalizer.architecture verb_ffn, ffn or mlp"
        )
    return getattr(sys.modules[model.__module__], names[0])(text, index)


def no_decoder_layer(config, index: int) -> nn.Module:
    """`new_decoder_layer` where layers route tokens to experts. Raises ConfigError: a verbalizer would be one."""
    raise ConfigError(
        f"{config.model_type} has experts in its decoder layers, so it has no decoder verbalizers; use "
        "verbalizer.architecture verb_ffn, ffn or mlp"
    )


def is_recurrent(config) -> bool:
    """Whether some decoder layers carry a state from token to token (linear attention) in place of attending."""
    return "linear_attention" in (getattr(config.get_text_config(), "layer_types", None) or ())


def require_dense(family: Family, field: str) -> None:
    """What trains the whole language model takes none with experts: no loss here keeps them in balance.

    Args:
        family: of the model to train.
        field: of the run's config that asks for it.

    Raises:
        ConfigError: the model has experts.
    """
    if family.sparse_block is not None:
        raise ConfigError(
            f"{field} is full, but {family.model_type} routes tokens to experts, and no loss here keeps those in "
            f"balance: set {field} to lora, which adapts attention and leaves routers and experts as they are, or take "
            "that stage out of stages"
        )
