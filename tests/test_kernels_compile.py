"""Every Triton kernel compiles for Ampere and Hopper: no spills, shared memory that fits, tensor cores where stated.

Needs no GPU. The compiler runs in a process of its own, since kernels in this one may be interpreted, which leaves
nothing to compile; the rules themselves are in benchmarks/resources.py.
"""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import vlsi_kernels

pytest.importorskip("triton", reason="Triton is not installed (it exists for Linux only)")

ROOT = Path(__file__).resolve().parent.parent


def listed():
    """(module, build, compute capability) of all BUILDS of the package."""
    for name in sorted(m.name for m in pkgutil.iter_modules(vlsi_kernels.__path__)):
        for build in getattr(importlib.import_module(f"vlsi_kernels.{name}"), "BUILDS", []):
            for capability in build.targets:
                yield name, build.name, capability


LISTED = list(listed())


def run(*command, **environment):
    """A Python process in which kernels are compiled, not interpreted."""
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "kernels")])
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path} | environment
    return subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="session")
def report():
    """What benchmarks/resources.py says of all builds: seconds from Triton's cache, else about a second a build."""
    done = run(ROOT / "benchmarks" / "resources.py")
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("module", "build", "capability"), LISTED, ids=lambda v: str(v))
def test_build(module, build, capability, report):
    rows = [r for r in report["rows"] if (r["module"], r["build"], r["capability"]) == (module, build, capability)]
    assert len(rows) == 1, "two builds of one name"
    assert not rows[0]["problems"]


def test_every_kernel_is_in_a_build(report):
    assert LISTED
    assert report["escaped_kernels"] == []


# Kernels that break one rule each, and one that breaks none; the last is launched by nobody.
BAD_KERNELS = """
from vlsi_kernels._triton import Build, jit, tl


@jit
def product_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    i, k = tl.arange(0, BLOCK), tl.arange(0, 64)
    total = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for step in range(0, n):
        x = tl.load(x_ptr + step * 64 + i[:, None] * 4096 + k[None, :])
        total += tl.dot(x, tl.load(y_ptr + step * 64 + i[None, :] * 4096 + k[:, None]))
    tl.store(out_ptr + i[:, None] * BLOCK + i[None, :], total)


@jit
def twice(x):
    return x + x


@jit
def sum_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.sum(twice(tl.load(x_ptr + tl.arange(0, BLOCK))), axis=0))


@jit
def unbuilt_kernel(x_ptr):
    tl.store(x_ptr, twice(1.0))


def product(name, block, stages=3):
    pointers = {"x_ptr": "*bf16", "y_ptr": "*bf16", "out_ptr": "*fp32"}
    constants = {"BLOCK": block, "STEPS": 1}
    return Build(name, product_kernel, pointers | {"n": "i32"}, constants, 4, stages, True, aligned=tuple(pointers))


summed = {"x_ptr": "*fp32", "out_ptr": "*fp32"}
BUILDS = [
    product("good", 64),
    product("spills", 256),
    product("shared_memory", 128, stages=9),
    Build("no_tensor_cores", sum_kernel, summed, {"BLOCK": 128}, 4, tensor_cores=True),
    Build("argument_forgotten", sum_kernel, {"x_ptr": "*fp32"}, {"BLOCK": 128}, 4),
    Build("does_not_compile", sum_kernel, summed, {"BLOCK": 100}, 4),
]
"""


def test_the_check_can_fail(tmp_path):
    (tmp_path / "bad_kernels.py").write_text(BAD_KERNELS)
    script = "import bad_kernels as b, json, resources as r; "
    script += "print(json.dumps([r.check('bad_kernels', b.BUILDS), r.escaped_kernels([b])]))"
    path = os.pathsep.join([str(tmp_path), str(ROOT / "benchmarks"), str(ROOT / "kernels")])
    done = run("-c", script, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    rows, escaped = json.loads(done.stdout.splitlines()[-1])
    problems = {(row["build"], row["capability"]): " ".join(row["problems"]) for row in rows}
    for capability, instruction in ((80, "mma.sync"), (90, "wgmma")):
        assert problems["good", capability] == ""
        assert "spills" in problems["spills", capability]
        assert "shared memory" in problems["shared_memory", capability]
        assert f"no {instruction} instruction" in problems["no_tensor_cores", capability]
        assert "look at ['out_ptr']" in problems["argument_forgotten", capability]
        assert "does not compile" in problems["does_not_compile", capability]
    assert escaped == ["bad_kernels.unbuilt_kernel"]
