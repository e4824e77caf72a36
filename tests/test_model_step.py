"""A step's time by arithmetic: against hand-made rooflines, and against the planner's count."""

import dataclasses
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import tiny_families as families
import tiny_runs as runs
import torch

from vlsi_fast.planner.dry_run.device import on
from vlsi_fast.planner.dry_run.gpus import GPUS
from vlsi_fast.planner.dry_run.tape import Kernel, Tape

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import model_step  # noqa: E402

A100 = model_step.Roofline.of(GPUS["a100"], 4e-6)


@pytest.fixture
def tape():
    found = Tape()
    with on(GPUS["a100"], found):
        yield found


def only(tape):
    """The one launch that was noted."""
    ((kernel, count),) = tape.work.items()
    assert count == 1
    return kernel


# ---- single launches, by hand ----


def test_one_product(tape):
    """[1024, 512] x [512, 2048] in bfloat16: 2.15 GFLOP, 7.34 MB."""
    a, b = (torch.empty(*size, device="cuda", dtype=torch.bfloat16) for size in ((1024, 512), (512, 2048)))
    tape.begin()
    a @ b
    kernel = only(tape)
    assert kernel == Kernel(
        "other", "mm", "bfloat16", 2 * 1024 * 512 * 2048, 2 * (1024 * 512 + 512 * 2048 + 1024 * 2048)
    )
    assert A100.seconds(kernel) == pytest.approx(2147483648 / 312e12) and A100.bound_by(kernel) == "products"
    slow = dataclasses.replace(A100, bandwidth=1e12)
    assert slow.seconds(kernel) == pytest.approx(7340032 / 1e12) and slow.bound_by(kernel) == "memory"
    patient = dataclasses.replace(A100, floor=1e-3)
    assert patient.seconds(kernel) == 1e-3 and patient.bound_by(kernel) == "launch"


@pytest.mark.parametrize(
    ("call", "moved"),
    [
        (lambda x, ids: x + x, 8),  # one input, read once, and a result
        (lambda x, ids: x.mul_(2.0), 8),
        (lambda x, ids: torch.add(x, x.clone(), out=x), None),
        (lambda x, ids: x + x[:1].expand(1000, 100), 8 + 4 / 1000),  # an expanded row is read once
        (lambda x, ids: torch.nn.functional.embedding(ids, x), 10 * (2 * 4 + 8 / 100) / 1000),
        (lambda x, ids: x[ids], 10 * (2 * 4 + 8 / 100) / 1000),
        (lambda x, ids: x.view(-1), None),
    ],
)
def test_bytes_of_operators(tape, call, moved):
    """Bytes an element of x [1000, 100] float32; ids: ten rows of it."""
    x, ids = torch.empty(1000, 100, device="cuda"), torch.empty(10, device="cuda", dtype=torch.long)
    tape.begin()
    call(x, ids)
    if moved is not None:
        assert only(tape).moved == pytest.approx(moved * x.numel())
    elif tape.work:  # a copy, and a sum into its own input
        assert [kernel.moved for kernel in tape.work] == [8 * x.numel(), 12 * x.numel()]


