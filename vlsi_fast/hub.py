"""Look-ups on the Hugging Face Hub that fail at once where there is no network.

The library tries five times with growing pauses. Here one connection is tried, for a second, before the first look-up
of a process; where it fails, only what the machine has already is read.
"""

from __future__ import annotations

import functools
import os
import socket
import threading
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SECONDS = 1.0
"""To find the Hub's address, and then to be answered."""


def options(path: str | os.PathLike) -> dict[str, Any]:
    """Arguments for `from_pretrained` and `snapshot_download`: the cache alone where the Hub cannot be asked."""
    return {} if Path(path).is_dir() or reachable() else {"local_files_only": True}


def explain(path: str, error: Exception) -> str:
    """Why `path` could not be read from the Hub, in a sentence."""
    if reachable():
        return f"{path} cannot be read from the Hub ({error})"
    return (
        f"{path} is not on this machine, and {_host()} does not answer: fetch it where there is a network "
        f"(hf download {path}), or name a folder"
    )


@functools.cache
def reachable() -> bool:
    """Whether the Hub, or the proxy in front of it, takes a connection; tried once a process."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    url = urlsplit(constants.ENDPOINT)
    proxy = urllib.request.getproxies().get(url.scheme)
    if proxy and not urllib.request.proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    found = threading.Event()

    def connect() -> None:
        try:
            port = url.port or (80 if url.scheme == "http" else 443)
            socket.create_connection((url.hostname, port), SECONDS).close()
            found.set()
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=connect, daemon=True)  # a name server that is silent cannot be timed out otherwise
    thread.start()
    thread.join(SECONDS)
    return found.is_set()


def _host() -> str:
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).hostname or constants.ENDPOINT
