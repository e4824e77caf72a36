"""What is noted of every operator that runs on a device that is not there, in forward and in autograd's own backward.

* memory: each storage from its first tensor to its last, in the columns of the planner;
* FLOPs of the products, by part of the step; how many operators would launch a kernel, and the bytes that each moves;
* waits: where the host asks for a number on the device, with file and line. It is told 0, or, of small whole numbers
  that came from the host (lengths, image sizes) and what is computed of them, the number itself;
* mixing: an operator that takes a tensor of the host beside one of the device raises, as it would on a GPU.
"""

from __future__ import annotations

import bisect
import math
import sys
import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.attention.varlen  # registers its operators
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten
KNOWN_ELEMENTS = 2**20
"""Tensors of whole numbers up to this size keep their values on the host as well."""
BLOCK_BYTES = 512
"""CUDA's allocator gives out multiples of it."""
WITHOUT_KERNEL = {"detach", "empty", "empty_like", "empty_strided", "new_empty", "lift_fresh", "_unsafe_view", "alias"}
"""Operators, beside views, that launch nothing."""
CROSSING = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""Operators whose indices may be on the host: they are copied, which waits."""
SIZED_BY_VALUES = {
    *(aten.nonzero.default, aten.repeat_interleave.Tensor, aten.masked_select.default, aten.bincount.default),
    *(aten._unique2.default, aten.unique_consecutive.default, aten.unique_dim.default),
}
"""Operators whose result has a size that depends on values: the host waits for it."""
READ_IN_PART = {aten.embedding, aten.index, aten.gather, aten.index_select}
"""Operators that read of their largest input no more than they return."""
WRITTEN_IN_PART = {aten.index_put, aten.index_put_, aten._index_put_impl_, aten.index_add_, aten.scatter_}
"""Operators that touch of the tensor that they write as much as their largest other input holds."""
HERE = str(Path(__file__).parent)


class Kernel(NamedTuple):
    """What one launch does, as far as its arguments tell."""

    part: str
    name: str
    dtype: str
    """Of the narrowest floating-point input: what a product multiplies in."""
    flops: int
    moved: int
    """Bytes of all inputs and results, each read or written once."""


class DeviceMixError(RuntimeError):
    """An operator was given tensors of the device and of the host."""


class Tape(TorchDispatchMode):
    """Inside, operators on meta tensors are noted."""

    def __init__(self):
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.peak_part = ""
        self.waits: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.operators: Counter[str] = Counter()
        self.work: Counter[Kernel] = Counter()
        self.part = "other"
        self.column = "activations"
        """Where what operators make is counted."""
        self.recomputing = False
        """Whether backward is in a gradient checkpoint's second forward."""
        self._backward = False
        self._peak = 0
        self._starts: list[int] = []
        self._parts: list[str] = []
        self._columns: dict[int, str] = {}
        self._values = WeakIdKeyDictionary()
        self._pinned: set[int] = set()

    # ---- parts of a step ----

    @contextmanager
    def inside(self, part: str, column: str = "activations") -> Iterator[None]:
        """What runs inside, and the backward of it, belongs to `part`; what it makes to `column`."""
        before = self.part, self.column
        self.column = column
        self._enter(part)
        try:
            yield
        finally:
            self.column = before[1]
            self._enter(before[0])

    def _enter(self, part: str) -> None:
        self.part = part
        if not self._backward:  # what backward will run bears the numbers of the nodes that are made now
            self._starts.append(torch._C._autograd._get_sequence_nr())
            self._parts.append(part)

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Inside, operators belong to the part whose autograd node runs them."""
        self._backward, before = True, self.part
        try:
            yield
        finally:
            self._backward, self.part = False, before

    def _part_of_operator(self) -> str:
        if not self._backward:
            return self.part
        node = torch._C._current_autograd_node()
        number = node._sequence_nr() if node is not None else 2**63
        at = bisect.bisect_right(self._starts, number) - 1
        part = self._parts[at] if 0 <= at and number < 2**63 else "other"
        return f"{part} recomputation" if self.recomputing else f"{part} backward"

    # ---- memory ----

    def hold(self, tensor: Tensor, column: str) -> None:
        """Count a tensor's storage, or move it, to a column."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
        if key in self._columns:
            self.live[self._columns[key]] -= size
        else:
            weakref.finalize(storage, self._free, key, size)
        self._columns[key] = column
        self.live[column] += size
        total = sum(self.live.values())
        if total > self._peak:
            self._peak, self.peak, self.peak_part = total, dict(self.live), self._part_of_operator()

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor's storage is counted already."""
        return tensor.untyped_storage()._cdata in self._columns

    def _free(self, key: int, size: int) -> None:
        self.live[self._columns.pop(key)] -= size

    def begin(self) -> None:
        """Forget peak, waits and counts: what was before is preparation."""
        self._peak, self.peak = 0, {}
        for counter in (self.waits, self.flops, self.operators, self.work):
            counter.clear()

    # ---- what the host asks for ----

    def wait(self, what: str) -> None:
        """Note that the host waits for the device, at the innermost line outside torch."""
        self.waits[f"{_place()} {what}"] += 1

    def on_host(self, tensor: Tensor, what: str) -> Tensor:
        """A tensor of the device as the host gets it; the host waits."""
        self.wait(what)
        return self._known(tensor)

    def _known(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        found = self._values.get(tensor)
        if found is None:
            return torch.zeros(tensor.shape, dtype=dtype or tensor.dtype)
        return found.to(dtype or found.dtype, copy=True)

    def pin(self, tensor: Tensor) -> Tensor:
        """A page-locked copy, from which a copy to the device need not wait."""
        copy = tensor.clone()
        storage = copy.untyped_storage()
        self._pinned.add(storage._cdata)
        weakref.finalize(storage, self._pinned.discard, storage._cdata)
        return copy

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether `pin` made it, or it is part of such a one."""
        return tensor.untyped_storage()._cdata in self._pinned

    # ---- operators ----

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunction():
            return self._operator(func, args, kwargs)

    def _operator(self, func, args, kwargs):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [t for t in tensors if t.is_meta]
        if not there and not _is_meta(kwargs.get("device")):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return self.on_host(args[0], "item").flatten()[0].item()
        if func in CROSSING and (crossed := self._crossing(func, args, kwargs)) is not None:
            return crossed
        if func in SIZED_BY_VALUES and kwargs.get("output_size") is None:
            self.wait(func.overloadpacket.__name__)
            host = tree_map(lambda v: self._known(v) if isinstance(v, Tensor) and v.is_meta else v, (args, kwargs))
            return tree_map(lambda v: self._moved(v) if isinstance(v, Tensor) else v, func(*host[0], **host[1]))
        if len(there) < len(tensors):
            args = self._mixed(func, args, tensors)
        if func in INDEXED:
            args = self._without_masks(func, args)
        result = func(*args, **kwargs)
        self._count(func, args, kwargs, result)
        self._follow(func, args, kwargs, result)
        return result

    def _crossing(self, func, args, kwargs) -> Tensor | None:
        """A copy between host and device; None for one that stays on the device."""
        if func is aten.copy_.default:
            source, target = args[1].is_meta, args[0].is_meta
            waits = not (len(args) > 2 and args[2] or kwargs.get("non_blocking"))
        else:
            source, target = args[0].is_meta, args[0].is_meta
            target = _is_meta(kwargs["device"]) if kwargs.get("device") is not None else target
            waits = not kwargs.get("non_blocking")
        if source == target:
            return None
        host = args[1] if func is aten.copy_.default else args[0]
        if waits or (target and host.dim() and not self.is_pinned(host)):
            self.wait("blocking copy to the device" if target else "copy to the host")
        if not target:
            known = self._known(host, kwargs.get("dtype"))
            return args[0].copy_(known) if func is aten.copy_.default else known
        result = func(*args, **kwargs)
        self._count(func, args, kwargs, result)
        if func is aten._to_copy.default and _may_be_known(result):
            self._values[result] = host.to(result.dtype, copy=True)
        else:
            self._values.pop(args[0], None)
        return result

    def _moved(self, host: Tensor) -> Tensor:
        """A tensor of known values on the device."""
        result = torch.empty_like(host, device="meta")
        self._values[result] = host
        self.hold(result, self.column)
        return result

    def _mixed(self, func, args, tensors) -> tuple:
        """Arguments, where tensors of the host among them are allowed: numbers, and indices, which are copied."""
        host = [t for t in tensors if not t.is_meta]
        if func in INDEXED:
            if not all(t.is_meta for t in tensors if not any(t is i for i in args[1])):
                raise self._mix(func, host)
            for _ in host:
                self.wait("blocking copy to the device")
            return (args[0], [self._moved(i) if i is not None and not i.is_meta else i for i in args[1]], *args[2:])
        if any(t.dim() for t in host) or "Tensor" not in str(func) and "_foreach" not in str(func):
            raise self._mix(func, host)
        return args

    def _mix(self, func, host: list[Tensor]) -> DeviceMixError:
        shapes = ", ".join(str(list(t.shape)) for t in host)
        return DeviceMixError(
            f"{_place()}: {func} takes tensors on the GPU together with one on the CPU (shape {shapes}); on a GPU this "
            "is an error: move it with .to(device, non_blocking=True) first"
        )

    def _without_masks(self, func, args) -> tuple:
        """A mask as index stands for the positions where it is set, whose number the host must know."""
        value = args[2] if len(args) > 2 else None
        filled = value is not None and isinstance(value, Tensor) and value.numel() == 1
        if not any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            return args
        indices = []
        for index in args[1]:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                indices.append(index)
                continue
            if not filled:  # one number at a mask is written without counting
                self.wait("index by a mask")
            indices += [self._moved(column) for column in self._known(index).nonzero(as_tuple=True)]
        return (args[0], indices, *args[2:])

    def _count(self, func, args, kwargs, result) -> None:
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_meta and leaf.untyped_storage()._cdata not in self._columns:
                self.hold(leaf, self.column)
        if func.is_view or func.namespace in ("prim", "profiler"):
            return
        if func.overloadpacket.__name__ in WITHOUT_KERNEL:
            return
        packet = func.overloadpacket
        flops = FLOPS[packet](*args, **kwargs, out_val=result) if packet in FLOPS else 0
        read = _tensors((args, {name: value for name, value in kwargs.items() if name != "out"}))
        self._note(packet.__name__, flops, read, _moved_bytes(packet, read, _written(func, args, kwargs, result)))

    def launched(self, kernel: str, flops: int, arguments: Any) -> None:
        """Note the launch of a Triton kernel with these arguments, of which it touches each once."""
        read = _tensors(arguments)
        self._note(kernel, flops, read, sum(map(_size, read)))

    def _note(self, name: str, flops: int, read: list[Tensor], moved: int) -> None:
        part = self._part_of_operator()
        kinds = [t.dtype for t in read if t.is_floating_point()]
        dtype = str(min(kinds, key=lambda kind: kind.itemsize, default="none")).removeprefix("torch.")
        self.operators[part] += 1
        if flops:
            self.flops[part] += flops
        self.work[Kernel(part, name, dtype, flops, moved)] += 1

    def _follow(self, func, args, kwargs, result) -> None:
        """Repeat an operator of known whole numbers on the host."""
        written = [
            arg for arg, spec in zip(args, func._schema.arguments) if spec.alias_info and spec.alias_info.is_write
        ]
        leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_meta]
        known = bool(leaves) and all(map(_may_be_known, leaves)) and all(t in self._values for t in tensors)
        if not known or "empty" in func.name() or "rand" in func.name():
            for tensor in tree_leaves(written):
                if isinstance(tensor, Tensor):
                    self._values.pop(tensor, None)
            return
        swap = {id(t): self._values[t] for t in tensors}
        host_args, host_kwargs = tree_map(
            lambda v: swap.get(id(v), v) if isinstance(v, Tensor) else torch.device("cpu") if _is_meta(v) else v,
            (args, kwargs),
        )
        made = [leaf for leaf in tree_leaves(func(*host_args, **host_kwargs)) if isinstance(leaf, Tensor)]
        for leaf, value in zip(leaves, made):
            self._values[leaf] = value


def _tensors(tree: Any) -> list[Tensor]:
    """Every tensor of nested containers, once."""
    return list({id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}.values())


def _written(func, args, kwargs, result) -> list[Tensor]:
    """Results, and the arguments that an operator writes to."""
    given = [
        *zip(func._schema.arguments, args),
        *((a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs),
    ]
    return _tensors([result, [value for spec, value in given if spec.alias_info and spec.alias_info.is_write]])


def _size(tensor: Tensor) -> int:
    """Bytes, those of an expanded tensor once."""
    return tensor.itemsize * math.prod(n for n, step in zip(tensor.shape, tensor.stride()) if step or n == 0)


def _moved_bytes(packet, read: list[Tensor], written: list[Tensor]) -> int:
    inputs, results = [_size(t) for t in read], [_size(t) for t in written]
    if packet in READ_IN_PART:
        return 2 * sum(results) + sum(inputs) - max(inputs)
    if packet in WRITTEN_IN_PART:
        others = sum(inputs) - max(inputs)
        return others + 2 * min(others, max(results))
    return sum(inputs) + sum(results)


def _is_meta(value: Any) -> bool:
    return isinstance(value, torch.device) and value.type == "meta"


def _may_be_known(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.numel() <= KNOWN_ELEMENTS


def _place() -> str:
    """file:line of the innermost frame outside torch and this package; in autograd's own backward, the node."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if frame.f_code.co_name == "_engine_run_backward":
            node = torch._C._current_autograd_node()
            return f"backward of {node.name() if node is not None else 'the loss'}"
        if "/torch/" not in name and not name.startswith(HERE) and "/contextlib" not in name:
            return f"{_short(name)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def place_of(error: BaseException) -> str:
    """file:line of an error: the innermost frame outside torch and this package, else the innermost."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and not f.filename.startswith(HERE)]
    frame = (own or frames)[-1]
    return f"{_short(frame.filename)}:{frame.lineno}"


def _short(filename: str) -> str:
    parts = Path(filename).parts
    for root in ("site-packages", "vlsi_fast", "vlsi_kernels"):
        if root in parts:
            at = len(parts) - 1 - parts[::-1].index(root)
            return "/".join(parts[at + (root == "site-packages") :])
    return parts[-1]


# ---- FLOPs ----


def _attention(query: Tensor, keys: int, products: int) -> int:
    """[.., T, D] against so many keys: so many products of T x keys x D."""
    return 2 * products * query.numel() * keys


def _varlen(query: Tensor, bounds: Tensor, longest: int, products: int) -> int:
    """[S, H, D], rows taken as equal: as many as there are bounds."""
    rows = max(1, bounds.shape[0] - 1)
    return _attention(query, min(longest, -(-query.shape[0] // rows)), products)


def _product(a: Tensor, b: Tensor) -> int:
    """[.., M, K] x [.., K, N]"""
    return 2 * a.numel() * b.shape[-1]


def _formulas() -> dict:
    """Operator -> a function of its arguments and `out_val`. All pairs of positions count, those that a causal mask
    hides too, as in the planner. Of attention's backward four products count: the fifth makes the scores again, the
    kernel's own recomputation."""
    torch_attn = torch.ops.torch_attn
    return dict(flop_registry) | {
        aten.mm: lambda a, b, *_, **__: _product(a, b),  # those of torch do not know all of their arguments
        aten.bmm: lambda a, b, *_, **__: _product(a, b),
        aten.addmm: lambda c, a, b, *_, **__: _product(a, b),
        aten.addmm_: lambda c, a, b, *_, **__: _product(a, b),
        aten._grouped_mm: lambda a, b, *_, **__: _product(a, b),  # each row of [S, K] meets one of [E, K, N]
        aten.baddbmm: lambda c, a, b, *_, **__: _product(a, b),
        aten.baddbmm_: lambda c, a, b, *_, **__: _product(a, b),
        aten._scaled_dot_product_flash_attention: lambda q, k, *_, **__: _attention(q, k.shape[-2], 2),
        aten._scaled_dot_product_efficient_attention: lambda q, k, *_, **__: _attention(q, k.shape[-2], 2),
        aten._scaled_dot_product_flash_attention_backward: lambda g, q, k, *_, **__: _attention(q, k.shape[-2], 4),
        aten._scaled_dot_product_efficient_attention_backward: lambda g, q, k, *_, **__: _attention(q, k.shape[-2], 4),
        torch_attn._varlen_attn: lambda q, k, v, cu_q, cu_k, max_q, *_, **__: _varlen(q, cu_q, max_q, 2),
        torch_attn._varlen_attn_backward: (
            lambda g, q, k, v, out, lse, cu_q, cu_k, max_q, *_, **__: _varlen(q, cu_q, max_q, 4)
        ),
    }


FLOPS = _formulas()
