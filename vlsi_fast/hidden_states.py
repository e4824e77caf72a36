"""Hidden states of a backbone at its target layers and answer positions, verbalized: one forward for all of them.

    B, T  rows, positions        N  answer tokens of the batch        d  width        L  target layers

Data goes the short way: backbone forward -> hidden states of target layers only -> answer positions -> verbalizer ->
final norm. The head is applied by the losses (`vlsi_fast.losses`), which never make logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from numpy import ndarray
from torch import Tensor, nn

from .backbones import family_of
from .backbones.unwaiting import spare_waits
from .verbalizer import Verbalizers


def answer_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where the model predicts answer tokens, and which.

    Args:
        labels: [B, T] token ids, -100 everywhere but on answers.

    Returns:
        index [N] into the flattened [B * T] positions whose hidden state predicts an answer token (shifted by one),
        and labels [N], the tokens to predict.
    """
    following = labels[:, 1:]
    row, position = (following != -100).nonzero(as_tuple=True)
    return row * labels.shape[1] + position, following[row, position]


@dataclass
class Held:
    """A frozen model that is no part of the module tree: nothing that walks the tree moves, wraps or saves it."""

    model: nn.Module
    """Stock `..ForConditionalGeneration`, placed where it runs; hooks on its decoder layers see them run."""
    run: Callable[[dict[str, Tensor]], Tensor]
    """Processor tensors -> last hidden state after the final norm, [B, T, d]."""
    final_norm: nn.Module
    """The final norm, plain and on the device."""
    head_weight: Tensor | None
    """[V, d], on the device or a shard (see `ranks.sharding.gathered`); None where another model's is read."""
    release: Callable[[], None] = lambda: None
    """Gives back what the placement holds besides the weights."""


@dataclass
class Language:
    """What translated states are read by: another model's final norm and head. No part of the module tree."""

    final_norm: nn.Module
    """A plain copy, on the device."""
    head_weight: Tensor
    """[V, d_s], frozen; on the device or a shard (see `ranks.sharding.gathered`)."""


