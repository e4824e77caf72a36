"""Where the frozen teacher is held (`teacher.mode`, see vlsi_fast/teacher.py), as bytes of a GPU and of its PCIe.

    zero3       in the module tree: sharded, gathered and counted as the student's frozen weights are
    replicated  whole on the GPU; nothing is gathered
    offload     under DeepSpeed an engine of its own with shards in CPU memory: gathered as in zero3, each rank's
                shard over PCIe first. Without: accelerate's hooks bring one module's weights over PCIe while it runs.
                The final norm is on the GPU, without DeepSpeed the head too, where the losses read it: both are read
                outside of a forward
    int8, nf4   whole on the GPU; the decoder's linear layers quantised by bitsandbytes: int8 has one byte a weight
                and a float32 scale an output; nf4 half a byte, a byte of scale for 64 weights and, for 256 of those,
                4 more. Embedding, head, norms, biases and vision tower stay as they are

While a quantised layer runs, nf4 holds its weight converted to 16 bits; int8 its input in float16 and in int8, and its
output in int32 (bitsandbytes' MatMul4Bit and MatMul8bitLt). Neither has been compared with a GPU.
"""

from __future__ import annotations

import math

from .shapes import ModelShape


def teacher_bytes(shape: ModelShape, mode: str, element: int, zero3: bool) -> int:
    """Bytes on each GPU of a teacher that is held outside the module tree (every mode but zero3).

    Args:
        shape: of the teacher, cut to the decoder layers that are loaded.
        mode: replicated, offload, int8 or nf4.
        element: bytes of an unquantised weight.
        zero3: whether the run is ZeRO-3.
    """
    if mode == "offload":
        return element * (shape.width + (0 if zero3 or not shape.has_head else shape.head))
    whole = sum(shape.parameters)
    if mode == "replicated":
        return element * whole
    sizes = [pair for layer in shape.linears for pair in layer]
    quantised = {"int8": _int8, "nf4": _nf4}[mode]
    return element * (whole - sum(i * o for i, o in sizes)) + sum(quantised(i, o) for i, o in sizes)


def _int8(inputs: int, outputs: int) -> int:
    return inputs * outputs + 4 * outputs


def _nf4(inputs: int, outputs: int) -> int:
    blocks = math.ceil(inputs * outputs / 64)
    tables = 4 * (16 + 256 + 1)  # of the values, of the scales, and the scales' mean
    return math.ceil(inputs * outputs / 2) + blocks + 4 * math.ceil(blocks / 256) + tables


def running_layer(shape: ModelShape, mode: str | None, positions: int) -> int:
    """Bytes beside the activations while one quantised layer runs; 0 in the other modes."""
    if mode == "nf4":
        return 2 * max(i * o for i, o in shape.linears[0])
    if mode == "int8":
        return positions * max(3 * i + 4 * o for i, o in shape.linears[0])
    return 0


def pcie_bytes(shape: ModelShape, mode: str | None, element: int, ranks: int, zero3: bool, persistent: float) -> float:
    """Bytes that each GPU takes over PCIe for one micro-batch: offload alone.

    Args:
        persistent: elements of a tensor up to which ZeRO-3 keeps it whole on the GPU.
    """
    if mode != "offload":
        return 0.0
    if zero3:
        return element * sum(n for n in shape.parameters if n > persistent) / ranks
    own_head = shape.head if shape.has_head and not shape.tied else 0
    return float(element * (sum(shape.parameters) - shape.width - own_head))
