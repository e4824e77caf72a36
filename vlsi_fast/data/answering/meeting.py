"""Ranks that work apart and meet only at start and end."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ...ranks import sharding

WAIT = timedelta(days=30)
"""Ranks finish at different times; one that dies is noticed by the launcher, which ends the others."""


class Meeting:
    """The ranks that a launcher started, over gloo; one where there was none. A process group that is there is used.

    Attributes:
        rank: of this process.
        ranks: how many there are.
    """

    def __enter__(self) -> Meeting:
        self.started = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
        if self.started:
            dist.init_process_group("gloo", timeout=WAIT)
        self.rank, self.ranks = sharding.rank(), sharding.world_size()
        self.group = dist.new_group(backend="gloo", timeout=WAIT) if self.ranks > 1 else None
        return self

    def __exit__(self, *error) -> None:
        if self.started:
            dist.destroy_process_group()

    def wait(self) -> None:
        """Until all ranks have come here."""
        if self.ranks > 1:
            dist.barrier(self.group)

    def first(self, work: Callable[[], Any]) -> Any:
        """What `work` returns on rank 0, for all ranks; what it raises there, all raise."""
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told[0] = work()
            except Exception as error:
                told[1] = error
        if self.ranks > 1:
            dist.broadcast_object_list(told, src=0, group=self.group)
        if told[1] is not None:
            raise told[1]
        return told[0]
