"""Heads whose rows are divided over two ranks give what the whole head gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels_util import randn
from sharded_heads import IMPLS, ROWS, problem, results

from vlsi_kernels import VocabularyShard, head_statistics, linear_cross_entropy
from vlsi_kernels.head_statistics import reference_head_statistics


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("sharded")
    script = Path(__file__).with_name("sharded_heads.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, folder]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("impl", IMPLS)
def test_two_ranks_equal_the_whole_head(ranks, impl):
    """Every statistic, loss and gradient, on both ranks; a head's gradient is that of the rank's own rows."""
    whole = results("torch", {}, slice(None))
    shards = [part[impl] for part in ranks]
    for name, truth in whole.items():
        if name.endswith("head_gradient"):
            value = torch.cat([part[name] for part in shards])
            assert value.shape[0] == sum(ROWS)
        else:
            value = shards[0][name]
            assert torch.equal(value, shards[1][name]), name
        assert torch.allclose(value, truth, rtol=1e-5, atol=2e-6), name


def test_a_shard_of_padding_takes_no_part(ranks):
    hidden, weight = randn(4, 8, seed=0), randn(40, 8, seed=1)
    truth = reference_head_statistics(hidden, weight, weight, vocab_size=20)
    for part in ranks:
        for value, expected in zip(part["padding"].values(), truth):
            assert torch.allclose(value.double(), expected, atol=1e-6)


def test_errors_name_the_fix():
    student, _, head, _, labels = problem()
    shard = VocabularyShard(None, 0)
    with pytest.raises(ValueError, match="a sharded head needs vocab_size"):
        linear_cross_entropy(student.flatten(0, 1), head, labels, shard=shard)
    with pytest.raises(ValueError, match="gather the shards first"):
        head_statistics(student.flatten(0, 1), head, impl="reference", shard=shard)
    with pytest.raises(ValueError, match="label 560 is outside 0..559"):
        linear_cross_entropy(student.flatten(0, 1), head, labels + 1, vocab_size=560, shard=shard)
