"""Load a checkpoint's files without running what they say.

DeepSpeed, and transformers for its optimizer, store Python pickles, which may call anything when they are loaded as
DeepSpeed loads them. Inside `data_only` torch builds tensors and plain values alone, and of other classes only those
that DeepSpeed stores.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator

import torch

from .lineage import LineageError

STORED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler:LossScaler",
    "deepspeed.runtime.fp16.loss_scaler:DynamicLossScaler",
    "deepspeed.runtime.zero.config:ZeroStageEnum",
    "deepspeed.utils.tensor_fragment:fragment_address",
)
"""Plain holders of numbers in DeepSpeed's own files; making one calls nothing else."""


class UnsafeFileError(LineageError):
    """A checkpoint's file holds something other than data, or cannot be read. The message names it."""

    of_one_rank = True


@contextlib.contextmanager
def data_only() -> Iterator[None]:
    """Inside, `torch.load` loads with `weights_only`, whatever its caller says.

    Raises:
        UnsafeFileError: inside, of a file that holds anything else, or that is damaged.
    """
    load = torch.load

    def load_data(file, *args, **kwargs):
        kwargs["weights_only"] = True
        try:
            return load(file, *args, **kwargs)
        except (OSError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of bytes that anyone may have written, anything may come
            name = os.fspath(file) if isinstance(file, str | os.PathLike) else getattr(file, "name", "a file")
            raise UnsafeFileError(
                f"{name} is refused: it holds something that is no data, or is damaged ({_reason(error)}). It was not "
                "run. Restore the checkpoint from a copy that you trust, or delete its folder: --resume then takes "
                "the checkpoint before"
            ) from error

    torch.load = load_data
    try:
        with torch.serialization.safe_globals(_stored_classes()):
            yield
    finally:
        torch.load = load


def _stored_classes() -> list[type]:
    try:
        importlib.import_module("deepspeed")
    except ImportError:
        return []
    return [getattr(importlib.import_module(module), name) for module, name in (s.split(":") for s in STORED_CLASSES)]


def _reason(error: Exception) -> str:
    """The part of torch's message that names what it found, not its advice to load it all the same."""
    advice = ("torch.load", "torch.serialization", "weights_only")
    lines = [line.strip() for line in str(error).splitlines() if not any(word in line for word in advice)]
    return " ".join(line for line in lines if line)[:300].rstrip(".") or type(error).__name__
