"""Small models and processors of every family, from the stock classes, with the tokenizers of `tiny`."""

from __future__ import annotations

import tiny
import torch
import transformers
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vlsi_fast.backbones import FAMILIES
from vlsi_fast.data.processors import build_processor

PATCH, TILE = 8, 32
DECODERS = [name for name in sorted(FAMILIES) if FAMILIES[name].sparse_block is None]
"""Families with decoder verbalizers."""
ARCHITECTURES = [(name, "verb_ffn") for name in sorted(FAMILIES)] + [(name, "decoder") for name in DECODERS]
DEEPSTACK = ("qwen3_vl", "qwen3_vl_moe")
"""Families that add vision features behind their first layers."""
QUERY_NORMS = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5")
"""Families whose attention has norms of queries and keys."""
LIGER = [name for name in FAMILIES if name not in ("qwen3_5", "glm4v")]
"""Families into which liger-kernel's modules are put."""
RECURRENT = ("qwen3_5",)
"""Families with layers of linear attention: their rows are padded, not packed."""
LLAVA_SPECIAL_TOKENS = [*tiny.SPECIAL_TOKENS[:3], "<image>", "<video>"]
"""The llava-hf tokenizers: Qwen2's three, then two of LLaVA's own where Qwen2-VL has <|object_ref_start|> and _end."""

