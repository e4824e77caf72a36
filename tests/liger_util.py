"""liger-kernel in tests: its kernels in Triton's interpreter, and transformers' classes put back behind it."""

import contextlib
import importlib

import torch


@contextlib.contextmanager
def liger_kernels():
    """Inside, liger-kernel's kernels run: natively on CUDA, else in Triton's interpreter.

    Two things that compiled Triton does and its interpreter does not: a number that is passed to a kernel is a float32
    scalar there, which has a `.to`; and `libdevice.rsqrt`, which stands for a function of CUDA's library.
    """
    with contextlib.ExitStack() as undo:
        for name in (
            "llama",
            "qwen2",
            "qwen3",
            "qwen3_moe",
        ):  # liger-kernel replaces names in these modules, for the whole process
            names = vars(importlib.import_module(f"transformers.models.{name}.modeling_{name}"))
            undo.callback(names.update, dict(names))
        if not torch.cuda.is_available():
            _teach_the_interpreter(undo)
        yield


def _teach_the_interpreter(undo: contextlib.ExitStack) -> None:
    import numpy
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    converted = interpreter._implicit_cvt

    def convert(argument):
        if isinstance(argument, float):
            data = numpy.array([argument], dtype=numpy.float32)
            return tl.tensor(interpreter.TensorHandle(data, tl.float32), tl.float32)
        return converted(argument)

    def rsqrt(x):
        return tl.rsqrt(x)  # looked up when a kernel runs: only then is it the interpreter's

    for owner, name, value in ((interpreter, "_implicit_cvt", convert), (rms_norm, "rsqrt", rsqrt)):
        undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)
