"""Costs of the rows that a stage will read, agreed on by all ranks."""

from __future__ import annotations

import numpy as np

from ..config import RunConfig
from ..data.dataset import VlsiDataset
from ..data.row_sizes import SizeTable
from ..planner.rows import row_operations
from ..ranks.sharding import broadcast_object, gathered_objects, rank, world_size
from ..ranks.watch import watch
from ..terminal import say
from .sampling import ContinuingSampler, RowCosts, data_order

TOLD_FROM_ROWS = 20_000


def row_costs(
    config: RunConfig,
    stage: str,
    dataset: VlsiDataset,
    start: int,
    configs: dict,
    packed: dict[str, bool],
) -> RowCosts:
    """Measure the rows that the stage reads, as far as their sizes are not kept from before. Collective.

    Args:
        config: of the run.
        stage: its name.
        dataset: the rows, with their processors.
        start: rows of the run's order that earlier stages have used.
        configs: role -> transformers config.
        packed: role -> whether its micro-batches have no padding.
    """
    watch.place = f"stage {stage}, measuring rows"
    table = SizeTable(dataset)
    if rank() == 0:
        table.load()
    table.sizes = broadcast_object(table.sizes)  # all deal by the same sizes, whatever each finds on its disk
    unknown = table.unknown(rows_read(config, stage, data_order(config, dataset.sources, start), len(dataset)))
    if rank() == 0 and len(unknown) >= TOLD_FROM_ROWS:
        say(f"stage {stage}: measuring {len(unknown):,} rows for training.balance_batch; their sizes are kept")
    parts = gathered_objects(table.measure(unknown[rank() :: world_size()], config.data.num_workers))
    for i, part in enumerate(parts):
        table.sizes[:, unknown[i :: world_size()]] = part
    if rank() == 0 and len(unknown):
        table.save()
    sizes = {role: table.sizes[number] for role, number in table.roles.items()}
    return RowCosts(sizes, row_operations(config, stage, configs), packed)


def rows_read(config: RunConfig, stage: str, order: ContinuingSampler, rows: int) -> np.ndarray:
    """[..] rising numbers of those of all `rows` rows that a stage reads."""
    training = config.stage_training(stage)
    count = int(np.ceil(training.num_train_epochs)) * len(order)
    if training.max_steps > 0:
        of_step = training.per_device_train_batch_size * training.gradient_accumulation_steps * world_size()
        count = training.max_steps * of_step
    if count > 4 * len(order):
        return np.arange(rows)
    return np.unique(np.fromiter(order.order.rows(order.start, count), np.int64, count))
