"""File systems that fail for a while: a read is tried again, and what fails so is no damaged row."""

from __future__ import annotations

import errno
import functools
import time
from collections.abc import Callable
from typing import TypeVar

from vlsi_fast.errors import UserError
from vlsi_fast.terminal import say

TRANSIENT = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "EAGAIN", "ETIMEDOUT", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED", "ENOTCONN"),
        *("EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "EREMOTEIO", "ENOLINK"),
    )
    if hasattr(errno, name)
)
"""Errors of a network file system, a disk or a mount; not of a file that is not there or not permitted."""
DELAYS = (0.5, 2.0, 8.0, 20.0)
"""Seconds before each further try."""
Result = TypeVar("Result")


class StorageError(UserError, OSError):
    """Rows or images could not be read, however often it was tried."""

    exit_code = 1
    of_one_rank = True


def is_transient(error: BaseException) -> bool:
    """Whether an error is the file system's, and may pass."""
    return isinstance(error, OSError) and error.errno in TRANSIENT


def retried(call: Callable[..., Result]) -> Callable[..., Result]:
    """Decorator: a call that ends with a transient error is made again after each of `DELAYS`.

    Raises:
        StorageError: it never went through.
    """

    @functools.wraps(call)
    def again(*args, **kwargs) -> Result:
        for delay in (*DELAYS, None):
            try:
                return call(*args, **kwargs)
            except OSError as error:
                if not is_transient(error):
                    raise
                if delay is None:
                    raise StorageError(
                        f"reading failed {len(DELAYS) + 1} times within {sum(DELAYS):.0f} seconds: {error}; look at "
                        "the file system, then continue with --resume"
                    ) from error
                say(f"reading failed ({error}); trying again in {delay:g} seconds")
                time.sleep(delay)
        raise AssertionError("the last try returns or raises")

    return again
