"""How many rows to multiply at once, so that the tiles of matrix products fill whole waves of a GPU.

A library product of [M, K] x [K, N] is cut into tiles of 128 x 256 results, one to a multiprocessor (SM) at a time.
With S of them the tiles run in ceil(tiles / S) waves, each as long as K, and a last wave of few tiles costs as much as
a full one. Per row block of R rows and chunk of C vocabulary rows the streaming pass has two products:

    logits  [R, Dk] x [Dk, C]    waves(R, C) Dk        expectation  [R, C] x [C, Dv]    waves(R, Dv) C

Their sum over all row blocks, in units of one tile and one column of K, is the measure here; full tiles without any
last wave would be `rows / 128 C / 256 (Dk + Dv) / S`, and efficiency is that over the measure. An example of the
expectation alone, Dv = 1536 (6 tiles wide), on 132 SMs (H100, H200): 7168 rows are 336 tiles, 2.55 waves that cost 3,
85%; 8448 rows are 396 tiles, 3.00 waves, 100%. So of 28672 rows, with room for 9254 at once, four blocks of 7168 cost
12 waves, while three of 7808 and one of 5248 cost 11. Tile sizes are assumed, as libraries often have them for
half-precision products on sm_80 and later; nothing but the row blocks depends on them. Not measured on a GPU yet.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch

TILE_ROWS, TILE_COLUMNS = 128, 256
MULTIPROCESSORS = 132
"""Of H100 and H200 (SXM); A100 has 108, B200 148. Taken where no GPU is there to be asked."""


class Waves(NamedTuple):
    """What the products of a pass over one vocabulary chunk cost, all row blocks together."""

    logits: int
    """Waves of the first product."""
    expectation: int
    """Waves of the second; 0 where there is none."""
    efficiency: float
    """Of both, as time: 1 where every wave is full of whole tiles."""


def multiprocessors(device: torch.device) -> int:
    """SMs of a GPU; `MULTIPROCESSORS` where the device is none (Triton's interpreter)."""
    if device.type != "cuda":
        return MULTIPROCESSORS
    return getattr(torch.cuda.get_device_properties(device), "multi_processor_count", MULTIPROCESSORS)


def waves_of(rows: int, columns: int, sms: int) -> int:
    """Waves of a product with [rows, columns] results."""
    return math.ceil(math.ceil(rows / TILE_ROWS) * math.ceil(columns / TILE_COLUMNS) / sms)


def pass_waves(rows: int, block: int, key: int, width: int, columns: int, sms: int) -> Waves:
    """Of `rows` rows in blocks of `block`; key Dk, width Dv (0: one product), columns C."""
    blocks = [(rows // block, block), (1, rows % block)]
    logits, expectation = (
        sum(count * waves_of(size, n, sms) for count, size in blocks if size) for n in (columns, width)
    )
    ideal = rows / TILE_ROWS * columns / TILE_COLUMNS * (key + width) / sms
    return Waves(logits, expectation, ideal / max(logits * key + expectation * columns, 1))


@lru_cache(maxsize=256)
def row_block(rows: int, limit: int, key: int, width: int, columns: int, sms: int) -> int:
    """Rows of a block: as few blocks as `limit` allows, since each reads both heads, and of those the cheapest size.

    Candidates are equal blocks, every whole number of row tiles up to `limit`, and `limit`: among others there is no
    cheaper one, since with the same tiles a larger block leaves less to the last. Of equally cheap ones the first,
    which is the equal blocks where they are among them. So this is never dearer than equal blocks.

    Args:
        rows: of the pass, at least 1.
        limit: rows that memory takes at once.
        key, width: Dk and Dv; 0 for Dv: no second product.
        columns: of a vocabulary chunk.
        sms: multiprocessors of the GPU.
    """
    equal = math.ceil(rows / math.ceil(rows / limit))
    most = min(limit, rows)
    tiles = range(math.ceil(equal / TILE_ROWS) * TILE_ROWS, most + 1, TILE_ROWS)
    return max((equal, *tiles, most), key=lambda block: pass_waves(rows, block, key, width, columns, sms).efficiency)
