"""Ranks of one machine for tests: forked from one process that has imported everything, since imports take longer than
tiny models' steps.

`python forked_ranks.py` reads jobs from stdin, a JSON object a line, and answers each by a line on stdout.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

MOST_FILES, LONGEST_DELAY = 8, 0.02
"""A kill comes when a new checkpoint has at most so many files (a tiny one of two ranks has about 20), and seconds."""


class ForkedRanks:
    """Client of the process: `run` runs a stage on some ranks, to its end or to a kill."""

    def __init__(self, environment: dict[str, str], folder: Path):
        with (folder / "ranks.err").open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        self.said = folder / "ranks.said"

    def run(
        self, config: Path, stage: str, ranks: int = 2, kill: tuple[str, int] | None = None, ask: str | None = None
    ) -> dict:
        """Run a stage, or all, with `resume`. With `kill`, a stage and a seed: kill -9 all ranks when the stage has
        written a random number of a checkpoint's files, and a random moment later.

        With `ask`, a stage: SIGTERM to all ranks once it has made a step.

        Returns:
            codes: how each rank ended, as `os.waitpid` gives it; said: what they printed; hit: whether a checkpoint was
            being written when they were killed, None where they were not.
        """
        job = {"config": str(config), "stage": stage, "ranks": ranks, "kill": kill, "ask": ask}
        job["said"] = str(self.said)
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline()) | {"said": self.said.read_text()}

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


def _one_rank(job: dict, rank: int, port: int) -> None:
    """A forked rank: never returns."""
    code = 1
    try:
        said = os.open(job["said"], os.O_WRONLY | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(job["ranks"]),
            "LOCAL_WORLD_SIZE": str(job["ranks"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        from vlsi_fast.cli import train_main

        code = train_main(["--stage", job["stage"], "--config", job["config"], "--resume"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _do(job: dict) -> dict:
    Path(job["said"]).write_text("")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stage, seed = job["kill"] or ("", 0)
    output = Path(json.loads(Path(job["config"]).read_text())["output_dir"])
    folder, steps = output / stage, output / (job["ask"] or "") / "metrics.jsonl"
    left = set(folder.glob("checkpoint-*")) if stage else set()  # perhaps half of one, which the run deletes
    chance = random.Random(seed)
    enough, delay = chance.randrange(MOST_FILES + 1), chance.uniform(0.0, LONGEST_DELAY)
    pids = [os.fork() or _one_rank(job, rank, port) for rank in range(job["ranks"])]
    codes, hit, terminated = {}, None, False
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            ended, code = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = code
                if code and not terminated:  # as launchers do
                    time.sleep(1.0)
                    _end(set(pids) - codes.keys(), signal.SIGTERM)
                    terminated = True
        if job["ask"] and steps.is_file() and steps.read_bytes().count(b"\n") >= 1:
            job["ask"] = None
            _end(set(pids) - codes.keys(), signal.SIGTERM)
        now = set(folder.glob("checkpoint-*")) if stage else set()
        left &= now
        new = now - left
        if new and hit is None and sum(path.is_file() for one in new for path in one.rglob("*")) >= enough:
            time.sleep(delay)
            _end(set(pids) - codes.keys(), signal.SIGKILL)
            hit = not all((checkpoint / "manifest.json").exists() for checkpoint in new)
        time.sleep(0.002)
    return {"codes": [codes[pid] for pid in pids], "hit": hit}


def _end(pids: set[int], how: int) -> None:
    for pid in pids:
        os.kill(pid, how)  # none was waited for, so none is another process by now


if __name__ == "__main__":
    import deepspeed  # noqa: F401
    import torch  # noqa: F401

    import vlsi_fast.stages  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(_do(json.loads(line))), flush=True)
