"""What each target layer says: its own autoregressive answer, decoded through its verbalizer (figure 3 of the paper).

    T  tokens of the prompt        k  target layer: the state after k decoder layers        V  vocabulary

A layer's *voice* is a stock model: a shallow copy of the given one that shares every weight, with only the first k
decoder layers, and (verbalizer -> final norm) where the final norm was; a decoder verbalizer comes as further decoder
layers. So stock `generate` does the decoding, greedy or with beams, and no deeper layer is ever run.

All layers share one pass over the prompt: the deepest model that is needed reads it, but for its last token, into a
cache; each voice starts from that cache's first k layers and reads the last token itself. This holds for every family
here, since their attention is causal: what follows cannot change what is cached. The image is seen once. A layer of
linear attention has a state in place of keys and values, which is written to: each voice gets a copy.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import LinearAttentionLayer

from .backbones import family_of
from .data.encoding import configure_image_bounds, encode_question
from .data.images import ImageRef, load_image
from .data.processors import load_processor
from .hidden_states import match_attention
from .loading import load_backbone, resolve_folder
from .verbalizer import Verbalizers, VerbalizerSpec

Picture = Image.Image | str | os.PathLike


@dataclass(frozen=True)
class Speech:
    """The answer of one layer."""

    layer: int | None
    """Target layer; None: the last layer through the model's own final norm and head, i.e. the model itself."""
    text: str
    """The answer, without special tokens."""
    tokens: list[str]
    """Every generated token as text, the one that ends the answer included. One that holds a part of a character only
    is shown as a replacement character."""
    token_ids: list[int]
    """The same as ids."""
    token_probabilities: list[float]
    """Probability of each token under the layer's own distribution (no temperature, no penalties), 0 to 1."""
    alternatives: list[list[tuple[str, float]]]
    """At each token the `top` likeliest tokens there and their probabilities, likeliest first; empty where top is 0."""


