"""Shared by the operator tests: largest-tensor recorder, error measures, and the three precision regimes."""

import os

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

VOCAB = 151936


class LargestTensor(TorchDispatchMode):
    """Records the element count of the largest tensor that any operation produced."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return out


PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.mkldnn._linear_pointwise}


class MatmulSettings(TorchDispatchMode):
    """Records (CUDA float32 precision, CPU float32 precision) as they were at every matrix product."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in PRODUCTS:
            backends = torch.backends
            self.seen.add((backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision))
        return func(*args, **(kwargs or {}))


def relative_error(value, truth):
    """Frobenius norm of the difference over that of the truth."""
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


def randn(*shape, seed, dtype=torch.float32, scale=1.0):
    """Normal numbers that depend on `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def regime(name, dtype, layers=2, tokens=6, width=48):
    """student_hidden [2, N, D], student_weight [V, D], teacher_hidden [L, N, D], teacher_weight [V + 128, D].

    "far": unrelated distributions; "near": KL about 0.01; "near_large": the same with logits up to about 50.
    """
    weight = randn(VOCAB + 128, width, seed=1, scale=width**-0.5)
    spread = 11.0 if name == "near_large" else 2.0  # standard deviation of the logits; the largest is about 4.5 of it
    teacher = randn(layers, tokens, width, seed=2, scale=spread)
    if name == "far":
        student = randn(2, tokens, width, seed=3, scale=spread)
    else:
        student = teacher[[0, 1]] + randn(2, tokens, width, seed=4, scale=0.14)
    weight, teacher, student = weight.to(dtype), teacher.to(dtype), student.to(dtype)
    student_weight = weight[:VOCAB].clone()
    weight[VOCAB:] = float("nan")  # padding rows, which take no part
    return student, student_weight, teacher, weight


def make_interpreter_round_to_nearest():
    """Triton's interpreter truncates float32 to bfloat16, twice the error of the hardware's rounding to nearest."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    original = interpreter._convert_float

    def convert(data, source, target, rounding_mode):
        if source.name == "fp32" and target.name == "bf16":
            return torch.from_numpy(data.copy()).bfloat16().view(torch.int16).numpy().view("uint16")
        return original(data, source, target, rounding_mode)

    interpreter._convert_float = convert
