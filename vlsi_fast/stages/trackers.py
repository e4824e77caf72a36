"""Trackers: one run of theirs a stage, named and grouped, and closed however the stage ends.

transformers opens a tracker's run when training begins. Its callbacks close it only where training ends well, that of
wandb never: in one process the next stage would write into it. That of mlflow, on the other hand, closes whatever run
is open when Python deletes it, which may be the next stage's.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback
from transformers.integrations import MLflowCallback, TensorBoardCallback

from ..terminal import say

LOGGING_DIR, GROUP = "TENSORBOARD_LOGGING_DIR", "WANDB_RUN_GROUP"
"""Environment variables by which alone trackers are told."""


class Tracker(NamedTuple):
    """How a tracker's module tells of the run that is open in this process, and closes it."""

    is_open: Callable[[Any], bool]
    close: Callable[[Any, bool], None]
    """Called with the module, and whether the stage failed."""


TRACKERS = {
    "wandb": Tracker(lambda m: m.run is not None, lambda m, failed: m.finish(exit_code=int(failed))),
    "mlflow": Tracker(
        lambda m: m.active_run() is not None, lambda m, failed: m.end_run("FAILED" if failed else "FINISHED")
    ),
    "trackio": Tracker(lambda m: m.context_vars.current_run.get() is not None, lambda m, failed: m.finish()),
    "swanlab": Tracker(lambda m: m.get_run() is not None, lambda m, failed: m.finish()),
}
"""By their own public functions, since transformers' callbacks differ from version to version."""


@contextlib.contextmanager
def tracked(callbacks: list[TrainerCallback], group: str) -> Iterator[None]:
    """Inside, trackers' runs are opened in `group`; those opened inside are closed at the end.

    A run that is open before, such as a notebook's own, stays open, and gets the stage's numbers.

    Args:
        callbacks: the Trainer's.
        group: of the runs of all stages, where the tracker knows groups (wandb).
    """
    before, failed = _open(), True
    try:
        with _environment(GROUP, os.environ.get(GROUP, group)):
            yield
        failed = False
    finally:
        for name in _open() - before:
            try:
                TRACKERS[name].close(sys.modules[name], failed)
            except Exception as error:  # a tracker must neither end a run that went well nor hide why one ended
                say(f"{name} could not close its run: {type(error).__name__}: {error}")
        for callback in callbacks:
            if isinstance(callback, TensorBoardCallback) and failed:
                callback.on_train_end(None, None, None)
            if isinstance(callback, MLflowCallback):
                callback._auto_end_run = False


def tensorboard_in(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Tensorboard's callback, made inside, writes into `folder`."""
    return _environment(LOGGING_DIR, str(folder))


def _open() -> set[str]:
    """Trackers with a run that is open in this process."""
    found = set()
    for name, tracker in TRACKERS.items():
        with contextlib.suppress(AttributeError):  # a version of another make, or a module that only bears the name
            if name in sys.modules and tracker.is_open(sys.modules[name]):
                found.add(name)
    return found


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
