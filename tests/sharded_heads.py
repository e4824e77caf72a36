"""Run by two ranks in test_kernels_sharded.py: both heads' rows divided over ranks, results of each rank saved."""

import sys

import torch
import torch.distributed as dist
from kernels_util import randn

from vlsi_kernels import (
    VocabularyShard,
    head_statistics,
    layer_kl_matrix,
    linear_cross_entropy,
    linear_logsumexp,
    teacher_targets,
)

ROWS = (301, 299)  # of each rank; the last 40 of the whole are padding
VOCAB = 560
IMPLS = ("torch", "triton")


def problem():
    """student [2, 5, 12], teacher [3, 5, 20], both heads, labels [10] with ignored ones and ones of both shards."""
    student, teacher = randn(2, 5, 12, seed=0), randn(3, 5, 20, seed=1)
    heads = [randn(sum(ROWS), width, seed=2 + width) for width in (12, 20)]
    for head in heads:
        head[VOCAB:] = float("nan")
    labels = torch.tensor([0, 300, 301, 559, -100, 7, 450, 302, -100, 12])
    return student, teacher, *heads, labels


def results(impl: str, options: dict, rows: slice) -> dict[str, torch.Tensor]:
    """All operators and their gradients on the heads' `rows`."""
    student, teacher, student_head, teacher_head, labels = problem()
    student_head, teacher_head = student_head[rows].clone(), teacher_head[rows].clone()
    options = {"impl": impl, "vocab_size": VOCAB, "workspace_bytes": 1} | options
    out = head_statistics(teacher.flatten(0, 1), teacher_head, student_head, **options)._asdict()
    student.requires_grad_()
    flat = student.flatten(0, 1)
    targets = teacher_targets(teacher, teacher_head, student_head, **options)
    out["kl"] = layer_kl_matrix(student, student_head, targets, **options)
    upstream = randn(2, 3, seed=9)
    (out["kl_gradient"],) = torch.autograd.grad(out["kl"], student, upstream)
    student_head.requires_grad_()
    for name, loss in (
        ("logsumexp_loss", linear_logsumexp(flat, student_head, **options)),
        ("cross_entropy", linear_cross_entropy(flat, student_head, labels, reduction="none", **options)),
    ):
        gradients = torch.autograd.grad(loss, (flat, student_head), randn(10, seed=10))
        out[name], (out[name + "_gradient"], out[name + "_head_gradient"]) = loss, gradients
    return {key: value.detach() for key, value in out.items()}


def main(folder: str):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    start = sum(ROWS[:rank])
    shard = VocabularyShard(group=None, start=start)
    saved = {impl: results(impl, {"shard": shard}, slice(start, start + ROWS[rank])) for impl in IMPLS}
    # the second rank's rows are all padding
    hidden, weight = randn(4, 8, seed=0), randn(40, 8, seed=1)[rank * 20 : rank * 20 + 20]
    options = {"vocab_size": 20, "shard": VocabularyShard(None, rank * 20)}
    saved["padding"] = head_statistics(hidden, weight, weight, **options)._asdict()
    torch.save(saved, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