class Speaker:
    """A stock model with its processor and, where its layers are to speak, their verbalizers.

    Args:
        model: stock `..ForConditionalGeneration`, as `loading.load_backbone` returns it (merged, not sharded).
        processor: of its checkpoint.
        verbalizers: of this model, or of the one that it was trained from (section 4.4: a distilled student is heard
            through its base student's verbalizers). They are moved to the model's device and dtype. None: only the
            last layer speaks.

    Raises:
        ValueError: the verbalizers do not fit the model.
    """

    def __init__(self, model: nn.Module, processor: Any, verbalizers: Verbalizers | None = None):
        self.model, self.processor, self.family = model, processor, family_of(model.config)
        self.verbalizers = verbalizers
        self.layers: list[int] = []
        if verbalizers is not None:
            self._require_fit(verbalizers.spec)
            self.layers = list(verbalizers.spec.layers)
            verbalizers.to(model.device, model.dtype).eval()
            if verbalizers.spec.is_decoder:
                match_attention(model, verbalizers)

    @property
    def depth(self) -> int:
        """Decoder layers of the model."""
        return len(self.family.decoder_layers(self.model))

    def speak(
        self,
        images: Sequence[Picture],
        question: str,
        *,
        layers: Sequence[int | None] | None = None,
        num_beams: int = 1,
        max_new_tokens: int = 64,
        top: int = 0,
    ) -> list[Speech]:
        """Each layer's answer to a question about images.

        Args:
            images: PIL images or files; none for a question without image.
            question: the user's turn.
            layers: which layers speak, in this order; None among them is the last layer through the model's own head.
                Default: all target layers, then None.
            num_beams: 1 decodes greedily, more is beam search.
            max_new_tokens: tokens after which an answer is cut.
            top: how many alternatives to list at every token.

        Returns:
            One `Speech` a layer.

        Raises:
            ValueError: a layer has no verbalizer; a number below 1; a question that holds image tokens.
            UnusableRow: an image that is missing, damaged or too large (it is a ValueError).

        Example:
            >>> speaker = open_speaker("runs/demo/sft/student", "runs/demo/verbalize/student")
            >>> for speech in speaker.speak(["cat.png"], "what is this?", num_beams=5, top=3):
            ...     print(speech.layer or "last", speech.text, speech.token_probabilities)
        """
        layers = [*self.layers, None] if layers is None else list(layers)
        unknown = [k for k in layers if k is not None and k not in self.layers]
        if unknown or not layers:
            raise ValueError(f"no verbalizers for layers {unknown or 'none'}; there are some for {self.layers}")
        if num_beams < 1 or max_new_tokens < 1 or top < 0:
            raise ValueError(f"num_beams {num_beams}, max_new_tokens {max_new_tokens}: 1 or more; top {top}: 0 or more")
        inputs = encode_question(question, [_load(image) for image in images], self.processor)
        return self.speak_tokens(inputs, layers, num_beams=num_beams, max_new_tokens=max_new_tokens, top=top)

    @torch.inference_mode()
    def speak_tokens(
        self, inputs: dict[str, Tensor], layers: Sequence[int | None], *, num_beams: int, max_new_tokens: int, top: int
    ) -> list[Speech]:
        """`speak` on the processor's tensors of one prompt, input_ids [1, T]; the prompt ends in a text token."""
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        prompt = self._read(inputs, layers)
        return [self._answer(prompt, k, num_beams, max_new_tokens, top) for k in layers]

    # ---- one pass over the prompt ----

    def _read(self, inputs: dict[str, Tensor], layers: Sequence[int | None]) -> _Prompt:
        """Run the deepest model that is needed over the prompt but for its last token."""
        trunk = self._cut(self.depth if None in layers else max(layers))
        backbone, shape = self.family.backbone(trunk), inputs["input_ids"].shape
        if hasattr(backbone, "rope_deltas"):
            backbone.rope_deltas = None  # of an earlier prompt
        early = {name: value[:, :-1] if value.shape == shape else value for name, value in inputs.items()}
        decoder = self.verbalizers is not None and self.verbalizers.spec.is_decoder
        cache = _Cache(trunk.config)
        with self._overhear(trunk, [k for k in layers if k is not None] if decoder else []) as states:
            backbone(**early, past_key_values=cache, use_cache=True)
        return _Prompt(inputs, cache, getattr(backbone, "rope_deltas", None), states)

    @contextlib.contextmanager
    def _overhear(self, trunk: nn.Module, layers: list[int]):
        """Collects what decoder verbalizers read: layer -> [state [1, T - 1, d], keywords of the decoder layer's call].

        The state is taken where the next layer (or the final norm) reads it, as some families add to a layer's output.
        """
        found: dict[int, list] = {k: [None, None] for k in layers}
        readers = [*self.family.decoder_layers(trunk), self.family.final_norm(trunk)]

        def keep_call(k, module, arguments, keywords):
            found[k][1] = {**keywords, "past_key_values": None}

        def keep_state(k, module, arguments):
            found[k][0] = arguments[0]

        hooks = [readers[k].register_forward_pre_hook(partial(keep_state, k)) for k in layers]
        hooks += [readers[k - 1].register_forward_pre_hook(partial(keep_call, k), with_kwargs=True) for k in layers]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    # ---- one voice ----

    def _answer(self, prompt: _Prompt, layer: int | None, num_beams: int, max_new_tokens: int, top: int) -> Speech:
        """Decode one layer's answer from the shared cache."""
        voice, blocks = self._voice(layer)
        cache = _Cache(voice.config, seen=prompt.inputs["input_ids"].shape[1] - 1)
        depth = len(cache.layers) - len(blocks)
        cache.layers[:depth] = [_own(each) for each in prompt.cache.layers[:depth]]
        if blocks:
            state, keywords = prompt.states[layer]
            for block in blocks:
                state = block(state, **{**keywords, "past_key_values": cache, "use_cache": True})
        if num_beams > 1:
            cache.batch_repeat_interleave(num_beams)
        backbone, ids = self.family.backbone(voice), prompt.inputs["input_ids"]
        if hasattr(backbone, "rope_deltas"):
            zero = torch.zeros(1, 1, dtype=torch.long, device=ids.device)
            backbone.rope_deltas = zero if prompt.rope_deltas is None else prompt.rope_deltas
        output = voice.generate(
            input_ids=ids,
            attention_mask=prompt.inputs["attention_mask"],
            past_key_values=cache,
            generation_config=self._decoding(num_beams, max_new_tokens),
        )
        return self._speech(layer, output, ids.shape[1], top)

    def _voice(self, layer: int | None) -> tuple[nn.Module, list[nn.Module]]:
        """The stock model that speaks for a layer, and the decoder layers of its verbalizer (none where token-wise)."""
        if layer is None:
            return self._cut(self.depth), []
        norm, verbalizer = self.family.final_norm(self.model), self.verbalizers.layers[str(layer)]
        if not self.verbalizers.spec.is_decoder:
            return self._cut(layer, nn.Sequential(verbalizer, norm)), []
        blocks = [_at_index(block, layer + i) for i, block in enumerate(verbalizer.blocks)]
        return self._cut(layer, norm, blocks), blocks

    def _cut(self, depth: int, norm: nn.Module | None = None, blocks: Sequence[nn.Module] = ()) -> nn.Module:
        """A shallow copy of the model with its first `depth` decoder layers, then `blocks`, then `norm`."""
        layers, old_norm = self.family.decoder_layers(self.model), self.family.final_norm(self.model)
        paths = {module: name for name, module in self.model.named_modules()}
        language_path = paths[layers].rpartition(".")[0]
        model = _replaced(self.model, paths[layers], nn.ModuleList([*layers[:depth], *blocks]))
        model = _replaced(model, paths[old_norm], old_norm if norm is None else norm)
        for module in (model, model.get_submodule(language_path)):
            module.config = _cut_config(module.config, depth, len(blocks))
        return model

    def _decoding(self, num_beams: int, max_new_tokens: int) -> GenerationConfig:
        """The checkpoint's own settings, without sampling."""
        config, tokenizer = copy.deepcopy(self.model.generation_config), self.processor.tokenizer
        config.do_sample, config.num_beams, config.max_new_tokens = False, num_beams, max_new_tokens
        config.temperature = config.top_p = config.top_k = None
        config.return_dict_in_generate = config.output_logits = True
        if config.eos_token_id is None:
            config.eos_token_id = tokenizer.eos_token_id
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.pad_token_id
        return config

    def _speech(self, layer: int | None, output, prompt_length: int, top: int) -> Speech:
        """Text, tokens and their probabilities from what `generate` returned."""
        ids = output.sequences[0, prompt_length:]
        beams = getattr(output, "beam_indices", None)
        rows = [0] * len(ids) if beams is None else beams[0, : len(ids)].tolist()
        probabilities = [step[row].float().softmax(-1) for step, row in zip(output.logits, rows)]
        decode, alternatives = self.processor.tokenizer.decode, []
        for step in probabilities if top else []:
            values, likeliest = step.topk(min(top, len(step)))
            alternatives.append([(decode([i]), p) for i, p in zip(likeliest.tolist(), values.tolist())])
        return Speech(
            layer=layer,
            text=decode(ids, skip_special_tokens=True).strip(),
            tokens=[decode([i]) for i in ids.tolist()],
            token_ids=ids.tolist(),
            token_probabilities=[step[i].item() for step, i in zip(probabilities, ids.tolist())],
            alternatives=alternatives,
        )

    def _require_fit(self, spec: VerbalizerSpec) -> None:
        text = self.model.config.get_text_config()
        if spec.translates:
            raise ValueError(
                "translating verbalizers (verbalizer.language student) speak the student's tokens, through its head, "
                "and this model cannot read them back: leave them out to hear the model's own answer"
            )
        if spec.output_size is not None:
            raise ValueError("verbalizers of the headless ablation have an output of their own, which no head can read")
        there = (spec.model_type or self.model.config.model_type, spec.hidden_size)
        here = (self.model.config.model_type, text.hidden_size)
        if there != here or max(spec.layers) > text.num_hidden_layers:
            raise ValueError(
                f"verbalizers of a {there[0]} of width {there[1]} at layers {list(spec.layers)} do not fit a {here[0]} "
                f"of width {here[1]} with {text.num_hidden_layers} layers; use those trained on it or on its base model"
            )


