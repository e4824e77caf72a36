"""A step on a GPU that is not there: what it counts is what real tensors show, and what must be caught is caught."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_families as families
import tiny_runs as runs
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vlsi_fast import load_config
from vlsi_fast.planner.build import Models
from vlsi_fast.planner.dry_run.device import DEVICE, TorchChangedError, on, require_torch
from vlsi_fast.planner.dry_run.gpus import GPUS
from vlsi_fast.planner.dry_run.rows import rows_that_fit
from vlsi_fast.planner.dry_run.run import run_stage
from vlsi_fast.planner.dry_run.tape import DeviceMixError, Tape
from vlsi_fast.planner.report import rows_of
from vlsi_fast.stages.sft import SftModule

ROOT = Path(__file__).resolve().parent.parent
H100 = GPUS["h100"]


@pytest.fixture
def tape():
    found = Tape()
    with on(H100, found):
        yield found


# ---- the device ----


def test_tensors_say_that_they_are_on_the_gpu(tape):
    x = torch.ones(3, device="cuda")
    assert x.device == DEVICE and x.is_cuda and not x.is_meta
    assert torch.ones(3).device.type == "cpu" and float(torch.ones(3).sum()) == 3
    assert torch.ones(3).to(x).is_cuda and torch.zeros_like(x).is_cuda and x.new_zeros(2).is_cuda
    assert nn.Linear(3, 3).to("cuda").weight.is_cuda and torch.device("cuda", 0) == DEVICE
    assert torch.cuda.get_device_capability(x.device) == (9, 0)
    assert torch.cuda.get_device_properties(0).multi_processor_count == 132


def test_nothing_is_left_behind():
    with on(H100, Tape()):
        pass
    assert torch.ones(2, device="meta").is_meta
    assert torch.cuda.is_available() == (torch.version.cuda is not None and torch.cuda.device_count() > 0)


@pytest.mark.parametrize(
    "waits, expected",
    [
        (lambda x: x.sum().item(), "item"),
        (lambda x: x.tolist(), "copy to the host"),
        (lambda x: bool(x.any()), "item"),
        (lambda x: f"{x.sum()}", "__format__"),
        (lambda x: x.cpu(), "copy to the host"),
        (lambda x: x.numpy(), "numpy"),
        (lambda x: torch.empty(3).copy_(x), "copy to the host"),
        (lambda x: torch.ones(3).to("cuda"), "blocking copy to the device"),
        (lambda x: torch.ones(3).to("cuda", non_blocking=True), "blocking copy to the device"),  # not pinned
        (lambda x: torch.tensor([1.0], device="cuda"), "blocking copy to the device"),
        (lambda x: x.new_tensor([1.0]), "blocking copy to the device"),
        (lambda x: x[x > 0], "index by a mask"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[torch.tensor([0, 1])], "blocking copy to the device"),
        (lambda x: x.repeat_interleave(torch.zeros(3, dtype=torch.long, device="cuda")), "repeat_interleave"),
        (lambda x: torch.cuda.synchronize(), "synchronize"),
    ],
)
def test_waits_are_noted_with_their_line(tape, waits, expected):
    x = torch.ones(3, device="cuda")
    waits(x)
    assert len(tape.waits) == 1, tape.waits
    (found,) = tape.waits
    assert found.startswith(f"test_dry_run.py:{waits.__code__.co_firstlineno} ") and found.endswith(expected)


def test_waits_of_autograd_itself_name_their_node(tape):
    x = torch.ones(3, device="cuda", requires_grad=True)
    y = x[x > 0].sum()
    tape.begin()
    y.backward()
    assert all(place.startswith("backward of Index") for place in tape.waits) and tape.waits


def test_what_does_not_wait_is_not_noted(tape):
    x = torch.ones(3).pin_memory().to("cuda", non_blocking=True)
    y = x[torch.tensor([0, 1]).pin_memory().to("cuda", non_blocking=True)] * 2 + torch.tensor(1.0)
    x[x > 0] = 0.0
    torch.where(x > 0, x, 0).masked_scatter(x > 0, x)
    assert y.shape == (2,) and torch.ones(3).sum().item() == 3 and not tape.waits


def test_whole_numbers_of_the_host_are_known_on_the_device(tape):
    """Lengths and image sizes decide shapes; numbers that are computed are not known, and read as 0."""
    sizes = torch.tensor([[1, 4, 6], [1, 2, 2]], device="cuda")
    assert sizes.prod(-1).tolist() == [24, 4] and sizes[:, 1:].sum().item() == 14
    assert torch.repeat_interleave(sizes[:, 0], sizes[:, 1]).shape == (6,)
    assert torch.ones(2, 3, device="cuda")[sizes > 2].shape == (2,)
    sizes[0] += 1
    assert sizes[0].tolist() == [2, 5, 7]
    sizes[1] = torch.ones(3, device="cuda").long()
    assert torch.ones(3, device="cuda").sum().item() == 0


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x: x + torch.ones(3, 3),
        lambda x: x @ torch.ones(3, 3),
        lambda x: torch.cat([x, torch.ones(3, 3)]),
        lambda x: torch.nn.functional.linear(x, torch.ones(3, 3)),
        lambda x: torch.where(torch.ones(3, 3) > 0, x, x),
        lambda x: x.index_put((torch.tensor([0]),), torch.ones(1, 3)),
    ],
)
def test_a_tensor_of_the_host_in_an_operator_is_refused(tape, mixed):
    with pytest.raises(DeviceMixError, match=rf"test_dry_run.py:{mixed.__code__.co_firstlineno}: aten"):
        mixed(torch.ones(3, 3, device="cuda"))


def test_mixing_in_backward_is_refused(tape):
    class Slip(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.ones(3)

    with pytest.raises(DeviceMixError):
        Slip.apply(torch.ones(3, device="cuda", requires_grad=True)).sum().backward()


@pytest.mark.parametrize("name", ["_current_autograd_node", "DisableTorchFunction"])
def test_another_torch_is_told(monkeypatch, name):
    require_torch()
    monkeypatch.delattr(torch._C, name)
    with pytest.raises(TorchChangedError, match=f"{name}.*use one of them"):
        require_torch()


# ---- what is counted: the same as of real tensors ----


class Net(nn.Module):
    """Norms, products, a gated network, attention's softmax, and a gradient checkpoint."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 200), nn.Linear(100, 64)

    def block(self, x):
        gate, up = self.up(self.norm(x)).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * up)

    def forward(self, x):
        for _ in range(3):
            x = torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)
        scores = (x @ x.mT).softmax(-1)
        return self.block(scores @ x).square().mean()


