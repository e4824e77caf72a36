"""One run at a time writes to a stage's folder.

The lock is a record lock of the operating system (`fcntl.lockf`) on `<output_dir>/.<stage>.lock`, whose text says who
holds it. It ends with its process, however that ends, and unlike `flock` it does not live on in children, such as
workers that read data. NFS knows it across machines; where a file system has no locks a notice says so.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: nothing is locked there
    fcntl = None

from .lineage import LineageError
from .ranks.sharding import gathered_objects, rank

WAIT_SECONDS = 15.0
"""For a job that was just killed to end: its last rank may need as long (`ranks.watch.GRACE_SECONDS`)."""
_held: set[str] = set()  # by this process, which the system's lock does not keep from itself


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Inside, no other run writes to the stage's `folder`. Collective; rank 0 holds the lock.

    Raises:
        LineageError: another run does; it is named, on every rank.
    """
    path, stream, problem = folder.parent / f".{folder.name}.lock", None, None
    if rank() == 0:
        try:
            stream = _lock(path)
        except LineageError as error:
            problem = str(error)
    problem = gathered_objects(problem)[0]
    if problem:
        raise LineageError(problem)
    try:
        yield
    finally:
        if stream is not None:
            _held.discard(str(path.resolve()))
            stream.close()


def _lock(path: Path):
    """The open file whose lock this process now has; None where there are no locks."""
    if fcntl is None:
        return None
    own = str(path.resolve())
    if own in _held:
        raise LineageError(_taken(path, f"host {socket.gethostname()}, pid {os.getpid()}, this very process"))
    until, said = time.monotonic() + WAIT_SECONDS, False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+")
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return None  # nothing else can be written there either: a finished stage needs nothing, others say so
    while True:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                stream.close()
                print(f"vlsi-fast: {path} cannot be locked ({error.strerror}): start no second run there", flush=True)
                return None
        stream.seek(0)
        holder = stream.read().strip() or "unknown"
        if time.monotonic() > until:
            stream.close()
            raise LineageError(_taken(path, holder))
        if not said:
            print(f"vlsi-fast: {path.parent} is in use ({holder}); waiting {WAIT_SECONDS:.0f} s for it", flush=True)
            said = True
        time.sleep(0.2)
    stream.truncate(0)
    stream.write(f"host {socket.gethostname()}, pid {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    stream.flush()
    _held.add(own)
    return stream


def _taken(path: Path, holder: str) -> str:
    stage = path.name.removeprefix(".").removesuffix(".lock")
    return (
        f"another run is writing to {path.parent / stage} ({holder}): wait until it ends, end it, or choose another "
        "output_dir (--output_dir)"
    )