class VerbalizedBackbone(nn.Module):
    """A stock model with its verbalizers.

    Args:
        model: stock `..ForConditionalGeneration`, possibly with LoRA injected; or one that is `Held`.
        layers: target layers.
        verbalizers: None where only the last layer is needed.
        train_backbone: whether gradients flow into the backbone (else its forward runs without autograd).
        needs_last: whether the last layer's own output is wanted; False where the model was cut below it.
        language: what translating verbalizers speak through.
        last_translated: the last layer's output is wanted in that language, through its verbalizer.
    """

    def __init__(
        self,
        model: nn.Module | Held,
        layers: list[int],
        verbalizers: Verbalizers | None,
        train_backbone: bool,
        needs_last: bool = True,
        language: Language | None = None,
        last_translated: bool = False,
    ):
        super().__init__()
        object.__setattr__(self, "language", language)  # past nn.Module's registration
        self.held = model if isinstance(model, Held) else None
        if self.held is not None:
            model = self.held.model
            object.__setattr__(self, "model", model)  # past nn.Module's registration
        else:
            self.model = model
        self.family = family_of(model.config)
        spare_waits(model, self.family)
        self.needs_last, self.last_translated = needs_last, last_translated
        self.target_layers = list(layers) if verbalizers is not None else []
        deepest = [len(self.family.decoder_layers(model))] if last_translated else []
        self.heard_layers = sorted({*self.target_layers, *deepest})
        self.verbalizers = verbalizers
        self.train_backbone = train_backbone
        if verbalizers is not None and verbalizers.spec.is_decoder:
            match_attention(model, verbalizers)

    @property
    def head_weight(self) -> nn.Parameter:
        """[V, d] weight of the language head that is spoken through; a shard under ZeRO-3 (see
        `ranks.sharding.gathered`)."""
        return self.own_head_weight if self.language is None else self.language.head_weight

    @property
    def own_head_weight(self) -> Tensor:
        """[V, d] weight of the model's own language head, whatever it speaks through; or a shard."""
        return self.held.head_weight if self.held is not None else self.family.head(self.model).weight

    def train(self, mode: bool = True) -> VerbalizedBackbone:
        """A frozen backbone stays in eval mode: no dropout, no gradient checkpointing."""
        super().train(mode)
        if not self.train_backbone:
            self.model.eval()
        return self

    def forward(
        self, inputs: dict[str, Tensor], index: Tensor, normed: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Hidden states at the answer positions, ready for the head.

        Args:
            inputs: the processor's tensors for the stock model; of packed rows (`data.packing`) with `packed`.
            index: [N] answer positions in the flattened batch (`answer_positions`).
            normed: apply the final norm to verbalizer outputs (False: appendix D's headless matching).

        Returns:
            verbalized [L, N, d] (None without verbalizers) and last [N, d], the backbone's own final hidden state (None
            unless `needs_last`). With a `language` verbalized has its width; so has last where it is translated.
        """
        decoder = self.verbalizers is not None and self.verbalizers.spec.is_decoder
        hidden, attention, last = self.states(inputs, index, everywhere=decoder)
        if self.verbalizers is None:
            return None, last
        spoken = self.verbalizers(hidden, attention if decoder else None, self.heard_layers)
        if decoder:
            spoken = spoken.flatten(1, 2).index_select(1, index)
        if normed:
            spoken = self._final_norm(spoken)
        if not self.last_translated:
            return spoken, last
        count = len(self.target_layers)  # they rise, and the last layer is none of them or their last
        return spoken[:count] if count else None, spoken[-1]

    def states(
        self, inputs: dict[str, Tensor], index: Tensor, everywhere: bool
    ) -> tuple[list[Tensor], list[dict], Tensor | None]:
        """What the backbone itself says, before any verbalizer.

        Args:
            inputs: as for `forward`.
            index: as for `forward`.
            everywhere: the target layers' states at all positions, not only at the answers'.

        Returns:
            The states of each heard layer, [N, d] or [B, T, d]; with `everywhere` also the arguments that each layer
            was called with; the last layer's state [N, d], or None where it is not spoken as it is.
        """
        with contextlib.nullcontext() if self.train_backbone else torch.no_grad():
            with self._record(None if everywhere else index) as (hidden, attention):
                last = self._run(inputs)
            last = _take(last, index) if self.needs_last and not self.last_translated else None
        return hidden, attention, last

    @property
    def _final_norm(self) -> nn.Module:
        if self.language is not None:
            return self.language.final_norm
        return self.held.final_norm if self.held is not None else self.family.final_norm(self.model)

    def _run(self, inputs: dict[str, Tensor]) -> Tensor:
        # arrays are what the stock model reads on the host; tensors have been copied to the device
        inputs = {n: torch.from_numpy(value) if isinstance(value, ndarray) else value for n, value in inputs.items()}
        with self._bounded(inputs.pop("packed", None)):
            if self.held is not None:
                return self.held.run(inputs)
            return self.family.backbone(self.model)(**inputs, use_cache=False).last_hidden_state

    @contextlib.contextmanager
    def _bounded(self, bounds: dict | None):
        """Tell the language model, and it alone, where packed rows begin: the vision tower, which the stock model gives
        its keyword arguments as well, has bounds of its own."""
        if bounds is None:
            yield
            return

        def add(module, arguments, keywords):
            return arguments, keywords | bounds

        hook = self.model.get_decoder().register_forward_pre_hook(add, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    @contextlib.contextmanager
    def _record(self, index: Tensor | None):
        """Collect the target layers' outputs while the backbone runs: [N, d] each at the positions `index`, so that
        what a layer says elsewhere is free with the next layer; without `index`, [B, T, d] each and call arguments.

        Hooks live for one forward only, for two reasons: gradient checkpointing runs the layers again in backward,
        and ZeRO-3 wraps outputs in hooks of its own, so ours must come after those to hold what autograd sees.

        Where a family adds to a layer's output (at image positions only) and all positions are read, the state is taken
        where the next layer reads it.
        """
        hidden: list[Tensor] = []
        attention: list[dict] = []
        layers = self.family.decoder_layers(self.model)

        def keep(module, arguments, keywords, output=None):
            state = arguments[0] if output is None else output
            state = state[0] if isinstance(state, tuple) else state
            if index is not None:
                hidden.append(_take_in_layer(state, index))
                return
            hidden.append(state)
            attention.append({**keywords, "past_key_values": None, "use_cache": False})

        late = self.family.layers_added_to(self.model.config) if index is None else 0
        hooks = [
            layers[k].register_forward_pre_hook(keep, with_kwargs=True)
            if k <= late and k < len(layers)
            else layers[k - 1].register_forward_hook(keep, with_kwargs=True)
            for k in self.heard_layers
        ]
        try:
            yield hidden, attention
        finally:
            for hook in hooks:
                hook.remove()


def checkpoint_activations(model: nn.Module) -> None:
    """Gradient checkpointing of a stock model's decoder layers, in place."""
    # the newer name of the same method, without the older one's warning
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # It also makes the outputs of both embeddings require a gradient, which only re-entrant checkpoints need:
    # the frozen vision tower would be computed again and run backwards for nothing.
    model.disable_input_require_grads()


def match_attention(model: nn.Module, verbalizers: Verbalizers) -> None:
    """Decoder verbalizers attend by the backbone's implementation, since they get the mask that the backbone made."""
    attention = model.config.get_text_config()._attn_implementation
    for module in verbalizers.modules():
        if hasattr(module, "self_attn"):
            module.self_attn.config._attn_implementation = attention


def _take(hidden: Tensor, index: Tensor) -> Tensor:
    return hidden.flatten(0, 1).index_select(0, index)


def _take_in_layer(hidden: Tensor, index: Tensor) -> Tensor:
    """`_take` in a hook of a decoder layer. Older transformers (5.17) checkpoint a layer with its hooks: what is saved
    here is kept from the checkpoint, which would miss it in the recomputation, where no hook takes anything."""
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        return _take(hidden, index)