def open_speaker(
    checkpoint: str | Path,
    verbalizers: str | Path | None = None,
    *,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    attn_implementation: str = "sdpa",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> Speaker:
    """A speaker from folders.

    Args:
        checkpoint: folder, or Hub name, of a stock checkpoint with its processor.
        verbalizers: folder of trained verbalizers; None: only the last layer speaks.
        dtype: of all weights, by torch's name.
        device: default: the GPU where there is one, else the CPU.
        attn_implementation: by its transformers name.
        min_pixels: lower bound on images where the run had one; default: the processor's own.
        max_pixels: upper bound, likewise.

    Raises:
        FileNotFoundError: a folder that is missing or holds something else.
        ValueError: the two do not fit each other.
    """
    folder = resolve_folder(str(checkpoint), "checkpoint")
    processor = load_processor(folder)
    configure_image_bounds(processor, min_pixels, max_pixels, "image")
    loaded = None if verbalizers is None else Verbalizers.from_pretrained(verbalizers)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Speaker(load_backbone(folder, dtype, attn_implementation).to(device), processor, loaded)


class _Cache(DynamicCache):
    """A stock cache, also where no layer of it attends: those of linear attention do not count tokens.

    Args:
        config: of the model that will use it.
        seen: tokens in it. From then on the model reads one at a time.
    """

    def __init__(self, config, seen: int = 0):
        super().__init__(config=config)
        self.seen, self._counts = seen, not all(isinstance(each, LinearAttentionLayer) for each in self.layers)

    def update_recurrent_state(self, states: Tensor, layer_idx: int, **options) -> Tensor:
        """The stock method; the first layer counts tokens."""
        self.seen += layer_idx == 0
        return super().update_recurrent_state(states, layer_idx, **options)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens in the cache."""
        return super().get_seq_length(layer_idx) if self._counts else self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The stock method's; no layer reads the mask where none attends."""
        return super().get_mask_sizes(query_length, layer_idx) if self._counts else (self.seen + query_length, 0)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """The stock method, which layers of linear attention lack."""
        for each in self.layers:
            if not isinstance(each, LinearAttentionLayer):
                each.batch_repeat_interleave(repeats)
            elif any(each.is_recurrent_states_initialized.values()):
                rows = next(iter(each.recurrent_states.values())).shape[0]
                each.reorder_cache(torch.arange(rows).repeat_interleave(repeats))


def _own(layer):
    """A layer of a cache for one more user: keys and values grow by concatenation, states are overwritten."""
    return copy.deepcopy(layer) if isinstance(layer, LinearAttentionLayer) else copy.copy(layer)


@dataclass
class _Prompt:
    """A prompt that has been read but for its last token."""

    inputs: dict[str, Tensor]
    """Of the whole prompt."""
    cache: _Cache
    """Keys and values of its first T - 1 tokens."""
    rope_deltas: Tensor | None
    """[1, 1] what positions are ahead of token counts by, in families with 3D positions; None: nothing."""
    states: dict[int, list]
    """See `Speaker._overhear`."""


def _replaced(module: nn.Module, path: str, new: nn.Module) -> nn.Module:
    """A copy of a module with another submodule at `path`; all that is not on the way there is shared."""
    if "forward" in vars(module):  # put there by a library, bound to the module that is copied
        raise ValueError(f"{type(module).__name__} has a patched forward (offloaded?); load it with load_backbone")
    name, _, rest = path.partition(".")
    clone = copy.copy(module)
    clone._modules = {**module._modules, name: _replaced(module._modules[name], rest, new) if rest else new}
    return clone


def _cut_config(config, depth: int, blocks: int):
    """A copy of a transformers config for `depth` decoder layers and `blocks` more that attend like the last one."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth] + [text.layer_types[depth - 1]] * blocks
    text.num_hidden_layers = depth + blocks
    return config


def _at_index(block: nn.Module, index: int) -> nn.Module:
    """A copy of a decoder layer, sharing its weights, with place `index` in the cache."""
    name = "self_attn" if hasattr(block, "self_attn") else "linear_attn"
    attention = copy.copy(getattr(block, name))
    attention.layer_idx = index
    return _replaced(block, name, attention)


def _load(image: Picture) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    path = Path(image).resolve()
    return load_image(ImageRef(path=path.name, root=str(path.parent)))
