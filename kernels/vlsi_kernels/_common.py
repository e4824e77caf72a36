"""What the operators share: input checks, options, reductions, chunk sizes, and full-precision matrix products.

Dimension letters used throughout the package:
    N tokens, V vocabulary (rows of a language head), D width; S / L student / teacher layers, Ds / Dl their widths.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ._triton import interpreted, triton
from ._waves import row_block

IMPLS = ("auto", "torch", "reference", "triton")
REDUCTIONS = ("mean", "sum", "none")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Bytes of scratch that one call may keep alive, by device type. CPU: tiles that stay near the L2 cache. On one busy Zen
# 5 core (1 MiB L2, products by oneDNN), 10 + 5 layers of 512 tokens and 30000 rows took 1.64 / 1.64 / 1.71 / 1.84 /
# 1.92 s of processor time at 4 / 8 / 16 / 32 / 64 MiB; all rows on Zen 4 by MKL 2.66 / 2.55 / 2.51 / 2.73 s at 8 / 16 /
# 32 / 64. More cores want larger tiles. CUDA: an estimate, not yet measured.
DEFAULT_WORKSPACE_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20}
# Fewer rows or columns than this starve the matrix products; a smaller workspace is therefore not honoured.
MIN_ROW_CHUNK = 256
MIN_VOCAB_CHUNK = 256
# Columns of a tile that one Triton program holds in registers: 32 float32 numbers per thread of 8 warps.
MAX_TILE_COLUMNS = 8192


class _Buffers(NamedTuple):
    """What the PyTorch path holds at once for a block of rows."""

    max_rows: int
    """Heads are read once a block; more rows than this amortize that no further."""
    tiles: int
    """Buffers of a tile's size."""
    products: int
    """Buffers of rows x width, in `accumulate`."""


# Logits and exponentials, and products with the values; on CUDA the exponentials' two bfloat16 halves as well.
CPU_BUFFERS, CUDA_BUFFERS = _Buffers(2048, 2, 1), _Buffers(16384, 4, 2)


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's place in a head whose rows are divided over the ranks of a group (tensor parallelism).

    Every rank passes the same hidden states and its own contiguous rows of the head; results are those of the whole
    head, equal on all ranks. Every rank of the group must make the same calls in the same order.
    """

    group: "torch.distributed.ProcessGroup | None"  # None: the default group
    start: int  # index, in the whole vocabulary, of this rank's first row


@dataclass(frozen=True)
class HeadOptions:
    """The non-tensor options of a vocabulary operator, after checks."""

    vocab_size: int  # rows of the heads that take part (of this rank's rows, where the head is sharded; may be 0 then)
    temperature: float  # logits are divided by it
    impl: str  # "torch", "triton" or "reference"
    workspace_bytes: int  # scratch that decides the row and vocabulary chunks
    shard: VocabularyShard | None = None


def resolve_impl(impl: str, device: torch.device, *tensors: Tensor | None) -> str:
    """Turns the user's `impl` into one that exists on `device` for `tensors`: "torch", "triton" or "reference".

    "auto" is "triton" on CUDA where Triton is installed and nothing is float64, else "torch".

    Raises:
        ValueError: an unknown name, or a device that Triton does not run on.
        ImportError: Triton is asked for and not installed.
        TypeError: float64 for Triton.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is unknown; choose one of {', '.join(map(repr, IMPLS))}")
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    if impl == "auto":
        return "triton" if triton is not None and device.type == "cuda" and not double else "torch"
    if impl == "triton":
        if triton is None:
            raise ImportError('impl="triton" needs Triton: pip install triton (Linux), or use impl="auto"')
        if device.type != "cuda" and not interpreted():
            raise ValueError(
                f'impl="triton" needs tensors on a CUDA device, got {device}; move them there, use impl="auto", or set '
                "TRITON_INTERPRET=1 before the import to debug kernels on the CPU"
            )
        if double:
            raise TypeError('impl="triton" takes float32, bfloat16 and float16; use impl="auto" or "torch" for float64')
    return impl


