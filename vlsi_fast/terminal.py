"""What a command says, and what it keeps libraries from saying. Imports nothing heavy."""

from __future__ import annotations

import logging
import os
import sys
import warnings

_hushed = False


def hush() -> None:
    """Keep libraries quiet but for errors, here and in child processes: nothing that a user can act on is lost.

    What the user has asked for by Python's own options (`-W`, `PYTHONWARNINGS`) or by transformers' stays.
    """
    global _hushed
    _hushed = True
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning)
        os.environ["PYTHONWARNINGS"] = "ignore::FutureWarning"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("ACCELERATE_LOG_LEVEL", "error")
    for name in ("accelerate", "liger_kernel"):  # the second tells which of its backends are not installed
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("DeepSpeed").addFilter(_is_error)  # it sets its own level when it is imported


def is_hushed() -> bool:
    """Whether `hush` was called in this process."""
    return _hushed


def hush_bars() -> None:
    """Where `hush` was called: no bars for loading and writing weights; those of downloads stay.

    Imports transformers.
    """
    if not _hushed:
        return
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    wanted = not are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()  # downloads' too
    if wanted:
        enable_progress_bars()


def say(text: str) -> None:
    """A line of ours on stderr; on a line of its own where a progress bar is shown."""
    line = f"vlsi-fast: {text}"
    bars = sys.modules.get("tqdm")
    if bars is None:
        print(line, file=sys.stderr, flush=True)
    else:
        bars.tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
