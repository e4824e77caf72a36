"""A full disk, said in a sentence. Writers report it in many ways, some without the word "space"."""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from torch import Tensor, nn

from .checkpoints import checkpoint_bytes, drop_newer, last_checkpoint
from .errors import UserError
from .sizes import format_size

WORDS = ("No space left on device", "Disk quota exceeded", "os error 28", "os error 122")
TORCH_WRITER = "inline_container.cc"
"""In the message of torch's archive writer, which says "unexpected pos" of any failed write."""


class DiskFullError(UserError, RuntimeError):
    """A checkpoint or result did not fit on the disk. The message says what is free and what is needed."""

    exit_code = 1
    of_one_rank = True


@contextlib.contextmanager
def explained_full_disk(folder: Path, what: str, needed: Callable[[Path], int]) -> Iterator[None]:
    """Turn a full disk inside into DiskFullError, once the checkpoint that did not fit is deleted.

    Args:
        folder: the stage's.
        what: is being written inside, for the message.
        needed: its bytes, asked with `folder`.
    """
    try:
        yield
    except Exception as error:
        if not is_full_disk(error, folder):
            raise
        kept = last_checkpoint(folder)
        with contextlib.suppress(OSError):  # another rank may be writing there still; --resume deletes it, too
            drop_newer(folder, kept)
        free, size = shutil.disk_usage(folder).free, needed(folder)
        goes_on = f"continues from {Path(kept).name}, which is kept" if kept else "starts the stage over"
        raise DiskFullError(
            f"the disk of {folder} is full: {free:,} bytes are free ({format_size(free)}), {what} needs {size:,} "
            f"({format_size(size)}). Make room, then --resume {goes_on}; training.save_total_limit says how many "
            "checkpoints stay"
        ) from error


def checkpoint_size(module: nn.Module, folder: Path) -> int:
    """Bytes of a checkpoint: those of the last one, or float32 weights and two moments of what is trained."""
    kept = last_checkpoint(folder)
    return checkpoint_bytes(Path(kept)) if kept else 12 * sum(map(_elements, _trained(module)))


def result_size(module: nn.Module, folder: Path) -> int:
    """Bytes of what a stage leaves, about: its student, or what was trained."""
    student = getattr(module, "student", None)
    saved = student.parameters() if student is not None else _trained(module)
    return sum(_elements(p) * p.element_size() for p in saved)


def _trained(module: nn.Module) -> Iterable[Tensor]:
    return (p for p in module.parameters() if p.requires_grad)


def _elements(parameter: Tensor) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # under ZeRO-3 a rank holds a part


def is_full_disk(error: BaseException, folder: Path) -> bool:
    """Whether an error, or one that it came from, says that the disk of `folder` is full."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(word in str(error) for word in WORDS) or (TORCH_WRITER in str(error) and not _can_write(folder)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _can_write(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:
            stream.write(b"\0" * 2**20)
            stream.flush()
    except OSError as error:
        return error.errno not in (errno.ENOSPC, errno.EDQUOT)
    return True
