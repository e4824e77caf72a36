"""The few places where code must know that DeepSpeed ZeRO-3 keeps only a shard of each parameter on a rank.

Every function is a plain no-op without ZeRO-3. All of them are collective: every rank calls them in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .secondary import gather_from_secondary, partitioned_init


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        dist.barrier()


def gathered_objects(value) -> list:
    """What every rank passed, in order of ranks. Collective."""
    everyone = [value]
    if world_size() > 1:
        everyone = [None] * world_size()
        dist.all_gather_object(everyone, value)
    return everyone


def broadcast_object(value):
    """What rank 0 passed, on every rank. Collective."""
    held = [value]
    if world_size() > 1:
        dist.broadcast_object_list(held, src=0)
    return held[0]


@contextlib.contextmanager
def gathered(parameters: Iterable[Tensor], writer: int | None = None):
    """Whole parameters inside the block; with `writer`, that rank's changes are scattered back on leaving."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    if writer is None:
        gather_from_secondary(sharded)
    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=writer):
        yield


def release_gathered(model: nn.Module) -> None:
    """Free what DeepSpeed's engine holds of gathered parameters after a forward without a backward, so that `gathered`
    finds none of them on its way."""
    optimizer = getattr(model, "optimizer", None)
    if hasattr(optimizer, "empty_partition_cache"):  # the engine's own also empties CUDA's cache
        optimizer.empty_partition_cache()


@contextlib.contextmanager
def sharded_init():
    """Modules built inside are partitioned as they are made, so no rank ever holds them whole."""
    from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        yield
        return
    with partitioned_init(deepspeed_config()):
        yield


@contextlib.contextmanager
def unsharded():
    """Modules built inside are plain ones although ZeRO-3 is on (rank 0 assembling a checkpoint)."""
    from transformers.integrations import deepspeed as integration

    config = integration._hf_deepspeed_config_weak_ref() if integration._hf_deepspeed_config_weak_ref else None
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            integration.set_hf_deepspeed_config(config)


def gather_state(named_parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Name -> whole tensor on the CPU on rank 0 (an empty mapping on other ranks), one parameter at a time."""
    state = {}
    for name, parameter in named_parameters:
        with gathered([parameter]):
            if rank() == 0:
                state[name] = parameter.detach().to("cpu", copy=True).contiguous()
    return state


def load_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state` (on rank 0; ignored elsewhere under ZeRO-3) into `module`, one parameter at a time.

    Raises:
        ValueError: names or shapes do not fit.
    """
    parameters = dict(module.named_parameters())
    if rank() == 0 or state:
        missing, unknown = sorted(parameters.keys() - state.keys()), sorted(state.keys() - parameters.keys())
        if missing or unknown:
            raise ValueError(f"weights do not fit the module: missing {missing[:5]}, unknown {unknown[:5]}")
    for name, parameter in parameters.items():
        with gathered([parameter], writer=0), torch.no_grad():
            if not hasattr(parameter, "ds_id") or rank() == 0:
                if parameter.shape != state[name].shape:
                    raise ValueError(
                        f"{name}: stored shape {tuple(state[name].shape)}, expected {tuple(parameter.shape)}"
                    )
                parameter.copy_(state[name])
