"""What a row is, as the cache knows it: its words and its images, never its place in a batch, on a rank or in an order.

The key is a digest of the conversation (roles, words, where images stand) and of the image files' own bytes. Together
with what the cache's manifest says of how rows are encoded, it stands for token ids, answer positions and pixels, and
it is the same on every machine and before anything is decoded. The answer tokens have a digest of their own, which
tells whether student and teacher read the same answer.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..data.dataset import AnswerMismatchError, VlsiDataset
from ..data.images import ImageRef, image_bytes
from ..data.messages import Sample
from ..data.skipped import UnusableRow

KEY_BYTES = 16
ANSWER_BYTES = 8
IGNORED = -100


@lru_cache(maxsize=64)
def _image_digest(ref: ImageRef) -> bytes:
    return hashlib.blake2b(image_bytes(ref), digest_size=KEY_BYTES).digest()


def row_key(sample: Sample) -> bytes:
    """Digest of a row's conversation and images, `KEY_BYTES` long.

    Raises:
        UnusableRow: an image file cannot be read.
    """
    told = [
        [m["role"], [part.get("text") if part["type"] == "text" else None for part in m["content"]]]
        for m in sample.messages
    ]
    digest = hashlib.blake2b(json.dumps(told, ensure_ascii=True).encode(), digest_size=KEY_BYTES)
    for ref in sample.images:
        digest.update(_image_digest(ref))
    return digest.digest()


def answers_digest(labels: Tensor) -> bytes:
    """Digest of the answer tokens in `labels` [1, T] that are predicted, in order, `ANSWER_BYTES` long."""
    following = labels[:, 1:]
    ids = following[following != IGNORED].to(torch.int64).contiguous()
    return hashlib.blake2b(ids.numpy().tobytes(), digest_size=ANSWER_BYTES).digest()


def kept_of(whole: Tensor, labels: Tensor) -> Tensor:
    """Numbers of the answer tokens in `labels` [1, T] among those in `whole` [1, T], [N] int32."""
    return (labels[whole != IGNORED] != IGNORED).nonzero()[:, 0].int()


class KeyedDataset(VlsiDataset):
    """The teacher's rows with `key`, and `refused`: key, cause and detail of each row passed over on the way."""

    def __getitem__(self, index: int) -> dict:
        self._refused: list[tuple[bytes, str, str]] = []
        row = super().__getitem__(index)
        return row | {"refused": self._refused}

    def _encode(self, sample: Sample) -> dict[str, Any]:
        key = row_key(sample)
        try:
            return super()._encode(sample) | {"key": key}
        except UnusableRow as error:
            self._refused.append((key, error.cause, error.detail))
            raise
        except AnswerMismatchError as error:  # where the student's side of the row is looked at as well
            self._refused.append((key, "answer_mismatch", str(error)))
            raise
