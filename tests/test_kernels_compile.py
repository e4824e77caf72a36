"""What the public operators launch compiles for Ampere and Hopper: no spills, shared memory that fits, tensor cores,
16 bytes at an access; and no kernel escapes.

Needs no GPU. The compiler runs in a process of its own, since kernels in this one may be interpreted, which leaves
nothing to compile; the calls are in benchmarks/launches.py, the rules in benchmarks/resources.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")

ROOT = Path(__file__).resolve().parent.parent


def run(*command, **environment):
    """A Python process in which kernels are compiled, not interpreted."""
    path = os.pathsep.join(map(str, [*environment.pop("path", []), ROOT / "benchmarks", ROOT / "kernels", ROOT]))
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path} | environment
    return subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)


def answer(script, **environment):
    """What a script prints as its last line, from JSON."""
    done = run("-c", script, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def report():
    """What benchmarks/resources.py says of all builds: seconds from Triton's cache, else some minutes of a core."""
    done = run(ROOT / "benchmarks" / "resources.py")
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"status": done.returncode}


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90])
def test_what_is_launched_breaks_no_rule(report, capability):
    rows = [row for row in report["rows"] if row["capability"] == capability]
    assert len({(row["kernel"], row["build"]) for row in rows}) == len(rows) > 100, "two builds that read the same"
    assert [row for row in rows if row["problems"]] == []
    products = [row for row in rows if row["kernel"] == "_gate_up_kernel" and "fp32" not in row["build"]]
    assert products and all(row["product_rows"] and row["mma"] + row["wgmma"] for row in products)


@pytest.mark.slow
def test_every_kernel_is_launched(report):
    assert report["escaped_kernels"] == [] and report["stopped"] == {} and report["status"] == 0


def test_alignment_makes_a_build_of_its_own():
    """Widths of models, and one more: other specialisations of the same kernel, with narrower accesses."""
    script = """
import json, launches, resources, torch
from dataclasses import replace
from launches import BACKBONES, Call, of_heads

def calls(width):
    model = replace(BACKBONES["2b"], width=width)
    for name, run in of_heads(model, model, 32, torch.bfloat16):
        if name == "linear_cross_entropy":
            yield Call(f"{name} {width}", run)

found = [resources.check(90, lambda widths=widths: (c for w in widths for c in calls(w)))["rows"]
         for widths in ([1536], [1537], [1536, 1537])]
print(json.dumps([[row for row in rows if row["kernel"] == "subtract_label_kernel"] for rows in found]))
"""
    even, odd, both = answer(script)
    assert {row["build"] for row in even} | {row["build"] for row in odd} == {row["build"] for row in both}
    assert len(both) == len(even) + len(odd) == 4  # with the gradient and without
    assert not any("unaligned" in row["build"] or row["problems"] for row in even)
    for row in odd:
        assert "width" in row["build"].split("unaligned ")[1] and row["wide"] == 0
        assert any("16 bytes" in problem for problem in row["problems"])


def test_each_capability_has_its_own_tiles():
    """In one process: nothing may be kept by the device's name, which is cuda:0 for all."""
    script = """
import json, launches, torch
from launches import BACKBONES, Call, of_networks

def calls():
    name, run = next(of_networks(BACKBONES["2b"], 4096, torch.bfloat16))
    yield Call(name, run)

found = [launches.record(capability, calls) for capability in (90, 80, 90)]
print(json.dumps([[b.constants["BLOCK_K"] for b in one.builds if b.kernel == "_gate_up_kernel"] for one in found]))
"""
    assert answer(script) == [[64], [32], [64]]


# Kernels that break one rule each, and one that breaks none; the last is launched by nobody.
BAD_KERNELS = """
import torch
from launches import Call

from vlsi_kernels._triton import jit, tl


@jit
def product_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr, WIDEN: tl.constexpr):
    i, k = tl.arange(0, BLOCK), tl.arange(0, 64)
    total = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for step in range(0, n):
        x = tl.load(x_ptr + step * 64 + i[:, None] * 4096 + k[None, :])
        y = tl.load(y_ptr + step * 64 + i[None, :] * 4096 + k[:, None])
        if WIDEN:
            x, y = x.to(tl.float32), y.to(tl.float32)
        total += tl.dot(x, y, input_precision="ieee")
    tl.store(out_ptr + i[:, None] * BLOCK + i[None, :], total)


@jit
def twice(x):
    return x + x


@jit
def sum_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.sum(twice(tl.load(x_ptr + tl.arange(0, BLOCK))), axis=0))


@jit
def unlaunched_kernel(x_ptr):
    tl.store(x_ptr, twice(1.0))


def product(block, stages=3, widen=False):
    x, out = torch.empty(2, 4096, dtype=torch.bfloat16, device="cuda"), torch.empty(4, device="cuda")
    product_kernel[(1,)](x, x, out, 48, block, widen, num_warps=4, num_stages=stages)


def summed(block, start=0):
    x = torch.empty(4096, device="cuda")[start:]
    sum_kernel[(1,)](x, x, block, num_warps=1)


def calls():
    yield Call("good", lambda: product(64))
    yield Call("spills", lambda: product(256))
    yield Call("shared memory", lambda: product(128, stages=9))
    yield Call("no tensor cores", lambda: product(64, widen=True))
    yield Call("narrow", lambda: summed(256, start=1))
    yield Call("narrow, and may be", lambda: summed(128, start=1), wide=False)
    yield Call("does not compile", lambda: summed(100))
"""


def test_the_check_can_fail(tmp_path):
    (tmp_path / "bad_kernels.py").write_text(BAD_KERNELS)
    script = "import bad_kernels as b, json, resources as r; r.operator_modules = lambda: [b]; "
    script += "print(json.dumps([r.check(c, b.calls) for c in (80, 90)]))"
    for instruction, found in zip(("mma.sync", "wgmma"), answer(script, path=[tmp_path])):
        problems = {row["call"]: " ".join(row["problems"]) for row in found["rows"]}
        assert problems.pop("good") == problems.pop("narrow, and may be") == ""
        assert "spills" in problems.pop("spills")
        assert f"no {instruction} instruction" in problems.pop("no tensor cores")
        assert "16 bytes" in problems.pop("narrow") and not problems
        assert "shared memory" in found["stopped"].pop("shared memory")
        assert "power of 2" in found["stopped"].pop("does not compile") and not found["stopped"]
        assert found["escaped"] == ["bad_kernels.unlaunched_kernel"]


def test_hopper_must_use_wgmma():
    """An mma.sync is no tensor core of Hopper's own, but for tiles of few rows."""
    script = """
import json, resources
from dataclasses import replace
old = resources.Resources("k", "", "", 90, 99, 0, 0, 0, 128, mma=8, wgmma=0, wide=1, product_rows=64)
rows = old, replace(old, product_rows=32), replace(old, capability=80), replace(old, product_rows=None, mma=0)
print(json.dumps([resources.problems_of(row, True) for row in rows]))
"""
    hopper, few, ampere, none = answer(script)
    assert "no wgmma" in hopper[0] and few == ampere == none == []
