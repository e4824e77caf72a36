"""What an adapter tells about a family: where in the stock class the parts are that VLsI reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


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
    vision: Callable[[nn.Module], nn.Module]
    """Vision tower with its projector: frozen unless asked for."""
    lora_targets: str
    """Regular expression (full match) over module names: the linear layers of the language model."""
    new_decoder_layer: Callable[[object, int], nn.Module]
    """Build one decoder layer from (config, index)."""


def default_layers(depth: int) -> list[int]:
    """The paper's target layers for a language model of `depth` layers: 2, 6, 10, .. (section 4.1b)."""
    return list(range(2, depth, 4)) or [1]