# Images first, no system turn, and a space behind the role that the generation prompt does not have.
LLAVA_CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + ' ' -}}
    {%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>' -}}{%- endfor -%}
    {{- '\\n' -}}
    {%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
    {{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


# An empty thought before an answer behind the last question, none before earlier ones; by default the generation prompt
# leaves a thought open.
QWEN3_5_CHAT_TEMPLATE = """\
{%- macro body(content) -%}
    {%- for part in content -%}
        {%- if part['type'] == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
        {%- else -%}{{- part['text'] -}}{%- endif -%}
    {%- endfor -%}
{%- endmacro -%}
{%- set ns = namespace(last=0) -%}
{%- for message in messages if message['role'] == 'user' -%}{%- set ns.last = ns.last + 1 -%}{%- endfor -%}
{%- set asked = namespace(count=0) -%}
{%- for message in messages -%}
    {%- set asked.count = asked.count + (message['role'] == 'user') -%}
    {{- '<|im_start|>' + message['role'] + '\n' -}}
    {%- if message['role'] == 'assistant' and asked.count == ns.last -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
    {{- body(message['content']) | trim + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n<think>\n' -}}
    {%- if enable_thinking is defined and not enable_thinking -%}{{- '\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}
"""


GLM_SPECIAL_TOKENS = ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|im_end|>"]
GLM_SPECIAL_TOKENS += [f"<|{name}|>" for name in ("begin_of_image", "end_of_image", "begin_of_video", "end_of_video")]
GLM_SPECIAL_TOKENS += ["<|image|>", "<|video|>"]
# Nothing behind an answer; an empty thought in front of one.
GLM_CHAT_TEMPLATE = """\
[gMASK]<sop>
{%- for message in messages -%}
    {{- '<|' + message['role'] + '|>\n' -}}
    {%- if message['role'] == 'assistant' -%}{{- '<think></think>\n' -}}{%- endif -%}
    {%- for part in message['content'] -%}
        {%- if part['type'] == 'image' -%}{{- '<|begin_of_image|><|image|><|end_of_image|>' -}}
        {%- else -%}{{- part['text'] -}}{%- endif -%}
    {%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>\n' -}}
    {%- if enable_thinking is defined and not enable_thinking -%}{{- '<think></think>\n' -}}{%- endif -%}
{%- endif -%}
"""


def make_processor(model_type: str, kind: str = "tiny"):
    """A processor of the family; LLaVA-OneVision's has tiles of 32 x 32 pixels, at most two by two of them."""
    name = FAMILIES[model_type].processor
    if model_type == "llava_onevision":
        tokenizer = tiny.make_tokenizer(kind, LLAVA_SPECIAL_TOKENS)
        tokenizer.chat_template = LLAVA_CHAT_TEMPLATE
        grid = [[TILE, TILE], [TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]]
        image = LlavaOnevisionImageProcessorPil(size={"height": TILE, "width": TILE}, image_grid_pinpoints=grid)
        fields = {"num_image_tokens": (TILE // PATCH) ** 2, "vision_feature_select_strategy": "full"}
        return build_processor(name, tokenizer, image, LLAVA_CHAT_TEMPLATE, **fields)
    size = {"shortest_edge": 1024, "longest_edge": 1024}
    if model_type == "glm4v":
        tokenizer = tiny.make_tokenizer(kind, GLM_SPECIAL_TOKENS)
        tokenizer.eos_token = "<|endoftext|>"
        image = Glm46VImageProcessorPil(patch_size=PATCH, size={name: 2 * value for name, value in size.items()})
        return build_processor(name, tokenizer, image, GLM_CHAT_TEMPLATE)  # it counts the pixels of two frames
    image = Qwen2VLImageProcessorPil(patch_size=PATCH, size=size)
    template = QWEN3_5_CHAT_TEMPLATE if model_type == "qwen3_5" else tiny.CHAT_TEMPLATE
    return build_processor(name, tiny.make_tokenizer(kind), image, template)


def _config(model_type: str, hidden: int, layers: int, tied: bool, tokenizer, kv_heads: int | None = None):
    token_id = tokenizer.convert_tokens_to_ids
    heads, half = 2, hidden // 4
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "max_position_embeddings": 2048,
        "initializer_range": hidden**-0.5,
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
    }
    vision = {"hidden_size": 16, "intermediate_size": 32, "patch_size": PATCH, "initializer_range": 0.1}
    if model_type == "llava_onevision":
        vision |= {"model_type": "siglip_vision_model", "image_size": TILE, "vision_use_head": False}
        vision |= {"num_hidden_layers": 2, "num_attention_heads": 2}
        return transformers.LlavaOnevisionConfig(
            text_config=text | {"model_type": "qwen2", "tie_word_embeddings": tied},
            vision_config=vision,
            image_token_index=token_id("<image>"),
            video_token_index=token_id("<video>"),
            image_grid_pinpoints=[[TILE, TILE], [TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]],
            tie_word_embeddings=tied,
        )
    height = half * 3 // 8
    section = [half - 2 * height, height, height]
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": section}
    vision |= {"depth": 2, "num_heads": 2, "out_hidden_size": hidden}
    if model_type == "qwen2_vl":
        vision |= {"embed_dim": 16, "hidden_size": hidden, "mlp_ratio": 2}
        del vision["intermediate_size"], vision["out_hidden_size"]
    elif model_type == "qwen2_5_vl":
        vision |= {"window_size": 4 * PATCH, "fullatt_block_indexes": [1]}
    elif model_type == "glm4v":
        text["rope_parameters"] |= {"partial_rotary_factor": 0.5, "mrope_section": [half // 2 - 2, 1, 1]}
        vision |= {"image_size": TILE}
    else:
        text |= {"head_dim": hidden // heads}
        text["rope_parameters"]["mrope_interleaved"] = True
        if model_type == "qwen3_vl_moe":  # not square: whether stored experts are transposed is told by their shapes
            text |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": hidden // 2 + 8}
        vision |= {"num_position_embeddings": 16}
        if model_type in DEEPSTACK:
            vision["deepstack_visual_indexes"] = [0, 1]
        else:  # Qwen3.5: every fourth layer attends, with a rotation of half of each head
            text["rope_parameters"] |= {"partial_rotary_factor": 0.5, "mrope_section": [half // 2 - 2, 1, 1]}
            text |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
            text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    if model_type == "glm4v":
        names = [f"{kind}_{end}" for kind in ("image", "video") for end in ("start", "end")]
        marks = [f"<|{word}_of_{kind}|>" for kind in ("image", "video") for word in ("begin", "end")]
        return transformers.AutoConfig.for_model(
            model_type,
            text_config=text,
            vision_config=vision,
            image_token_id=token_id("<|image|>"),
            video_token_id=token_id("<|video|>"),
            tie_word_embeddings=tied,
            **{f"{name}_token_id": token_id(mark) for name, mark in zip(names, marks)},
        )
    return transformers.AutoConfig.for_model(
        model_type,
        text_config=text,
        vision_config=vision,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=tied,
    )


def make_model(
    model_type: str,
    hidden: int = 32,
    layers: int = 4,
    tied: bool = False,
    seed: int = 0,
    tokenizer=None,
    kv_heads: int | None = None,
):
    """A stock model in fp32, reproducible from the seed, with the ids of `tokenizer` (default: the tiny one) and
    `kv_heads` heads of keys and values (default: as many as of queries, two)."""
    config = _config(model_type, hidden, layers, tied, tokenizer or make_processor(model_type).tokenizer, kv_heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModelForImageTextToText.from_config(config).eval()


def save(folder, model_type: str, **options) -> None:
    """A checkpoint with its processor."""
    processor = make_processor(model_type)
    make_model(model_type, tokenizer=processor.tokenizer, **options).save_pretrained(folder)
    processor.save_pretrained(folder)
