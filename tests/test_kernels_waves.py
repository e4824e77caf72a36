"""Row blocks that fill whole waves of a GPU (`vlsi_kernels._waves`)."""

import importlib
import math

import pytest
import torch
from kernels_util import randn

from vlsi_kernels import _waves, head_statistics
from vlsi_kernels._common import HeadOptions, plan_tiles
from vlsi_kernels._waves import multiprocessors, pass_waves, row_block, waves_of

GPUS = {"A100": 108, "H100": 132, "H200": 132, "B200": 148}
ROWS = (1, 100, 256, 1000, 4096, 7168, 8192, 14336, 20480, 28672, 40960, 86016, 10**6)
WIDTHS = ((1536, 1536), (3584, 1536), (8192, 3584), (1536, 896), (3584, 0))


def test_waves_by_hand():
    """56 x 6 = 336 tiles are 2.55 waves of 132, 66 x 6 = 396 are 3.00."""
    assert waves_of(7168, 1536, 132) == waves_of(8448, 1536, 132) == 3
    assert waves_of(8449, 1536, 132) == 4 and waves_of(1, 1, 132) == 1
    found = pass_waves(8448, 8448, 1536, 1536, 8192, 132)
    assert found == (16, 3, 1.0)  # 66 x 32 = 2112 = 16 x 132
    found = pass_waves(7168, 7168, 1536, 1536, 8192, 132)
    assert found[:2] == (14, 3)
    assert found.efficiency == pytest.approx((56 * 32 * 1536 + 56 * 6 * 8192) / 132 / (14 * 1536 + 3 * 8192))
    # of 28672 rows, as the docstring says: 4 x 3 waves, or 3 x 3 + 2
    assert pass_waves(28672, 7168, 1536, 1536, 8192, 132).expectation == 12
    assert pass_waves(28672, 7808, 1536, 1536, 8192, 132).expectation == 11


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("workspace", [10**7, 2**29, 10**10])
@pytest.mark.parametrize("vocab", [1025, 151936])
def test_never_dearer_than_equal_blocks(gpu, workspace, vocab):
    """And no more blocks, the same vocabulary chunks, and within the memory that equal blocks may take."""
    options, sms, better = HeadOptions(vocab, 1.0, "triton", workspace), GPUS[gpu], 0
    for rows in ROWS:
        for key, width in WIDTHS:
            equal, columns = plan_tiles(rows, width, torch.float16, options)
            block, same = plan_tiles(rows, width, torch.float16, options, key=key, sms=sms)
            assert same == columns and 1 <= block <= rows
            assert math.ceil(rows / block) == math.ceil(rows / equal)
            before, after = (pass_waves(rows, size, key, width, columns, sms) for size in (equal, block))
            assert before.efficiency <= after.efficiency <= 1.0
            better += after.efficiency > before.efficiency
            used = block * (columns * 6 + 4 * width) + columns * width * 2
            assert block == equal or used <= workspace
    assert better > 0 or workspace != 2**29 or vocab == 1025


@pytest.mark.parametrize(
    ("sms", "rows", "width", "equal", "block", "waves"),
    [
        (132, 28672, 1536, 7168, 7808, (12, 11)),
        (108, 14336, 1536, 7168, 7424, (8, 7)),
        (148, 14336, 1536, 7168, 8064, (6, 5)),
        (132, 4096, 1536, 4096, 4096, (2, 2)),  # one block is one block
    ],
)
def test_blocks_of_the_default_workspace(sms, rows, width, equal, block, waves):
    """Waves of the second product, equal blocks and these."""
    options = HeadOptions(151936, 1.0, "triton", 2**29)
    assert plan_tiles(rows, width, torch.float16, options)[0] == equal
    found, columns = plan_tiles(rows, width, torch.float16, options, key=1536, sms=sms)
    assert found == block
    assert tuple(pass_waves(rows, b, 1536, width, columns, sms).expectation for b in (equal, block)) == waves


def test_best_of_all_sizes():
    """Against all block sizes there are, one row apart: no better one exists among as few blocks."""
    for rows, limit, sms in ((5000, 2100, 13), (3000, 1100, 7), (2048, 700, 9)):
        found = row_block(rows, limit, 64, 512, 1024, sms)
        sizes = [b for b in range(1, limit + 1) if math.ceil(rows / b) == math.ceil(rows / limit)]
        best = max(pass_waves(rows, b, 64, 512, 1024, sms).efficiency for b in sizes)
        assert pass_waves(rows, found, 64, 512, 1024, sms).efficiency == best


def test_blocks_change_no_number(monkeypatch):
    """The same statistics to the last bit with other row blocks: a row is one row of each product."""
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = importlib.import_module("vlsi_kernels.head_statistics")
    hidden, weight = (randn(n, 16, seed=n, dtype=torch.bfloat16).to(device) for n in (600, 700))
    seen = []

    def found(sms):
        monkeypatch.setattr(module, "multiprocessors", lambda device: seen.append(device) or sms)
        return head_statistics(hidden, weight, weight, impl="triton", workspace_bytes=1_200_000)

    options = HeadOptions(700, 1.0, "triton", 1_200_000)
    blocks = {sms: plan_tiles(600, 16, torch.float16, options, key=16, sms=sms)[0] for sms in (None, 1, 5)}
    assert len(set(blocks.values())) > 1, blocks
    for sms in (1, 5):
        for one, other in zip(found(None), found(sms), strict=True):
            assert torch.equal(one, other)
    assert len(seen) == 4


def test_the_gpu_is_asked(monkeypatch):
    from types import SimpleNamespace

    properties = SimpleNamespace(multi_processor_count=108)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert multiprocessors(torch.device("cuda", 0)) == 108
    assert multiprocessors(torch.device("cpu")) == _waves.MULTIPROCESSORS == 132


def test_table_of_the_benchmark(capsys, monkeypatch):
    """Nothing in it is dearer than equal blocks, and it says what the operators do."""
    import json

    import waves

    monkeypatch.setattr("sys.argv", ["waves.py", "--shapes", "72b-to-7b:4096"])
    waves.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["rows"] for row in rows] == [21 * 4096, 8 * 4096] * 3
    for row in rows:
        key = {"teacher": 8192, "student": 3584}[row["pass"]]
        options = HeadOptions(152064, 1.0, "triton", 2**29)
        sms = {"A100": 108, "H100, H200": 132, "B200": 148}[row["gpu"]]
        block, _ = plan_tiles(row["rows"], 3584, torch.float16, options, key=key, sms=sms)
        assert row["ours"]["block"] == block and row["ours"]["efficiency"] >= row["equal"]["efficiency"]