def check_tensor(name: str, tensor: Tensor, dims: tuple[str, ...]) -> None:
    """Checks that `tensor` is a floating-point tensor with one dimension for each letter of `dims`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dim() != len(dims):
        raise ValueError(
            f"{name} must have shape [{', '.join(dims)}], got {list(tensor.shape)}; flatten or add dimensions first"
        )
    if tensor.dtype not in FLOAT_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOAT_DTYPES)
        raise TypeError(f"{name} has dtype {tensor.dtype}; convert it to one of {names}")


def check_same_device(**tensors: Tensor | None) -> None:
    """Checks that all tensors given are on the device of the first."""
    present = {name: t for name, t in tensors.items() if t is not None}
    first_name, first = next(iter(present.items()))
    for name, tensor in present.items():
        if tensor.device != first.device:
            raise ValueError(
                f"{name} is on {tensor.device} but {first_name} is on {first.device}; "
                f"move them to one device, e.g. {name}.to({first_name}.device)"
            )


def check_width(left: str, left_size: int, right: str, right_size: int) -> None:
    """Checks that two widths that are contracted agree."""
    if left_size != right_size:
        raise ValueError(
            f"{left} has width {left_size} but {right} has width {right_size}; a hidden state and its head must agree "
            "in their last dimension"
        )


def check_no_grad(name: str, tensor: Tensor | None, reason: str) -> None:
    """Refuses a tensor that asks for a gradient which the operator does not compute."""
    if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, but {reason}; pass {name}.detach()")


def check_reduction(reduction: str) -> None:
    """Refuses a name that `reduce_tokens` does not know."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is unknown; choose one of {', '.join(map(repr, REDUCTIONS))}")


def check_labels(labels: Tensor, tokens: int) -> None:
    """Checks that `labels` are whole numbers, one for each of `tokens`."""
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels has dtype {labels.dtype}; convert it with labels.long()")
    if labels.shape != (tokens,):
        raise ValueError(
            f"labels must have shape [{tokens}], one per token, got {list(labels.shape)}; flatten both over batch and "
            "position"
        )


def reduce_tokens(loss: Tensor, kept: Tensor | None, reduction: str) -> Tensor:
    """Loss [N] to what the user asked for; kept [N] bool: the tokens that count, None: all. No token: the mean is 0."""
    if kept is not None:
        loss = loss.masked_fill(~kept, 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (max(1, loss.shape[0]) if kept is None else kept.sum().clamp(min=1))


def make_options(
    vocab_size: int | None,
    heads: tuple[Tensor, ...],
    temperature: float,
    impl: str,
    workspace_bytes: int | None,
    tensors: tuple[Tensor | None, ...],
    shard: VocabularyShard | None = None,
) -> HeadOptions:
    """Checks the options. The shortest of `heads` gives the default of `vocab_size`; `tensors`: all other inputs."""
    vocab_rows = min(head.shape[0] for head in heads)
    device = heads[0].device
    if vocab_rows < 1:
        raise ValueError("a head has 0 rows; it needs at least one (is the weight sharded and not gathered here?)")
    size = _rows_that_count(vocab_size, vocab_rows, shard)
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature={temperature} must be a finite number above 0; 1.0 leaves the logits alone")
    if workspace_bytes is None:
        workspace_bytes = DEFAULT_WORKSPACE_BYTES.get(device.type, DEFAULT_WORKSPACE_BYTES["cuda"])
    elif isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int) or workspace_bytes < 1:
        raise ValueError(f"workspace_bytes={workspace_bytes!r} must be a positive int (bytes) or None for the default")
    impl = resolve_impl(impl, device, *heads, *tensors)
    if shard is not None and impl == "reference":
        raise ValueError('impl="reference" takes a whole head; gather the shards first, or use impl="auto"')
    return HeadOptions(size, float(temperature), impl, workspace_bytes, shard)


def _rows_that_count(vocab_size: int | None, vocab_rows: int, shard: VocabularyShard | None) -> int:
    """How many of a head's first rows take part; `vocab_size` counts rows of the whole vocabulary."""
    if vocab_size is None:
        return vocab_rows
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise TypeError(f"vocab_size must be an int or None, got {vocab_size!r}")
    if shard is not None:
        if vocab_size < 1:
            raise ValueError(f"vocab_size={vocab_size} must be at least 1")
        return min(max(vocab_size - shard.start, 0), vocab_rows)
    if not 1 <= vocab_size <= vocab_rows:
        raise ValueError(f"vocab_size={vocab_size} is outside 1..{vocab_rows} (the rows of the shortest head given)")
    return vocab_size


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when any input is float64, else float32: half precision is never accumulated in."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def widen(t: Tensor) -> Tensor:
    """`t` in float32, or float64 where it is that."""
    return t if t.dtype == torch.float64 else t.float()


