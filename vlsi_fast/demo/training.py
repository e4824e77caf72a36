"""One launch of `vlsi_fast/train.py` under DeepSpeed, on GPUs or on CPU ranks; its words go to a log."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import RunConfig

LAST_LINES = 25
"""Of the log, shown where training stopped with an error."""


def rank_count(asked: int) -> int:
    """Ranks of a launch: on GPUs at most their number."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return min(asked, gpus) if gpus else asked


def command(ranks: int, config: Path, changes: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """The launch of all of a config's stages, and its environment.

    Args:
        ranks: from `rank_count`.
        config: YAML file.
        changes: overrides.

    Raises:
        SystemExit: DeepSpeed is missing.
    """
    import torch

    launcher = Path(sys.executable).with_name("deepspeed")
    if not launcher.is_file():
        raise SystemExit("vlsi-fast demo: no deepspeed beside this Python; run `make demo`, or pip install deepspeed")
    environment = os.environ | {"PYTHONWARNINGS": "ignore::FutureWarning,ignore::UserWarning"}
    gpus = torch.cuda.is_available()
    if not gpus:
        environment["DS_ACCELERATOR"] = "cpu"
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    script = Path(__file__).resolve().parent.parent / "train.py"
    words = [str(launcher), "--num_gpus" if gpus else "--num_accelerators", str(ranks)]
    words += ["--master_port", str(_free_port()), str(script)]
    words += ["--stage", "all", "--config", str(config), *(f"--{name}={value}" for name, value in changes.items())]
    return words, environment


def _free_port() -> int:
    """For the ranks to meet; DeepSpeed's own choice is always the same, and may be another run's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train(words: list[str], environment: dict[str, str], config: RunConfig, log: Path, at: Callable) -> None:
    """Run a launch to its end.

    Args:
        words: from `command`.
        environment: from `command`.
        config: what the launch runs.
        log: file for everything that it prints.
        at: called with the share of the optimizer steps that are done.

    Raises:
        SystemExit: it stopped with an error; the end of the log is printed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    steps = sum(config.stage_training(stage).max_steps for stage in config.stages)
    with open(log, "w") as file:
        process = subprocess.Popen(words, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                at(min(1.0, _steps_done(config) / steps))
                time.sleep(0.5)
        finally:
            if process.poll() is None:  # interrupted
                process.terminate()
                process.wait()
    if process.returncode:
        lines = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        print("\n".join(lines), file=sys.stderr)
        raise SystemExit(f"vlsi-fast demo: training stopped with the error above; all of its words: {log}")


def _steps_done(config: RunConfig) -> int:
    files = [config.stage_dir(stage) / "metrics.jsonl" for stage in config.stages]
    return sum(file.read_bytes().count(b"\n") for file in files if file.is_file())


def shown(words: list[str]) -> str:
    """A launch as one could type it."""
    return "$ " + shlex.join(["deepspeed", *words[1:]])