def test_products_sum_in_float32_and_count_in_what_they_multiply(tape):
    a, b = (torch.empty(64, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    total = torch.empty(64, 64, device="cuda")
    tape.begin()
    torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    kernel = only(tape)
    assert kernel.dtype == "bfloat16" and kernel.moved == 2 * 2 * 64 * 64 + 2 * 4 * 64 * 64


def test_a_product_without_a_peak_is_refused():
    with pytest.raises(KeyError, match="int8"):
        A100.seconds(Kernel("heads", "mm", "int8", 10, 10))


# ---- sums ----


def test_accumulation_ranks_and_bandwidth():
    work = [
        (Kernel("student forward", "mm", "bfloat16", 312 * 10**9, 1), 2),  # 1 ms each
        (Kernel("student forward", "add", "bfloat16", 0, 2039 * 10**6), 3),  # 1 ms each
        (Kernel("optimizer", "add", "float32", 0, 2039 * 10**6), 8),
    ]
    parts = model_step.parts_of(work, A100, 4, 8)
    assert parts == {"student forward": pytest.approx(20e-3), "optimizer": pytest.approx(1e-3)}
    shares = model_step.bounds_of(work, A100)
    assert shares == {"products": pytest.approx(0.4), "memory": pytest.approx(0.6), "launch": 0.0}
    times = []
    for bandwidth in (0.5e12, 1e12, 2e12, 4e12):
        roofline = dataclasses.replace(A100, bandwidth=bandwidth)
        times.append(sum(model_step.parts_of(work, roofline, 4, 8).values()))
    assert times == sorted(times, reverse=True) and len(set(times)) == 4


# ---- a stage ----


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A small run's config; no weights."""
    folder = tmp_path_factory.mktemp("model_step")
    families.save(folder / "teacher", "qwen2_vl", hidden=48, layers=6, seed=1)
    families.save(folder / "student", "qwen2_vl", hidden=32, layers=4, seed=2)
    tree = runs.settings(folder, folder / "out", max_steps=1) | {"impl": "torch", "liger": False, "dtype": "bfloat16"}
    return runs.write_config(tree | {"sft": {"start_from": "base"}}, folder / "run.yaml")


def test_the_script(config, tmp_path, monkeypatch, capsys):
    """Operations are the planner's, times fall from GPU to GPU, and what is printed is what is written."""
    monkeypatch.setattr(sys, "argv", ["model_step", "--config", str(config), "--out", str(tmp_path)])
    assert model_step.main() == 0
    result = json.loads((tmp_path / "model_step.json").read_text())
    assert "nothing was measured" in result["kind"] and {"commit", "versions", "machine"} <= result.keys()
    (part,) = result["parts"]
    assert [stage["stage"] for stage in part["stages"]] == ["verbalize", "interact", "sft"]
    assert "out" not in result["arguments"] and part["rows"]["tokens"] > 0
    for stage in part["stages"]:
        for name, flops in stage["planner_flops"].items():
            if name != "heads":  # impl torch multiplies more often
                assert stage["flops"][name] == pytest.approx(flops, rel=0.02), name
        times = [stage["gpus"][name]["bound_seconds"] for name in ("a100", "h100", "h200", "b200")]
        assert times == sorted(times, reverse=True)
        for found in stage["gpus"].values():
            assert (
                found["expected_seconds"] >= found["bound_seconds"] == pytest.approx(sum(found["bound_parts"].values()))
            )
            assert sum(found["decided_by"].values()) == pytest.approx(1.0)
        assert set(stage["launches"]) == set(stage["moved_bytes"]) == set(stage["gpus"]["a100"]["bound_parts"])
    printed = capsys.readouterr().out
    assert "not measured" in printed and "student backward" in printed and "ZeRO-3" in printed


def test_flops_of_launches_are_those_of_the_parts(config):
    from vlsi_fast import load_config
    from vlsi_fast.planner.build import Models
    from vlsi_fast.planner.dry_run.rows import rows_that_fit
    from vlsi_fast.planner.dry_run.run import run_stage
    from vlsi_fast.planner.report import rows_of

    loaded = load_config(config)
    models = Models(loaded)
    rows = rows_that_fit(rows_of(loaded, models), loaded)
    found = run_stage(loaded, models, "interact", rows, GPUS["a100"])
    summed = model_step._summed(found.work, lambda kernel: kernel.flops)
    assert {name: flops for name, flops in summed.items() if flops} == found.flops
    assert model_step._summed(found.work, lambda kernel: 1) == found.operators
    options = Namespace(launch_us=4.0, ranks=8, product_share=1.0, bandwidth_share=1.0, gpus=["a100"], dry_gpu="a100")
    alone = model_step.stage_result(loaded, models, "interact", rows, options)["gpus"]["a100"]
    assert alone["expected_seconds"] == alone["bound_seconds"]