def plan_chunks(
    rows: int, options: HeadOptions, dtype: torch.dtype, device: torch.device, width: int = 0
) -> tuple[int, int]:
    """Row and vocabulary chunk such that the buffers fill the workspace; rows are split into equal blocks.

    `width`: columns of the sums that `accumulate` makes for each row (0: none), whose products are counted, too.
    """
    buffers = {"cpu": CPU_BUFFERS}.get(device.type, CUDA_BUFFERS)
    row_limit = min(rows, buffers.max_rows)
    beside = buffers.products * width * dtype.itemsize  # bytes of a row that are no tile's
    if beside:  # at most half of the workspace
        row_limit = min(row_limit, max(options.workspace_bytes // 2 // beside, MIN_ROW_CHUNK))
    tile = (options.workspace_bytes - beside * row_limit) // (dtype.itemsize * buffers.tiles)
    row_limit = min(row_limit, max(tile // MIN_VOCAB_CHUNK, MIN_ROW_CHUNK))
    row_chunk = max(1, math.ceil(rows / max(1, math.ceil(rows / max(1, row_limit)))))
    vocab_chunk = max(MIN_VOCAB_CHUNK, tile // row_chunk // 64 * 64)
    return row_chunk, min(vocab_chunk, options.vocab_size)


def plan_tiles(
    rows: int, width: int, tile_dtype: torch.dtype, options: HeadOptions, *, key: int = 0, sms: int | None = None
) -> tuple[int, int]:
    """Row and vocabulary chunk of the Triton path: rows first, since they decide whether a matrix product fills a GPU.

    Counted against the workspace: float32 logits and the tile made of them in `tile_dtype`, a float32 sum of `width`
    columns per row, and a converted chunk of the values. The vocabulary is cut into equal chunks, multiples of 128.
    Rows are cut into as few blocks as fit: equal ones, or, for a pass with hidden states of width `key` on a GPU of
    `sms` multiprocessors, blocks whose products fill whole waves (see `_waves.row_block`).
    """
    rows, vocab_chunk = max(1, rows), min(MAX_TILE_COLUMNS, max(1, options.vocab_size))
    per_row = 4 * width + (4 + tile_dtype.itemsize) * vocab_chunk
    limit = (options.workspace_bytes - vocab_chunk * width * tile_dtype.itemsize) // per_row
    if limit < min(rows, MIN_ROW_CHUNK):  # a small workspace: narrower tiles before fewer rows
        limit = min(rows, MIN_ROW_CHUNK)
        free = options.workspace_bytes - 4 * width * limit
        vocab_chunk = max(MIN_VOCAB_CHUNK, free // ((4 + tile_dtype.itemsize) * limit + width * tile_dtype.itemsize))
        vocab_chunk = min(vocab_chunk, MAX_TILE_COLUMNS, max(1, options.vocab_size))
    chunks = math.ceil(options.vocab_size / vocab_chunk)
    if chunks > 1:
        vocab_chunk = min(math.ceil(options.vocab_size / chunks / 128) * 128, MAX_TILE_COLUMNS)
    if sms is not None:
        return row_block(rows, limit, key, width, vocab_chunk, sms), vocab_chunk
    return math.ceil(rows / math.ceil(rows / limit)), vocab_chunk


def spans(total: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most `step` that cover range(total)."""
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def launch_on(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def exact_matmul(device: torch.device) -> Iterator[None]:
    """Runs matrix products as written: no autocast, and no TF32 or bfloat16 shortcut for float32 operands.

    A logit near 50 loses 1e-2 to TF32, far above the bar. The precision flags are process-wide in PyTorch; they are
    touched only where the user has lowered them, and put back on the way out.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    lowered = [(b, b.fp32_precision) for b in backends if b.fp32_precision not in ("ieee", "none")]
    for backend, _ in lowered:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device_type=device.type, enabled=False), launch_on(device):
            yield
    finally:
        for backend, precision in lowered:
            backend.fp32_precision = precision


def product(left: Tensor, right: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    """out = left @ right (+ out), products exact and sums in float32: the library's share of the Triton path.

    left [M, K], right [K, N] -> out [M, N] float32, written in place. Two half-precision operands of one dtype go to
    the tensor cores on CUDA; all else is multiplied in float32. To be called under `exact_matmul`.
    """
    if left.is_cuda and left.dtype == right.dtype and left.dtype in (torch.bfloat16, torch.float16):
        if accumulate:
            return torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    # beta=0: what `out` held before is not read, not even a NaN
    return torch.addmm(out, left.float(), right.float(), beta=int(accumulate), out=out)


ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""oneDNN's product of plain tensors, as torch's own compiler calls it."""
if ONEDNN is not None:  # so that who counts operations counts these
    register_flop_formula(ONEDNN)(lambda left, right, *_, **__: 2 * left[0] * left[1] * right[0])


@functools.cache
def _slow_mkl() -> bool:
    """Whether MKL multiplies float32 at half the speed of this processor, and oneDNN is there to do it better.

    MKL gives the AVX-512 of other makers' processors AVX2 code (an AMD EPYC: 105 GFLOP/s a core, oneDNN 240).
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    info = Path("/proc/cpuinfo")
    lines = info.read_text().partition("\n\n")[0].splitlines() if info.is_file() else []
    facts = {key.strip(): value for key, _, value in (line.partition(":") for line in lines)}
    maker, flags = facts.get("vendor_id", "").strip(), facts.get("flags", "").split()
    return maker not in ("", "GenuineIntel") and "avx512f" in flags and ONEDNN is not None


def by_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products in `dtype` go to oneDNN, which makes its result anew and writes into no buffer."""
    return device.type == "cpu" and dtype == torch.float32 and _slow_mkl()


def _onednn_product(left: Tensor, right: Tensor) -> Tensor:
    """left [M, K] @ right [N, K].T in float32, sums in float32 as well; not differentiable."""
    return ONEDNN(left, right, None, "none", [], "")


def logits_chunk(hidden: Tensor, weight: Tensor, scale: float, out: Tensor | None, dtype: torch.dtype) -> Tensor:
    """scale * hidden @ weight.T, never rounded below `dtype`.

    hidden [R, D], weight [C, D] -> [R, C] in `dtype`; `out` [R, C] is scratch that may be used for the result, and must
    be there unless `makes_logits`. bfloat16 on CUDA multiplies exactly on the tensor cores and accumulates in float32;
    all else is converted first.
    """
    if _tensor_core_pair(hidden, weight):
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return logits if scale == 1.0 else logits.mul_(scale)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if by_onednn(hidden.device, dtype):
        logits = _onednn_product(hidden, weight)
        return logits if scale == 1.0 else logits.mul_(scale)
    # beta=0: what `out` held before is not read, not even a NaN
    return torch.addmm(out, hidden, weight.t(), beta=0, alpha=scale, out=out)


def makes_logits(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether `logits_chunk` returns new memory, so that no buffer need be kept for it."""
    return _tensor_core_pair(hidden, weight) or by_onednn(hidden.device, dtype)


def accumulate(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total = left @ right + (0 if first else total), in total's dtype.

    total [R, D], left [R, C] in total's dtype, right [C, D]. bfloat16 `right` on CUDA: `left` is split in two bfloat16
    parts (16 bits in all), since one part alone costs 1.6e-2 of gradient near convergence.
    """
    if right.is_cuda and right.dtype == torch.bfloat16 and total.dtype == torch.float32:
        high = left.to(torch.bfloat16)
        product = torch.mm(high, right, out_dtype=torch.float32)
        product += torch.mm((left - high).to(torch.bfloat16), right, out_dtype=torch.float32)
        total.copy_(product) if first else total.add_(product)
    elif by_onednn(left.device, total.dtype) and left.is_contiguous():
        product = _onednn_product(left, right.to(total.dtype).t())
        total.copy_(product) if first else total.add_(product)
    else:
        torch.addmm(total, left, right.to(total.dtype), beta=0 if first else 1, out=total)


def _tensor_core_pair(left: Tensor, right: Tensor) -> bool:
    return left.is_cuda and left.dtype == right.dtype == torch.bfloat16
