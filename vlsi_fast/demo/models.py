"""How the demo's teacher and student were made: `python -m vlsi_fast.demo.models` trains both again, from nothing.

Stock Qwen2-VL classes, a byte-level BPE trained on easy-VQA's own words, random weights, then this project's own sft
stage (`configs/demo_models.yaml`), in phases:

1. teacher, captions: one "color shape" caption an image, worked out from the questions of the train split. A question
   tells one fact in a word or two, so learning to see from questions alone takes many times longer.
2. teacher, questions of the train split, in two rounds: yes/no questions about shapes come last.
3. student, questions, few steps: it starts from the teacher's vision blocks, as the sizes of Qwen2-VL share one vision
   encoder, and a language model of random weights.

Only the train split is trained on; sizes were chosen in scouting that looked at test scores (LOG.md). The weights are
stored as bfloat16.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import torch

COLORS = ("red", "green", "blue", "yellow", "black", "gray", "brown", "teal")
SHAPES = ("circle", "rectangle", "triangle")
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

SIZES = {
    "teacher": {"hidden_size": 192, "layers": 7, "intermediate_size": 512, "heads": 6, "kv_heads": 2},
    "student": {"hidden_size": 96, "layers": 4, "intermediate_size": 192, "heads": 4, "kv_heads": 2},
}
PHASES = {
    "teacher_captions": {"training.max_steps": 1000},
    "teacher_questions": {"training.max_steps": 2400, "training.learning_rate": 1e-3},
    "teacher": {"training.max_steps": 1200, "training.learning_rate": 7e-4},
    "student": {"training.max_steps": 600},
}
"""Overrides of `configs/demo_models.yaml`."""
MODELS = Path(__file__).resolve().parent / "models"


def easy_vqa_train() -> tuple[Path, list[tuple[str, str, int]]]:
    """Folder of the train split and its (question, answer, image) triples."""
    import easy_vqa

    folder = Path(easy_vqa.__file__).resolve().parent / "data" / "train"
    return folder, [tuple(row) for row in json.loads((folder / "questions.json").read_text())]


def easy_vqa_texts() -> list[str]:
    """The train split's questions and, twice as often, its answers."""
    _, triples = easy_vqa_train()
    questions, answers = {q for q, _, _ in triples}, {a for _, a, _ in triples}
    return sorted(questions) * 2 + sorted(answers) * 4


def make_tokenizer(texts: list[str]):
    """Byte-level BPE of 256 bytes and up to 160 merges from the words of `texts`, with Qwen2-VL's special tokens."""
    import tokenizers
    from transformers import Qwen2Tokenizer

    texts = texts + ["user\n", "assistant\n", "system\n"] * 20
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256 + 160,
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


def captions() -> list[tuple[int, str]]:
    """(image, "color shape") of every train image whose questions tell both."""
    facts: dict[int, dict[str, str]] = defaultdict(dict)
    for question, answer, image in easy_vqa_train()[1]:
        words = question.rstrip("?").split()
        agrees = (answer == "yes") != ("not" in words or "no" in words)
        told = [answer] if answer not in ("yes", "no") else []
        if told or agrees:  # what a question mentions is there: "what color is the circle?", "is there a circle?" yes
            told += words
        for word in told:
            if word in COLORS:
                facts[image]["color"] = word
            elif word in SHAPES:
                facts[image]["shape"] = word
    return [(i, f"{f['color']} {f['shape']}") for i, f in sorted(facts.items()) if len(f) == 2]


def write_captions(path: Path) -> None:
    """Captions as rows of reader `messages`."""
    rows = []
    for image, caption in captions():
        turns = [{"role": "user", "content": "<image>describe the image"}, {"role": "assistant", "content": caption}]
        rows.append(json.dumps({"images": [f"images/{image}.png"], "messages": turns}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows) + "\n")


def share_vision(student, teacher) -> None:
    """Give the student the teacher's vision blocks; the merger's last layer has the student's own width."""
    own = student.model.visual.state_dict()
    given = {n: v for n, v in teacher.model.visual.state_dict().items() if own[n].shape == v.shape}
    student.model.visual.load_state_dict(own | given)


def main() -> int:
    """Train both and write them into the package."""
    from ..config import load_config
    from ..loading import load_backbone
    from ..stages import run

    parser = argparse.ArgumentParser(prog="python -m vlsi_fast.demo.models", description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/demo_models.yaml", help="recipe (default: %(default)s)")
    parser.add_argument("--work-dir", default="runs/demo_models", help="folder of the phases (default: %(default)s)")
    parser.add_argument("--work_dir", default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # its older spelling
    parser.add_argument("--models-dir", default=str(MODELS), help="where the two models go (default: the package)")
    parser.add_argument("--models_dir", default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # its older spelling
    arguments = parser.parse_args()
    work, processor = Path(arguments.work_dir), make_processor(make_tokenizer(easy_vqa_texts()))
    captions_file = work / "captions.jsonl"
    write_captions(captions_file)

    def phase(name: str, start: Path) -> Path:
        output = work / name
        changes = {"output_dir": str(output), "student.path": str(start), "teacher.path": str(start)}
        if name == "teacher_captions":
            source = {"reader": "messages", "path": str(captions_file), "image_root": str(easy_vqa_train()[0])}
            changes["data.train"] = [source]
        run(load_config(arguments.config, changes | PHASES[name]), "sft", resume=True)
        return output / "sft" / "student"

    def start(role: str, model) -> Path:
        folder = work / f"{role}_start"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return folder

    teacher = make_model(SIZES["teacher"], processor.tokenizer)
    folder = start("teacher", teacher)
    for name in ("teacher_captions", "teacher_questions", "teacher"):
        folder = phase(name, folder)
    results = {"teacher": folder}
    student = make_model(SIZES["student"], processor.tokenizer, seed=1)
    share_vision(student, load_backbone(results["teacher"], "float32"))
    results["student"] = phase("student", start("student", student))
    for role, folder in results.items():
        target = Path(arguments.models_dir) / role
        shutil.rmtree(target, ignore_errors=True)
        load_backbone(folder, "bfloat16").save_pretrained(target)
        processor.save_pretrained(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
