"""Other people's implementations, each imported only where it is asked for; one that is missing raises Absent.

Pair losses: (student hidden [N, Ds], teacher hidden [N, Dl], labels [N]) -> mean loss over labels that are not -100,
gradient [N, Ds]. Cross-entropies: (hidden [R, D], labels [R]) -> mean loss, gradient [R, D]. Heads are frozen and hold
no padding rows: Liger's distillation losses pad with zeros, which would count.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Absent, Run
from torch import Tensor
from torch.nn import functional

PairLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
CrossEntropy = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def with_gradient(loss_of: Callable[[Tensor], Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
    """A loss and its gradient with respect to hidden."""
    leaf = hidden.detach().requires_grad_()
    loss = loss_of(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def need_triton(device: torch.device) -> None:
    """Raises Absent where Triton kernels cannot run."""
    if device.type != "cuda":
        raise Absent("its Triton kernels need a GPU")


def need_compile(run: Run, part: int = 0) -> None:
    """Raises Absent where torch.compile is not wanted: it takes up to a minute, so only the first shape gets it."""
    if not run.compile:
        raise Absent("slow to compile; ask for it by --compile")
    if part:
        raise Absent("compiled for the first shape only, since compiling takes long")


def not_compiled(compiled: bool) -> str:
    """A remark on a peer that compiles itself by default."""
    return "" if compiled else "compiled=False"


# ---- divergence of one pair ----


def liger_fused_jsd(student_weight: Tensor, teacher_weight: Tensor, beta: float) -> PairLoss:
    """`LigerFusedLinearJSD`: chunks of tokens, Triton in between. beta 0: KL(teacher || student), 1: the reverse."""
    need_triton(student_weight.device)
    from liger_kernel.transformers import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=beta)

    def run(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return with_gradient(lambda h: module(h, student_weight, teacher, teacher_weight, labels), student)

    return run


def liger_chunked_jsd(student_weight: Tensor, teacher_weight: Tensor, beta: float, compiled: bool) -> PairLoss:
    """`liger_kernel.chunked_loss` JSD: chunks of 1024 tokens in plain PyTorch. The same beta as LigerFusedLinearJSD.

    It takes the gradient of the head as well, frozen or not.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled)

    def run(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return with_gradient(lambda h: module(h, student_weight, teacher, teacher_weight, labels), student)

    return run


def liger_fused_kl(student_weight: Tensor, teacher_weight: Tensor) -> PairLoss:
    """`LigerFusedLinearKLDivLoss` (liger-kernel 0.8.5): KL(teacher || student) from the teacher's probabilities, which
    are therefore materialized first, in the head's dtype."""
    need_triton(student_weight.device)
    return liger_kl_of_probabilities(student_weight, teacher_weight)


def liger_kl_of_probabilities(student_weight: Tensor, teacher_weight: Tensor) -> PairLoss:
    """The same without a look at the device: tests run it in Triton's interpreter."""
    from liger_kernel.transformers import LigerFusedLinearKLDivLoss

    module = LigerFusedLinearKLDivLoss()

    def run(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        p = (teacher @ teacher_weight.T).softmax(-1, dtype=torch.float32).to(student.dtype)
        return with_gradient(lambda h: module(h, student_weight, p, labels), student)

    return run


# ---- cross-entropy ----


def eager_cross_entropy(weight: Tensor, layers: int, accurate: bool) -> CrossEntropy:
    """Logits in full, a layer at a time. `accurate`: inputs in float32, where a half-precision product would round."""
    weight = weight.float() if accurate else weight

    def run(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        rows, losses, gradients = max(1, len(hidden) // layers), [], []
        count = (labels != -100).sum()
        for h, y in zip(hidden.split(rows), labels.split(rows)):
            leaf = (h.float() if accurate else h).detach().requires_grad_()
            loss = functional.cross_entropy((leaf @ weight.T).float(), y, reduction="sum") / count
            gradients += torch.autograd.grad(loss, leaf)
            losses.append(loss.detach())
        return sum(losses), torch.cat(gradients).to(hidden.dtype)

    return run


def compiled_cross_entropy(weight: Tensor, chunk: int = 1024) -> CrossEntropy:
    """torch.compile over chunks of tokens."""

    @torch.compile
    def chunk_loss(h: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy((h @ weight.T).float(), y, reduction="sum")

    def run(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        losses, gradients, count = [], [], (labels != -100).sum()
        for h, y in zip(hidden.split(chunk), labels.split(chunk)):
            loss, gradient = with_gradient(lambda leaf, y=y: chunk_loss(leaf, y) / count, h)
            losses.append(loss)
            gradients.append(gradient)
        return sum(losses), torch.cat(gradients)

    return run


def liger_cross_entropy(weight: Tensor) -> CrossEntropy:
    """`LigerFusedLinearCrossEntropyLoss`."""
    need_triton(weight.device)
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    module = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, labels: with_gradient(lambda h: module(weight, h, labels), hidden)


def cut_cross_entropy(weight: Tensor) -> CrossEntropy:
    """Apple's cut-cross-entropy, its own defaults."""
    need_triton(weight.device)
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, labels: with_gradient(lambda h: linear_cross_entropy(h, weight, labels), hidden)


def torch_cross_entropy(weight: Tensor) -> CrossEntropy:
    """torch's own linear_cross_entropy, chunked."""
    if not hasattr(functional, "linear_cross_entropy") or not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Absent(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, labels: with_gradient(
        lambda h: functional.linear_cross_entropy(h, weight, labels, options=options), hidden
    )
