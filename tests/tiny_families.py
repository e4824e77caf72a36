"""Small models and processors of every family, from the stock classes, with the tokenizers of `tiny`."""

from __future__ import annotations

import tiny
import tokenizers
import torch
import transformers
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from vlsi_fast.backbones import FAMILIES
from vlsi_fast.data.processors import build_processor

PATCH, TILE = 8, 32
TILE_TOKENS = (TILE // PATCH) ** 2 // 4
"""Of a tile where four of its patches become a token (InternVL, SmolVLM)."""
OWN_TOKENS = {"gemma3", "glm4v", "smolvlm"}
"""Families whose tokenizer is not Qwen's."""
QWEN_TOKENS = [name for name in sorted(FAMILIES) if name not in OWN_TOKENS]
GRIDS = ["glm4v", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl", "qwen3_vl_moe"]
"""Families that take images of any size as a grid of patches; the others cut them into tiles, or make them
of one size."""
GEMMA_TOKENS = 4
"""Of an image: patches of 4 pixels, of which 4 x 4 become one token, as the true ones do."""
DECODERS = [name for name in sorted(FAMILIES) if FAMILIES[name].sparse_block is None]
"""Families with decoder verbalizers."""
ARCHITECTURES = [(name, "verb_ffn") for name in sorted(FAMILIES)] + [(name, "decoder") for name in DECODERS]
DEEPSTACK = ("qwen3_vl", "qwen3_vl_moe")
"""Families that add vision features behind their first layers."""
QUERY_NORMS = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5")
"""Families whose attention has norms of queries and keys."""
LIGER = [name for name in FAMILIES if name not in ("gemma3", "qwen3_5", "glm4v")]
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

INTERNVL_SPECIAL_TOKENS = [
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
]
"""Behind Qwen2.5-VL's, in the order of the published tokenizer."""
INTERNVL_NAMES = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
# That of transformers' conversion script: no system turn, and a line break behind each image.
INTERNVL_CHAT_TEMPLATE = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}\
{% for part in message['content'] %}\
{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}\
{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


SMOLVLM_SPECIAL_TOKENS = [
    *("<global-img>", *(f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2))),
    *("<fake_token_around_image>", "<image>", "<|reserved_special_token_0|>", "<end_of_utterance>"),
]
"""Behind SmolLM2's vocabulary, in the order of the published tokenizer, which has six rows of six."""
# That of the published checkpoints: a space behind the colon belongs to the answer, and one begin token for all turns.
SMOLVLM_CHAT_TEMPLATE = """\
<|im_start|>{% for message in messages %}\
{{ message['role'] | capitalize }}{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}\
{% endif %}{% for line in message['content'] %}\
{% if line['type'] == 'text' %}{{ line['text'] }}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}\
{% endfor %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""


def make_smollm_tokenizer():
    """SmolVLM2's: GPT-2's kind of byte-level BPE, digits alone, control tokens in front and behind."""
    vocab, merges = tiny._vocab_and_merges("tiny")
    front = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate(front)} | {token: len(front) + i for token, i in vocab.items()}
    tokenizer = transformers.GPT2Tokenizer(vocab=vocab, merges=list(merges))
    split = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    bytes_ = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, bytes_])
    tokenizer.add_special_tokens({"additional_special_tokens": [*front, *SMOLVLM_SPECIAL_TOKENS]})
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = front[1], "<end_of_utterance>", front[2]
    tokenizer.chat_template = SMOLVLM_CHAT_TEMPLATE
    return tokenizer


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
    """A processor of the family; where it cuts images, tiles have 32 x 32 pixels, and there are two by two at most."""
    name = FAMILIES[model_type].processor
    if model_type == "internvl":
        tokenizer = tiny.make_tokenizer(kind, [*tiny.SPECIAL_TOKENS, *INTERNVL_SPECIAL_TOKENS, "<video>"])
        tokenizer._set_model_specific_special_tokens(INTERNVL_NAMES | {"video_token": "<video>"})
        tokenizer.chat_template = INTERNVL_CHAT_TEMPLATE
        image = GotOcr2ImageProcessorPil(size={"height": TILE, "width": TILE}, max_patches=4)
        return build_processor(name, tokenizer, image, INTERNVL_CHAT_TEMPLATE, image_seq_length=TILE_TOKENS)
    if model_type == "smolvlm":
        sides = {"size": {"longest_edge": 2 * TILE}, "max_image_size": {"longest_edge": TILE}}
        image = SmolVLMImageProcessorPil(**sides)
        return build_processor(name, make_smollm_tokenizer(), image, SMOLVLM_CHAT_TEMPLATE, image_seq_len=TILE_TOKENS)
    if model_type == "gemma3":
        image = Gemma3ImageProcessorPil(size={"height": TILE, "width": TILE})
        fields = {"image_seq_length": GEMMA_TOKENS}
        return build_processor(name, tiny.make_gemma_tokenizer(), image, tiny.GEMMA_CHAT_TEMPLATE, **fields)
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
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if model_type == "gemma3":
        return _gemma3(text, tied, token_id)
    vision = {"hidden_size": 16, "intermediate_size": 32, "patch_size": PATCH, "initializer_range": 0.1}
    if model_type == "internvl":
        vision |= {"image_size": TILE, "num_hidden_layers": 2, "num_attention_heads": 2, "attention_bias": True}
        return transformers.InternVLConfig(
            text_config=text | {"model_type": "qwen2"},
            vision_config=vision,
            image_token_id=token_id("<IMG_CONTEXT>"),
            image_seq_length=TILE_TOKENS,
            tie_word_embeddings=tied,
        )
    if model_type == "smolvlm":
        vision |= {"image_size": TILE, "num_hidden_layers": 2, "num_attention_heads": 2}
        return transformers.SmolVLMConfig(
            text_config=text | {"model_type": "llama"},
            vision_config=vision,
            image_token_id=token_id("<image>"),
            pad_token_id=tokenizer.pad_token_id,
            scale_factor=2,
            tie_word_embeddings=tied,
        )
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


def _gemma3(text: dict, tied: bool, token_id):
    """Every third layer attends to all, the others to 8 tokens; the head dimension is not width by heads."""
    text |= {"head_dim": 12, "query_pre_attn_scalar": 24, "sliding_window": 8, "tie_word_embeddings": tied}
    text["layer_types"] = [
        "full_attention" if i % 3 == 2 else "sliding_attention" for i in range(text["num_hidden_layers"])
    ]
    text["rope_scaling"] = {"factor": 8.0, "rope_type": "linear"}
    text |= {f"{name}_token_id": token_id(f"<{name}>") for name in ("bos", "eos", "pad")}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "patch_size": PATCH // 2, "image_size": TILE, "vision_use_head": False}
    return transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=GEMMA_TOKENS,
        boi_token_index=token_id("<start_of_image>"),
        eoi_token_index=token_id("<end_of_image>"),
        image_token_index=token_id("<image_soft_token>"),
        eos_token_id=[token_id("<eos>"), token_id("<end_of_turn>")],
        initializer_range=text["initializer_range"],
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
        model = transformers.AutoModelForImageTextToText.from_config(config).eval()
        if model_type == "gemma3":  # the stock start: images are zeros, and norms' weights, to which one is added
            torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
            for name, parameter in model.get_decoder().named_parameters():
                if "norm" in name:
                    torch.nn.init.normal_(parameter, std=0.2)
    return model


def save(folder, model_type: str, **options) -> None:
    """A checkpoint with its processor."""
    processor = make_processor(model_type)
    make_model(model_type, tokenizer=processor.tokenizer, **options).save_pretrained(folder)
    processor.save_pretrained(folder)
