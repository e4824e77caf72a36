"""A CUDA device that is not there: what Python sees of it. Every private name of torch that a dry run rests on is here
or in tape.py, and `require_torch` says which one is gone.

A tensor on the device is one of torch's meta tensors: a shape, a dtype and strides without storage, for which C++ has
shape functions and autograd. Python is told that it is on `cuda:0`, and what is asked of `torch.cuda` is answered for
the GPU that the user named. Tensors on the host are real.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._pytree import tree_map

from ...errors import UserError
from .autocast import Autocast
from .gpus import Gpu
from .tape import Tape

DEVICE = torch.device("cuda", 0)
MADE_OF_NUMBERS = ("tensor", "as_tensor", "asarray", "new_tensor")
"""Functions that copy numbers of the host: with a device they copy twice, and the second time wait."""
TOLD = ("__format__", "__repr__", "__array__", "numpy", "__contains__")
"""Functions of torch, written in Python or asking C++ for storage, that read what a tensor holds."""


class TorchChangedError(UserError, RuntimeError):
    """torch or Triton lacks something that dry runs rest on."""

    exit_code = 1


def require_torch() -> None:
    """Raise TorchChangedError where the torch that is installed lacks what is used here and in tape.py."""
    from torch.nn.attention import varlen

    needed = [
        (torch._C, "DisableTorchFunction"),
        (torch._C, "_current_autograd_node"),
        (torch._C, "_autograd"),
        (torch._C._autograd, "_get_sequence_nr"),
        (torch.UntypedStorage, "_cdata"),
        (torch.ops.aten, "_scaled_dot_product_flash_attention"),
        (torch.ops.aten, "_scaled_dot_product_efficient_attention"),
        (torch.ops.aten, "_local_scalar_dense"),
        (varlen, "varlen_attn"),
        (torch, "clear_autocast_cache"),
        (torch.autograd, "_engine_run_backward"),
        (checkpoint, "_allowed_determinism_checks_to_fns"),
        (checkpoint, "_recomputation_hook"),
    ]
    missing = [f"{getattr(owner, '__name__', owner)}.{name}" for owner, name in needed if not hasattr(owner, name)]
    if missing:
        raise TorchChangedError(
            f"a dry run rests on {', '.join(missing)}, which torch {torch.__version__} does not have; it was made for "
            "torch 2.11 to 2.13: use one of them for it, or leave out --dry-run"
        )


class FakeDevice(TorchFunctionMode):
    """Inside, meta tensors say that they are on `DEVICE`, and `DEVICE` as an argument makes such tensors."""

    def __init__(self, tape: Tape):
        super().__init__()
        self.tape, self.autocast = tape, Autocast()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__":
            return self._attribute(func, args)
        if name == "_parse_to" or func is torch.device:  # of Module.to, which hands the device on
            return func(*args, **kwargs)
        if name in ("pin_memory", "is_pinned"):
            return self.tape.pin(args[0]) if name == "pin_memory" else self.tape.is_pinned(args[0])
        if name in TOLD and args[0].is_meta:
            return func(self.tape.on_host(args[0], name), *args[1:], **kwargs)
        if name == "data_ptr" and args[0].is_meta:  # allocations are aligned, views begin where they begin
            return args[0].storage_offset() * args[0].itemsize
        if name == "cuda":
            return args[0].to("meta", **{k: v for k, v in kwargs.items() if k == "non_blocking"})
        if name in MADE_OF_NUMBERS:
            return self._from_numbers(func, args, kwargs)
        args, kwargs = tree_map(lambda value: torch.device("meta") if _is_cuda(value) else value, (args, kwargs))
        args, kwargs = self.autocast(name, args, kwargs)
        if name == "scaled_dot_product_attention" and args[0].is_meta:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _attribute(self, func, args) -> Any:
        value = func(*args)
        if args[0].is_meta:
            if func == Tensor.device.__get__:
                return DEVICE
            if func in (Tensor.is_cuda.__get__, Tensor.is_meta.__get__):
                return func == Tensor.is_cuda.__get__
        return value

    def _from_numbers(self, func, args, kwargs):
        own = _is_there(args[0])
        asked = kwargs.pop("device", None)
        if func.__name__ == "new_tensor":
            func, args, asked = torch.tensor, args[1:], asked or (DEVICE if own else None)
        elif own:
            return args[0] if asked is None or _is_cuda(asked) else args[0].to(asked)
        args = tree_map(lambda v: self.tape.on_host(v, "item").tolist() if _is_there(v) else v, args)
        made = func(*args, device="cpu" if asked is None or _is_cuda(asked) else asked, **kwargs)
        return made.to("meta") if _is_cuda(asked) else made


def _is_there(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def _is_cuda(value: Any) -> bool:
    return isinstance(value, torch.device | str) and str(value).partition(":")[0] == "cuda"


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """The fused operator that torch takes on CUDA: flash-attention where it can, else the memory-efficient one."""
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256:
        pad = -query.shape[-1] % 8
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        parts = [torch.nn.functional.pad(t, (0, pad)) if pad else t for t in (query, key, value)]
        out = torch.ops.aten._scaled_dot_product_flash_attention(*parts, dropout_p, is_causal, False, scale=scale)[0]
        return out[..., : query.shape[-1]]
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, grad, dropout_p, is_causal, scale=scale
    )[0]


@contextlib.contextmanager
def on(gpu: Gpu, tape: Tape) -> Iterator[FakeDevice]:
    """Inside, this process has the GPU, and what runs there is noted on the tape."""
    device = FakeDevice(tape)
    stream = mock.Mock(cuda_stream=0)
    properties = mock.Mock(
        total_memory=gpu.memory_bytes,
        multi_processor_count=gpu.multiprocessors,
        major=gpu.capability[0],
        minor=gpu.capability[1],
    )
    properties.name = gpu.name
    answers = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "is_current_stream_capturing": False,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": gpu.capability,
        "get_device_name": gpu.name,
        "get_device_properties": properties,
        "mem_get_info": (gpu.memory_bytes, gpu.memory_bytes),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "reset_peak_memory_stats": None,
        "empty_cache": None,
        "set_device": None,
        "current_stream": stream,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, _saying(answer)))
        stack.enter_context(mock.patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()))
        stack.enter_context(mock.patch.object(torch.cuda, "synchronize", lambda *_: tape.wait("synchronize")))
        stack.enter_context(mock.patch.object(torch.backends.cuda, "is_flash_attention_available", _saying(True)))
        stack.enter_context(mock.patch.object(torch, "clear_autocast_cache", device.autocast.forget))
        stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", _under(device)))
        stack.enter_context(mock.patch.dict(checkpoint._allowed_determinism_checks_to_fns, default=_as_saved))
        stack.enter_context(mock.patch.object(checkpoint, "_recomputation_hook", _noting(tape)))
        stack.enter_context(tape)
        stack.enter_context(device)
        yield device


def _under(device: FakeDevice):
    """autograd's engine with the mode on: `backward` is one of the functions that torch runs without the mode."""
    run = torch.autograd._engine_run_backward

    def engine(*args, **kwargs):
        with device:
            return run(*args, **kwargs)

    return engine


def _as_saved(tensor: Tensor) -> dict[str, Any]:
    """What a gradient checkpoint compares of a tensor. Hooks on saved tensors run with the mode off and with it on."""
    with torch._C.DisableTorchFunction():
        return {"shape": tensor.shape, "dtype": tensor.dtype}


def _noting(tape: Tape) -> type:
    """What is entered while a gradient checkpoint computes again, which the tape is told of."""

    class Noted(checkpoint._recomputation_hook):
        def __enter__(self):
            tape.recomputing = True
            return super().__enter__()

        def __exit__(self, *error):
            tape.recomputing = False
            return super().__exit__(*error)

    return Noted


def _saying(answer: Any):
    return lambda *args, **kwargs: answer
