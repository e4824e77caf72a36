"""Which row stands where: every rank, worker and resumed run must agree, and weights must hold."""

import json
from collections import Counter

import pytest
import tiny_mix
import torch
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from tiny import make_processor
from torch.utils.data import BatchSampler, DataLoader

import vlsi_fast.data.dataset
from vlsi_fast.config_data import DataConfig
from vlsi_fast.data.dataset import VlsiDataset
from vlsi_fast.data.mixing import EpochOrder, quotas
from vlsi_fast.data.sources import build_source
from vlsi_fast.stages.sampling import ContinuingSampler

SIZES, WEIGHTS = [24, 6], [1, 1]


def order_of(seed=3, weights=WEIGHTS, **more):
    return EpochOrder(SIZES, seed, weights, **more)


def batches(order, batch, ranks=1, start=0, epoch=0):
    """[step][rank] -> the row numbers that accelerate hands out."""
    sampler = ContinuingSampler(order, start=start)
    sampler.epoch = epoch
    shards = [BatchSamplerShard(BatchSampler(sampler, batch, False), ranks, rank) for rank in range(ranks)]
    return list(zip(*shards, strict=True))


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_two_ranks_read_what_one_reads(weights):
    one = [sorted(step[0]) for step in batches(order_of(weights=weights), 4)]
    two = [sorted(step[0] + step[1]) for step in batches(order_of(weights=weights), 2, ranks=2)]
    assert one[:-1] == two[: len(one) - 1] and len(one) >= 8  # the last step may repeat rows to come out even
    assert set(one[-1]) <= set(two[-1])
    assert one != [sorted(step[0]) for step in batches(order_of(seed=4, weights=weights), 4)]


def test_an_unweighted_epoch_is_the_permutation_it_always_was():
    expected = torch.randperm(30, generator=torch.Generator().manual_seed(3 * 1_000_003 + 1)).tolist()
    assert order_of(weights=None).epoch(1).tolist() == expected == list(ContinuingSampler(30, 3, start=30))
    assert sorted(expected) == list(range(30))


def test_quotas_follow_the_weights_exactly():
    assert quotas([24, 6], [1, 1], "all_exhausted") == [24, 24]
    assert quotas([24, 6], [1, 1], "first_exhausted") == [6, 6]
    assert quotas([57289, 91021, 664703], [57.289, 91.021, 664.703], "all_exhausted") == [57289, 91021, 664703]
    assert sum(quotas([10, 10, 10], [1, 1, 1.5], "all_exhausted")) == 35
    assert quotas([100, 100, 100], [0.2, 0.3, 0.5], "first_exhausted") == [40, 60, 100]
    with pytest.raises(ValueError, match="source 1 has a share of .* is no row"):
        quotas([5, 5], [1000, 1], "first_exhausted")


def test_small_sources_start_again_and_large_ones_go_on():
    order = order_of()
    for epoch in range(3):
        counts = Counter(order.epoch(epoch).tolist())
        assert [counts[row] for row in range(24)] == [1] * 24  # every row at least once
        assert [counts[row] for row in range(24, 30)] == [4] * 6  # equally often
    assert order.epoch(0).tolist() != order.epoch(1).tolist()
    first = order_of(stopping_strategy="first_exhausted")
    assert len(first) == 12
    parts = [[row for row in first.epoch(epoch).tolist() if row < 24] for epoch in range(4)]
    assert sorted(sum(parts, [])) == list(range(24))  # four epochs of six: every row once
    assert all(sorted(row for row in first.epoch(e).tolist() if row >= 24) == list(range(24, 30)) for e in range(4))


def test_positions_run_through_the_epochs():
    order = order_of()
    whole = [row for epoch in range(3) for row in order.epoch(epoch).tolist()]
    assert list(order.rows(0, len(whole))) == whole
    assert list(order.rows(30, 70)) == whole[30:100]
    assert list(ContinuingSampler(order, start=20)) == whole[20 : 20 + len(order)]  # a stage that starts in between


@pytest.fixture
def data(tmp_path):
    """30 rows of two sources, each with an image."""
    for name, size in (("a", 24), ("b", 6)):
        rows = []
        for i in range(size):
            (tmp_path / f"{name}{i}.png").write_bytes(tiny_mix.png(i))
            rows.append(tiny_mix.llava(f"{name}{i}.png", "<image>\nWhat color?", f"{name} {i}"))
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    train = [{"reader": "llava", "path": f"{name}.json", "weight": 1} for name in "ab"]
    return DataConfig(train=train, root=str(tmp_path))


@pytest.fixture
def decoded(monkeypatch):
    """Paths of the images that were decoded, in order."""
    paths, load = [], vlsi_fast.data.dataset.load_image

    def counting(ref, **options):
        paths.append(ref.path)
        return load(ref, **options)

    monkeypatch.setattr(vlsi_fast.data.dataset, "load_image", counting)
    return paths


def loader(data, workers=0, batch=4):
    source = build_source(data.train)
    dataset = VlsiDataset(source, {"student": make_processor("tiny")}, data)
    sampler = ContinuingSampler(EpochOrder(source.sizes, 3, source.weights, data.stopping_strategy))
    batches = BatchSampler(sampler, batch, False)
    return DataLoader(
        dataset, batch_sampler=batches, collate_fn=lambda rows: [r["id"] for r in rows], num_workers=workers
    )


def test_a_resumed_run_reads_the_same_rows_and_decodes_no_others(data, decoded):
    straight = list(loader(data))
    assert len(straight) == 12 and len(decoded) == 48
    decoded.clear()
    resumed = list(skip_first_batches(loader(data), 7))  # what the Trainer does on --resume
    assert resumed == straight[7:]
    names = [row.replace(".json#", "") + ".png" for batch in resumed for row in batch]
    assert decoded == names


def test_workers_change_nothing(data):
    assert list(loader(data, workers=2)) == list(loader(data))


def test_the_trainer_uses_weights_and_stopping_strategy(data, workspace, tmp_path):
    import tiny_runs as runs

    from vlsi_fast.config import load_config
    from vlsi_fast.stages.arguments import training_arguments
    from vlsi_fast.stages.module import StageModule
    from vlsi_fast.stages.trainer import StageTrainer

    tree = runs.settings(workspace, tmp_path / "run") | {
        "data": data.model_dump() | {"stopping_strategy": "first_exhausted"}
    }
    config = load_config(runs.write_config(tree, tmp_path / "run.yaml"))
    dataset = VlsiDataset(build_source(config.data.train), {"student": make_processor("tiny")}, config.data)
    module = StageModule()
    module.part_names, module.roles, module.weight = ["loss"], ("student",), torch.nn.Parameter(torch.ones(1))
    trainer = StageTrainer(module, training_arguments(config, "sft"), config, "sft", dataset, collator=None)
    assert len(trainer.get_train_dataloader()) == 6  # 12 rows an epoch, two in a batch
    counts = Counter(dataset.sources.row_id(i)[0] for rows in trainer.batches for i in rows)
    assert counts == {"a": 6, "b": 6}
