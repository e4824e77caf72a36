"""hpZ, of ZeRO++ (arXiv:2306.10209, section 3.2): a second shard of each parameter among the ranks of one machine.

With `zero_hpz_partition_size` in the DeepSpeed config, every parameter is sharded over all ranks, and once more over
the ranks of each machine. Gathers read the second shard, so they stay inside the machine. Of a trained parameter it is
made anew after each optimizer step, by one gather over all ranks. A frozen one keeps it: a teacher under ZeRO-3 crosses
the network when it is loaded, and then never again. It costs 2 bytes a parameter over the ranks of a machine.

This is also the one place that works around DeepSpeed. Seen in 0.19.8, where `zero.Init` makes the process groups of
the second shards each time that it is entered, and fails the second time ("ZeRO parameter intra parallel group is
already initialized"): with a student and a teacher, at the teacher. Groups that are handed over are taken, and
`deepspeed.utils.groups._get_zero_param_intra_parallel_group`, a private function, tells those that are there. And
`zero.GatheredParameters` does not look at second shards: see `gather_from_secondary`. `tests/test_hpz.py` fails where
DeepSpeed no longer needs either.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..config_files import ConfigError

KEY = "zero_hpz_partition_size"


def ranks_per_node() -> int:
    """Ranks that the launcher (torchrun, deepspeed) started on this machine."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"):
        if os.environ.get(name):
            return int(os.environ[name])
    return 1


def resolved(deepspeed: dict[str, Any], ranks: int, node: int) -> dict[str, Any]:
    """A DeepSpeed config with `zero_hpz_partition_size` as a number; without it where it would change nothing.

    `auto`: the ranks of a machine, where there are several machines.

    Args:
        deepspeed: the config; left as it is.
        ranks: of the run.
        node: ranks of each machine.

    Raises:
        ConfigError: it is no such number, or not the ranks of a machine.
    """
    zero = deepspeed.get("zero_optimization")
    if not isinstance(zero, dict) or KEY not in zero:
        return deepspeed
    size = zero[KEY]
    if size == "auto":
        size = node
    where = f"training.deepspeed: zero_optimization.{KEY}"
    if type(size) is not int or size < 1:
        raise ConfigError(f"{where} is {size!r}; use auto (the GPUs of a machine), or 1 to switch it off")
    deepspeed = copy.deepcopy(deepspeed)
    zero = deepspeed["zero_optimization"]
    if size == 1 or ranks == node or zero.get("stage") != 3:  # on one machine it would double the first shards
        del zero[KEY]
        return deepspeed
    if size != node or ranks % node:
        raise ConfigError(
            f"{where} is {size}, with {ranks} ranks, {node} of them on this machine: second shards are gathered inside "
            "a machine, so it must be the number of its GPUs, and divide the ranks; use auto with as many GPUs on "
            "every machine, or 1 to switch it off"
        )
    zero[KEY] = size
    return deepspeed


def require_same_nodes(sizes: Iterable[int]) -> None:
    """Raise ConfigError unless all ranks (`sizes`: what each found by `ranks_per_node`) have equal machines."""
    found = list(sizes)
    if len(set(found)) > 1:
        raise ConfigError(
            f"training.deepspeed: zero_optimization.{KEY} needs as many GPUs on every machine; here ranks count "
            f"{sorted(set(found))} on theirs. Start the same number everywhere, or set it to 1"
        )


def partitioned_init(config: dict[str, Any]):
    """`deepspeed.zero.Init` that may be entered again (see the module's head)."""
    import deepspeed
    from deepspeed.utils import groups

    with_second = (config.get("zero_optimization") or {}).get(KEY, 1) > 1
    there = groups._get_zero_param_intra_parallel_group() if with_second else None
    return deepspeed.zero.Init(config_dict_or_path=config, zero_param_parallel_group=there)


def gather_from_secondary(parameters: Iterable[Tensor]) -> None:
    """Gather frozen parameters that have second shards from those, inside the machine.

    `zero.GatheredParameters`, entered afterwards, finds them there, and partitions them when it is left. Collective.
    """
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    near = {
        p.ds_id: p
        for p in parameters
        if getattr(p, "ds_secondary_tensor", None) is not None
        and not p.requires_grad  # those of trained ones may be of another step
        and p.ds_status == ZeroParamStatus.NOT_AVAILABLE
    }
    if near:
        first = next(iter(near.values()))
        first.all_gather_coalesced(list(near.values())).wait()
