"""How the demo's teacher was made: `python -m vlsi_fast.demo.models` trains it again, from nothing.

A stock Qwen2-VL class of random weights and a byte-level BPE trained on the words of the descriptions. Then this
project's own sft stage (`configs/demo_models.yaml`) in two phases, on the split `teacher_train` of `demo.pictures`:

1. listing: "red circle, nothing, blue star with a dot, nothing", one fixed wording. A small model learns to see by it.
2. describing: the same pictures in free wording.

There is no recipe for a student: `vlsi-fast demo` makes it from the teacher by leaving layers out (`vlsi-fast shrink`).
Settings were chosen on the validation split. The weights are stored as bfloat16.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part['type'] == 'text' -%}
                {{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
"""Qwen2-VL's chat format without its default system message: half the tokens of these short rows would be that."""

TEACHER = {"hidden_size": 96, "layers": 8, "intermediate_size": 256, "heads": 4, "kv_heads": 2}
"""1.1M parameters."""
MERGES = 160
"""Of its tokenizer: the descriptions' words are then whole."""
PHASES = {
    "listing": {"training.max_steps": 300},
    "describing": {"training.max_steps": 600, "training.learning_rate": 2e-3},
}
"""Overrides of `configs/demo_models.yaml`."""
MODELS = Path(__file__).resolve().parent / "models"
CONFIG = "configs/demo_models.yaml"


def texts(data: Path) -> list[str]:
    """Questions and answers of the two training splits (`pictures.write`), for a tokenizer."""
    files = [data / f"{split}{kind}.jsonl" for split in ("teacher_train", "train") for kind in ("", "_list")]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [turn["content"].removeprefix("<image>") for row in rows for turn in row["messages"]]


def make_tokenizer(texts: list[str], merges: int = MERGES):
    """Byte-level BPE of 256 bytes and up to `merges` merges from the words of `texts`; Qwen2-VL's special tokens."""
    import tokenizers
    from transformers import Qwen2Tokenizer

    texts = texts + ["user\n", "assistant\n", "system\n"] * 20
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256 + merges,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )
    trained.train_from_iterator(texts, trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS[1:])})
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_processor(tokenizer):
    """64 x 64 pixels in patches of 8, merged 2 x 2: 16 image tokens. White backgrounds are normalised to about 0."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from ..data.processors import build_qwen2_vl_processor

    image_processor = Qwen2VLImageProcessorPil(
        patch_size=8,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 64 * 64, "longest_edge": 64 * 64},
        image_mean=[0.95] * 3,
        image_std=[0.4] * 3,
    )
    return build_qwen2_vl_processor(tokenizer, image_processor, CHAT_TEMPLATE)


def make_model(size: dict[str, int], tokenizer, seed: int = 0):
    """A stock model of random weights, of scale width**-0.5: with the usual 0.02 so small a model does not learn."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    token_id = tokenizer.convert_tokens_to_ids
    half = size["hidden_size"] // size["heads"] // 2
    spatial = 3 * half // 8
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 32) * 32,
            "hidden_size": size["hidden_size"],
            "intermediate_size": size["intermediate_size"],
            "num_hidden_layers": size["layers"],
            "num_attention_heads": size["heads"],
            "num_key_value_heads": size["kv_heads"],
            "max_position_embeddings": 512,
            "initializer_range": size["hidden_size"] ** -0.5,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [half - 2 * spatial, spatial, spatial],
            },
            "bos_token_id": token_id("<|endoftext|>"),
            "eos_token_id": token_id("<|im_end|>"),
            "pad_token_id": token_id("<|endoftext|>"),
        },
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": size["hidden_size"],
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "initializer_range": 64**-0.5,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    model.generation_config.pad_token_id = config.text_config.pad_token_id
    return model


def train_teacher(
    work: Path,
    data: Path,
    size: dict[str, int] = TEACHER,
    seed: int = 0,
    config: str = CONFIG,
    overrides: dict | None = None,
    merges: int = MERGES,
) -> Path:
    """Train a teacher of the given size on `pictures.write`'s data; a run that was stopped goes on.

    Args:
        work: folder of its phases.
        data: folder that `pictures.write` filled.
        size: as `make_model` takes it.
        seed: of the random weights.
        config: YAML file with the recipe.
        overrides: of the recipe.
        merges: of its tokenizer.

    Returns:
        Folder of a float32 checkpoint with its processor.
    """
    from ..config import load_config
    from ..stages import run

    folder = work / "start"
    if not (folder / "config.json").exists():
        processor = make_processor(make_tokenizer(texts(data), merges))
        make_model(size, processor.tokenizer, seed).save_pretrained(folder)
        processor.save_pretrained(folder)
    for name, file in (("listing", "teacher_train_list.jsonl"), ("describing", "teacher_train.jsonl")):
        source = {"reader": "messages", "path": str(data / file), "image_root": str(data)}
        changes = {"output_dir": str(work / name), "student.path": str(folder), "teacher.path": str(folder)}
        changes |= {"data.train": [source]} | PHASES[name] | (overrides or {})
        run(load_config(config, changes), "sft", resume=True)
        folder = work / name / "sft" / "student"
    return folder


def main() -> int:
    """Draw the data, train the teacher and write it into the package."""
    from ..data.processors import load_processor
    from ..loading import load_backbone
    from .pictures import write

    parser = argparse.ArgumentParser(prog="python -m vlsi_fast.demo.models", description=__doc__.split("\n")[0])
    parser.add_argument("--config", default=CONFIG, help="recipe (default: %(default)s)")
    parser.add_argument("--work-dir", default="runs/demo_models", help="folder of the phases (default: %(default)s)")
    parser.add_argument("--models-dir", default=str(MODELS), help="where the teacher goes (default: the package)")
    arguments = parser.parse_args()
    work = Path(arguments.work_dir)
    if not (work / "data" / "test.jsonl").exists():
        write(work / "data")
    folder = train_teacher(work, work / "data", config=arguments.config)
    target = Path(arguments.models_dir) / "teacher"
    shutil.rmtree(target, ignore_errors=True)
    load_backbone(folder, "bfloat16").save_pretrained(target)
    load_processor(folder).save_pretrained(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