class Live(TorchDispatchMode):
    """The largest sum of live bytes of real tensors, storages counted by their addresses."""

    def __init__(self, tensors):
        super().__init__()
        self.known, self.peak = {}, 0
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor):
        storage = tensor.untyped_storage()
        self.known[storage._cdata] = (torch.multiprocessing.reductions.StorageWeakRef(storage), storage.nbytes())
        self.known = {key: value for key, value in self.known.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(-(-size // 512) * 512 for _, size in self.known.values()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return out


def test_memory_and_products_are_those_of_real_tensors():
    torch.manual_seed(0)
    net, x = Net(), torch.randn(4, 50, 64)
    live, count = Live([*net.parameters(), x]), FlopCounterMode(display=False)
    with live:
        torch.autograd.backward(net(x))
    with count:  # on its own: it keeps tensors alive
        torch.autograd.backward(net(x))
    tape = Tape()
    with on(H100, tape):
        fake = Net().to("cuda")
        y = torch.empty(4, 50, 64, device="cuda")
        for tensor in (*fake.parameters(), y):
            tape.hold(tensor, "parameters")
        tape.begin()
        with tape.inside("student forward"):
            loss = fake(y)
        with tape.backward():
            loss.backward()
    assert sum(tape.flops.values()) == count.get_total_flops()
    assert sum(tape.peak.values()) == pytest.approx(live.peak, rel=0.001)
    parts = {"student forward", "student forward backward", "student forward recomputation"}
    assert set(tape.flops) == parts
    # each block is made again up to the input of its last product
    assert tape.flops["student forward recomputation"] == 3 * 2 * 200 * 64 * 200
    weights = sum(p.numel() for p in net.parameters())
    assert tape.live["parameters"] == pytest.approx(4 * (weights + x.numel()), abs=512 * 7)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_has_the_rules_of_cuda(tape, low):
    """Of PyTorch's autocast operator reference."""
    x = torch.ones(8, 8, device="cuda", dtype=low)
    weight = nn.Parameter(torch.ones(8, 8, device="cuda"))
    functional = nn.functional
    with torch.autocast("cuda", low):
        assert functional.linear(x.float(), weight).dtype == (x @ weight).dtype == torch.mm(weight, x).dtype == low
        assert functional.layer_norm(x, (8,)).dtype == x.softmax(-1).dtype == x.pow(2).dtype == torch.float32
        assert x.sum().dtype == x.exp().dtype == functional.cross_entropy(x, x[:, 0].long()).dtype == torch.float32
        assert (x + x.float()).dtype == torch.float32 and (x * x).dtype == functional.silu(x).dtype == low
        assert functional.softmax(x, -1, dtype=torch.float64).dtype == torch.float64
        before = tape.operators.copy()
        functional.linear(x, weight)
        assert tape.operators - before == {"other": 1}  # the cast of its weight is kept
        with torch.autocast("cuda", enabled=False):
            assert functional.linear(x.float(), weight).dtype == torch.float32
    assert functional.linear(x.float(), weight).dtype == torch.float32


def test_attention_is_the_fused_one(tape):
    """No [T, T] on the way, forward and backward."""
    q, k, v = (torch.empty(1, 4, 4096, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    tape.begin()
    out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert out.shape == q.shape and out.grad_fn is not None
    out.sum().backward()
    assert sum(tape.peak.values()) < 4096 * 4096
    assert sum(tape.flops.values()) == (4 + 8) * 4 * 4096 * 4096 * 64


# ---- stages ----


def settings_of(folder, **changes):
    tree = runs.settings(folder, folder / "out", max_steps=1) | {
        "impl": "torch",
        "liger": False,
        "sft": {"start_from": "base"},
    }
    return tree | changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both models of the four families, configs alone."""
    folder = tmp_path_factory.mktemp("dry")
    for name in families.FAMILIES:
        families.save(folder / name / "teacher", name, hidden=48, layers=6, seed=1)
        families.save(folder / name / "student", name, hidden=32, layers=4, seed=2)
        for file in (folder / name).rglob("*.safetensors"):
            file.unlink()
    return folder


def found_of(folder, family, stage, overrides=(), **changes):
    path = runs.write_config(settings_of(folder / family, **changes), folder / f"{family}.yaml")
    config = load_config(path, dict(overrides))
    models = Models(config)
    return run_stage(config, models, stage, rows_that_fit(rows_of(config, models), config), H100)


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
@pytest.mark.parametrize(
    "stage", ["interact", *(pytest.param(name, marks=pytest.mark.slow) for name in ("verbalize", "sft"))]
)
def test_every_stage_goes_through(folder, family, stage):
    options = {"data.padding_free": "auto", "dtype": "bfloat16"}
    if families.FAMILIES[family].sparse_block is not None:
        options["sft.method"] = "lora"
    found = found_of(folder, family, stage, options)
    assert not found.problem, found.notes[-1]
    recurrent = family in families.RECURRENT  # tiny ones are all but linear attention, whose backward is not 2 forwards
    for part, flops in found.planned_flops.items():
        if part != "heads":  # impl torch multiplies more often
            assert found.flops[part] == pytest.approx(flops, rel=0.2 if recurrent else 0.02), part
    own = [place for place in found.waits if place.startswith(("vlsi_fast/", "vlsi_kernels/"))]
    assert not own


def test_full_training_and_normed_verbalizers_of_gemma3(folder):
    """A norm behind a layer's last product has it computed again; one in front of a verbalizer is trained, too."""
    options = {"data.padding_free": "auto", "dtype": "bfloat16", "training.gradient_checkpointing": True}
    for stage, more, part in (
        ("sft", {"sft.method": "full"}, "student recomputation"),
        ("verbalize", {"verbalizer.norm": True}, "teacher verbalizers"),
    ):
        found = found_of(folder, "gemma3", stage, options | more)
        assert not found.problem, found.notes[-1]
        assert found.flops[part] == pytest.approx(found.planned_flops[part], rel=0.02)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_interact_from_a_cache(folder, divergence):
    """No teacher: what it said comes with the rows (targets, or hidden states for Jensen-Shannon)."""
    options = {"data.padding_free": "auto", "dtype": "bfloat16", "teacher.mode": "cached"}
    found = found_of(folder, "qwen2_vl", "interact", options | {"interact.divergence": divergence})
    assert not found.problem, found.notes[-1]
    assert not any(part.startswith("teacher") for part in (*found.flops, *found.planned_flops))
    for part, flops in found.planned_flops.items():
        if part != "heads":
            assert found.flops[part] == pytest.approx(flops, rel=0.02), part
    head = found.planned_peak.get("teacher", 0)  # the teacher's, beside hidden states; storages are of 512 bytes
    assert found.peak.get("teacher", 0) == pytest.approx(head, abs=511) and bool(head) == (divergence == "jsd")
    # two micro-batches of two rows of 512 answers: five layers and the last, of 32 numbers and a float32, or of 48
    taught = 2 * 2 * 512 * 6 * (2 * 32 + 4 if divergence == "forward_kl" else 2 * 48)
    alone = found_of(folder, "qwen2_vl", "sft", options).peak["inputs"]  # the student's rows
    assert found.peak["inputs"] - alone == pytest.approx(taught, abs=8 * 512)


def test_what_slips_into_a_stage_is_caught(folder, monkeypatch):
    forward = SftModule.forward

    def reads(module, *args, **kwargs):
        out = forward(module, *args, **kwargs)
        out["loss"].item()
        return out

    def mixes(module, *args, **kwargs):
        out = forward(module, *args, **kwargs)
        return out | {"loss": out["loss"] * torch.ones(1)}

    line = reads.__code__.co_firstlineno + 2
    assert not any("test_dry_run" in place for place in found_of(folder, "qwen2_vl", "sft").waits)
    monkeypatch.setattr(SftModule, "forward", reads)
    assert found_of(folder, "qwen2_vl", "sft").waits[f"test_dry_run.py:{line} item"] == 1
    monkeypatch.setattr(SftModule, "forward", mixes)
    problem = found_of(folder, "qwen2_vl", "sft").problem
    assert "DeviceMixError" in problem and f"test_dry_run.py:{mixes.__code__.co_firstlineno + 2}" in problem


# ---- the command, in a process in which kernels are compiled ----


def check(*arguments):
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path}
    command = [sys.executable, "-m", "vlsi_fast", "check", "--dry-run", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def agree(report):
    for stage in report["stages"]:
        assert not stage["problem"], stage["notes"]
        assert not stage["memory_differs"], (stage["peak"], stage["planned_peak"])
        for part, flops in stage["planned_flops"].items():
            assert stage["flops"][part] == pytest.approx(flops, rel=0.02), (stage["stage"], part)
        for kernel in stage["kernels"]:
            assert kernel["count"] > 0 and kernel["registers"] > 0 and kernel["spill_bytes"] == 0, kernel
        assert not [place for place in stage["waits"] if place.startswith(("vlsi_fast/", "vlsi_kernels/"))]


def test_the_command(folder):
    """Every stage of a small config, with Triton's kernels, for a GPU of another kind."""
    pytest.importorskip("triton")
    tree = settings_of(folder / "qwen2_vl", impl="auto", dtype="bfloat16")
    done = check("--config", runs.write_config(tree, folder / "run.yaml"), "--gpu", "rtx4090", "--json")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert [stage["stage"] for stage in report["stages"]] == ["verbalize", "interact", "sft"]
    kernels = {kernel["kernel"] for stage in report["stages"] for kernel in stage["kernels"]}
    assert {"_gate_up_kernel", "softmax_tile_kernel", "pair_kl_kernel"} <= kernels
    assert report["gpu"]["capability"] == [8, 9] and "collectives" in report["not_proven"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, padding_free, language",
    [
        *((name, packed, "own") for name in ("qwen2vl_72b_to_7b", "qwen2vl_7b_to_2b") for packed in ("false", "auto")),
        ("qwen2vl_72b_to_7b", "auto", "student"),
    ],
)
def test_the_paper_at_its_real_sizes(name, padding_free, language):
    pytest.importorskip("triton")
    config = ROOT / "configs" / f"{name}.yaml"
    options = ("--data.padding_free", padding_free, "--verbalizer.language", language)
    done = check("--config", config, "--json", *options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads(done.stdout)
    agree(report)
    if padding_free == "auto":
        assert not any(stage["waits"] for stage in report["stages"])


def test_interpreted_kernels_are_told(folder, monkeypatch, capsys):
    from vlsi_fast.cli import main

    pytest.importorskip("triton")
    monkeypatch.setattr("vlsi_fast.planner.dry_run.kernels.interpreted", lambda: True)
    tree = settings_of(folder / "qwen2_vl", impl="triton")
    path = runs.write_config(tree, folder / "triton.yaml")
    with contextlib.suppress(SystemExit):
        assert main(["check", "--dry-run", "--config", str(path)]) == 1
    assert "unset" in capsys.readouterr().out
