"""Jobs beside each other for tests, forked from a process that has imported everything, since imports take longer than
tiny models' steps."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELOADED = ["following_jobs", "vlsi_fast.cli", "vlsi_fast.stages.interact", "vlsi_fast.teacher_cache.ahead"]
PRELOADED += ["peft", "transformers.models.qwen2_vl.modeling_qwen2_vl", "safetensors.torch"]


RUNNING: list[Job] = []


def kill_all() -> None:
    """What a test that failed has left."""
    while RUNNING:
        RUNNING.pop().kill()


class Job:
    """`words` of `vlsi-fast`, or of train.py, in a process of its own; what it prints goes to `said`."""

    def __init__(self, kind: str, words: list[str], said: Path):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.said = said
        self.process = context.Process(target=_run, args=(kind, words, str(said)))
        self.process.start()
        RUNNING.append(self)

    def end(self, seconds: float = 200) -> int:
        """Wait for it. Returns the exit code."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s: {self.said.read_text()[-3000:]}")
        return self.process.exitcode

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.join()


def _run(kind: str, words: list[str], said: str) -> None:
    stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    import torch

    from vlsi_fast import cli

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of data workers: others import everything again
    sys.exit(cli.train_main(words) if kind == "train" else cli.main(words))


def until(found: Callable[[], Any], job: Job | None = None, seconds: float = 150) -> Any:
    """What `found` returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        running = job is None or job.process.is_alive()
        if not running or time.monotonic() > deadline:
            raise AssertionError(f"in vain; the job said: {job.said.read_text()[-3000:] if job else None}")
        time.sleep(0.02)
    return value
