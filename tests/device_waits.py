"""A device that is not there, to count where the host waits for it: tensors "on" it are CPU tensors that are marked.

PyTorch's own functions are watched (`TorchFunctionMode`), so what runs is the real code with real numbers; inside
autograd's C++ nodes, which do not wait, nothing is seen.
"""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
READS = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__format__", "__repr__", "__contains__"}
READS |= {"numpy", "__array__", "cpu", "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "equal"}
READS |= {"is_nonzero", "allclose", "bincount"}
"""Functions that need a value, or a size that depends on one, on the host."""


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    with torch._C.DisableTorchFunction():
        while torch._C._functorch.is_batchedtensor(tensor):  # inside vmap, by which Gemma 3's masks are made
            tensor = torch._C._functorch.get_unwrapped(tensor)
        return tensor.untyped_storage()


class FakeDevice(TorchFunctionMode):
    """Inside, `cuda` is a device to which tensors can be sent. `waits` counts where the host waited for it.

    A wait is a function that reads values (`READS`), a copy from or to the device that is not `non_blocking`, an index
    by a mask, or `repeat_interleave` by a tensor. Its place is the innermost line outside torch, as "file:line".
    """

    def __init__(self):
        super().__init__()
        self.waits: Counter[str] = Counter()
        self._on: dict[int, torch.UntypedStorage] = {}  # held, so that no other storage gets the same address

    def on_device(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on the device."""
        return _storage(tensor)._cdata in self._on

    def _mark(self, tensor: torch.Tensor) -> None:
        storage = _storage(tensor)
        self._on[storage._cdata] = storage

    def _wait(self, what: str) -> None:
        place = [frame for frame in traceback.extract_stack() if not _inside(frame.filename)][-1]
        self.waits[f"{_short(place.filename)}:{place.lineno} {what}"] += 1

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        on = any(map(self.on_device, tensors))
        asked = any(map(_is_cuda, leaves))
        if name == "_parse_to":  # of Module.to
            return func(*args, **kwargs)
        if func == torch.Tensor.device.__get__:
            return DEVICE if on else func(*args)
        if func == torch.Tensor.is_cuda.__get__:
            return on
        if name == "pin_memory":
            return args[0].clone()
        args, kwargs = tree_map(lambda value: torch.device("cpu") if _is_cuda(value) else value, (args, kwargs))
        result = func(*args, **kwargs)
        if name == "copy_":
            self._crossed(self.on_device(args[1]), self.on_device(args[0]), args[2:], kwargs)
        elif name in ("to", "cpu", "tensor", "as_tensor"):
            goes = asked or (on and name != "cpu" and not any(_is_cpu(leaf) for leaf in leaves))
            if name == "to" and len(tensors) > 1:
                goes = self.on_device(tensors[1])
            self._crossed(on, goes, args[1:], kwargs)
            if goes != on and any(_same_storage(result, tensor) for tensor in tensors):
                result = result.clone()
            on = goes
        elif on and _reads(name, args, kwargs):
            self._wait(name)
        if on or asked:
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self._mark(leaf)
        return result

    def _crossed(self, source: bool, target: bool, rest: tuple, kwargs: dict) -> None:
        """Count a copy from (whether the device, to whether the device) that does not say `non_blocking`."""
        flags = [value for value in rest if isinstance(value, bool)]  # the first is non_blocking
        if source != target and not (kwargs.get("non_blocking") or any(flags[:1])):
            self._wait("blocking copy to the device" if target else "copy to the host")


def _reads(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether a function of tensors on the device needs one of their values on the host."""
    if name in READS:
        return True
    if name == "repeat_interleave":
        counts = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, torch.Tensor)]
        return bool(counts) and kwargs.get("output_size") is None
    if name == "where":
        return len(args) == 1
    if name in ("__getitem__", "__setitem__", "index_put_", "index_put"):
        masked = any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1]))
        # a mask to which one number is written is filled
        return masked and (name == "__getitem__" or (isinstance(args[2], torch.Tensor) and args[2].numel() > 1))
    return False


def _is_cuda(value) -> bool:
    return isinstance(value, torch.device | str) and str(value).partition(":")[0] == "cuda"


def _is_cpu(value) -> bool:
    return isinstance(value, torch.device | str) and str(value) == "cpu"


def _same_storage(one: torch.Tensor, other: torch.Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _inside(filename: str) -> bool:
    return "/torch/" in filename or filename == __file__


def _short(filename: str) -> str:
    parts = Path(filename).parts
    for root in ("site-packages", "vlsi_fast", "vlsi_kernels"):
        if root in parts:
            return "/".join(parts[parts.index(root) + (root == "site-packages") :])
    return parts[-1]
