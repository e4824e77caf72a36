"""What a stage does about its self-test: which parts it compares, what it switches off, what it refuses.

The CPU stands in for CUDA: `is_needed` says yes, and comparisons that a GPU would fail are put among the stage's.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_families
import tiny_runs as runs
import torch

from vlsi_fast import load_config, verbalizer
from vlsi_fast.backbones import FAMILIES
from vlsi_fast.cli import main
from vlsi_fast.planner.checks import device as device_check
from vlsi_fast.self_test import of_run, operators, start
from vlsi_fast.self_test.probe import Outcome, Probe
from vlsi_fast.self_test.start import SelfTestError, changed_config, over_ranks, switched_off
from vlsi_fast.stages import STAGE_CLASSES, stage

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LIGER = ("liger", "liger")
VARLEN = ("student.attn_implementation", "flash_varlen")


def config_of(workspace, output, **sections):
    tree = runs.settings(workspace, output, max_steps=1) | {"sft": {"start_from": "base"}} | sections
    return load_config(runs.write_config(tree, output.parent / f"{output.name}.yaml"))


def wrong(option, chosen, by=1.0):
    """A comparison that is off by so much, of what was chosen by an option."""
    inputs = lambda generator: {"x": torch.ones(3, device=generator.device)}  # noqa: E731
    return Probe(f"{chosen} of {option}", option, chosen, torch.float32, inputs, lambda x: x + by, lambda x: x, ("x",))


@pytest.fixture
def on_cuda(monkeypatch):
    """Stages compare as they do on CUDA; returns a list: further probes of the stage."""
    if torch.cuda.is_available():
        pytest.skip("the CPU stands in for CUDA")
    more, probes_of = [], of_run.probes_of
    monkeypatch.setattr(start, "is_needed", lambda device: True)
    monkeypatch.setattr(of_run, "probes_of", lambda *a, **options: [*probes_of(*a, **options), *more])
    return more


# ---- a stage ----


def test_the_record_tells_what_was_compared(workspace, tmp_path, on_cuda, capsys):
    record = STAGE_CLASSES["sft"](config_of(workspace, tmp_path / "run")).run()
    found = record["self_test"]
    assert found == json.loads((tmp_path / "run" / "sft" / "vlsi_stage.json").read_text())["self_test"]
    assert found["device"] == "cpu" and found["switched_off"] == {} and 0 <= found["seconds"] < 60
    names = [probe["name"] for probe in found["probes"]]
    assert names[0] == "linear_cross_entropy, width 32, trained head" and sum("sdpa" in name for name in names) == 2
    assert all(p["agrees"] and 0 < p["outputs"] < 1e-4 and p["dtype"] == "float32" for p in found["probes"])
    assert "auto is" not in capsys.readouterr().err


def test_a_run_on_the_cpu_or_without_preflight_compares_nothing(workspace, tmp_path, on_cuda, monkeypatch):
    on_cuda.append(wrong("impl", "torch"))  # would be refused
    record = STAGE_CLASSES["sft"](config_of(workspace, tmp_path / "past", preflight=False)).run()
    assert "self_test" not in record
    monkeypatch.undo()
    assert "self_test" not in STAGE_CLASSES["sft"](config_of(workspace, tmp_path / "cpu")).run()


def test_liger_that_disagrees_is_switched_off(workspace, tmp_path, on_cuda, monkeypatch, capsys):
    monkeypatch.setattr(stage, "use_liger", lambda asked, device: asked is not False)
    monkeypatch.setattr(stage, "apply_liger", None)  # is not called
    monkeypatch.setattr(of_run, "_of_liger", lambda *sizes: [wrong(*LIGER)])
    record = STAGE_CLASSES["sft"](config_of(workspace, tmp_path / "run")).run()
    assert record["self_test"]["switched_off"] == {"liger": False} and record["summary"]["liger"] == {}
    (probe,) = [probe for probe in record["self_test"]["probes"] if not probe["agrees"]]
    assert probe["name"] == "liger of liger" and probe["outputs"] == 0.5 and probe["gradients"] == 0.0
    said = capsys.readouterr().err
    assert "liger auto is false in this stage, since on cpu" in said and "output 0 is off by 5.0e-01" in said
    assert record["config"]["liger"] == "auto"  # what was asked for


def test_liger_that_disagrees_is_refused_where_it_was_asked_for(workspace, tmp_path, on_cuda, monkeypatch):
    monkeypatch.setattr(stage, "use_liger", lambda asked, device: asked is not False)
    monkeypatch.setattr(stage, "load_backbone", None)  # before any weight is loaded
    on_cuda.append(wrong(*LIGER))
    with pytest.raises(SelfTestError, match="liger is true: set it to auto or false, .*preflight: false goes past"):
        STAGE_CLASSES["sft"](config_of(workspace, tmp_path / "run", liger=True)).run()
    assert not (tmp_path / "run" / "sft" / "vlsi_stage.json").exists()


def test_triton_that_disagrees_is_switched_off_everywhere(workspace, tmp_path, on_cuda, monkeypatch):
    """In the losses, in new verbalizers and in those that are loaded."""
    used, options, initialise = [], stage.OperatorOptions, verbalizer._Block.__init__
    monkeypatch.setattr(
        stage, "OperatorOptions", lambda rows, impl, heads: used.append(("loss", impl)) or options(rows, impl, heads)
    )

    def initialised(self, *arguments):
        if torch.get_default_device().type != "meta":  # the planner's, for sizes alone
            used.append(("block", arguments[-1]))
        initialise(self, *arguments)

    monkeypatch.setattr(verbalizer._Block, "__init__", initialised)
    on_cuda.append(wrong("impl", "triton"))
    for name in ("verbalize", "interact"):
        record = STAGE_CLASSES[name](config_of(workspace, tmp_path / "run")).run()
        assert record["self_test"]["switched_off"] == {"impl": "torch"}
        assert set(used) == {("loss", "torch"), ("block", "torch")}
        used.clear()


def test_attention_that_disagrees_becomes_sdpa_and_rows_are_padded_again(workspace, tmp_path, on_cuda, monkeypatch):
    def attention_name(asked, *facts):
        return "flash_varlen" if asked == "auto" else asked

    monkeypatch.setattr(stage, "attention_name", attention_name)
    monkeypatch.setattr(of_run, "_of_attention", lambda *facts: [wrong(*VARLEN)])
    record = STAGE_CLASSES["sft"](config_of(workspace, tmp_path / "run")).run()
    assert record["self_test"]["switched_off"] == {"student.attn_implementation": "sdpa"}
    assert record["summary"]["attention"] == {"student": "sdpa"}
    assert record["summary"]["padding_free"] == {"student": False}
    (step,) = runs.metrics(tmp_path / "run", "sft")
    assert step["padding_share"] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_stage_on_cuda_finds_nothing_wrong(workspace, tmp_path, dtype):
    for name in ("verbalize", "interact"):
        record = STAGE_CLASSES[name](config_of(workspace, tmp_path / "run", dtype=dtype)).run()
        found = record["self_test"]
        assert found["device"] == torch.cuda.get_device_name() and found["switched_off"] == {}
        assert all(probe["agrees"] for probe in found["probes"]) and found["seconds"] < 120
        assert {p["chosen"] for p in found["probes"] if p["option"] == "impl"} == {"triton"}


# ---- the decision ----


def outcome(option="liger", chosen="liger", agrees=False, **more):
    return Outcome(f"a {chosen}", option, chosen, "bfloat16", agrees, **{"outputs": 0.1, "message": "off"} | more)


@pytest.mark.parametrize(
    "changes, found, said",
    [
        ({"liger": True}, outcome(), "liger is true: set it to auto or false"),
        ({"impl": "triton"}, outcome("impl", "triton"), "impl is triton: set it to auto or torch"),
        (
            {"teacher.attn_implementation": "flash_attention_2"},
            outcome("teacher.attn_implementation", "flash_attention_2"),
            "teacher.attn_implementation is flash_attention_2: set it to auto or sdpa",
        ),
        ({}, outcome("impl", "torch"), "It is PyTorch itself: look at the GPU, its driver"),
        ({"impl": "torch"}, outcome("impl", "torch"), "It is PyTorch itself"),
        ({}, outcome("student.attn_implementation", "sdpa"), "It is PyTorch itself"),
    ],
)
def test_what_was_asked_for_by_name_is_refused(workspace, tmp_path, changes, found, said):
    path = runs.write_config(runs.settings(workspace, tmp_path / "run"), tmp_path / "config.yaml")
    config = load_config(path, changes)
    assert switched_off(config, [dataclasses.replace(found, agrees=True)], "NVIDIA Z1") == {}
    with pytest.raises(SelfTestError, match=f"on NVIDIA Z1, a {found.chosen} \\(bfloat16\\) is not what") as caught:
        switched_off(config, [found], "NVIDIA Z1")
    assert said in str(caught.value) and said in caught.value.fix


def test_only_what_disagrees_changes(workspace, tmp_path):
    config = config_of(workspace, tmp_path / "run")
    found = [outcome("impl", "triton"), outcome("impl", "triton", True), outcome(agrees=True)]
    found.append(outcome("teacher.attn_implementation", "flash_attention_2"))
    changed = switched_off(config, found, "NVIDIA Z1")
    assert changed == {"impl": "torch", "teacher.attn_implementation": "sdpa"}
    after = changed_config(config, changed)
    assert after.impl == "torch" and after.teacher.attn_implementation == "sdpa" and after.liger == "auto"
    assert config.impl == config.teacher.attn_implementation == "auto"
    assert after.student == config.student and after.teacher.path == config.teacher.path


def test_ranks_agree_on_the_worst_of_them(monkeypatch):
    right = outcome(agrees=True, outputs=1e-4, gradients=1e-3, message="")
    there = [[right, outcome("impl", "triton", True)], [dataclasses.replace(right, outputs=2e-4)]]
    monkeypatch.setattr(start, "gathered_objects", lambda value: there)
    liger, triton = over_ranks(there[0])
    assert liger.agrees and (liger.outputs, liger.gradients, liger.message) == (2e-4, 1e-3, "")
    assert not triton.agrees and triton.message == "rank 1 has other packages and does not use it"
    there[1] = [outcome(agrees=False, outputs=None, message="RuntimeError: no"), there[0][1]]
    liger, triton = over_ranks(there[0])
    assert triton.agrees and not liger.agrees and liger.message == "rank 1: RuntimeError: no"
    assert liger.outputs == 1e-4  # of those that have a number


@pytest.mark.slow
def test_two_ranks_take_one_decision(tmp_path):
    """Rank 1's operator is wrong, and rank 0 goes on without it as well."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "26817"]
    script = Path(__file__).with_name("self_test_rank.py")
    command += [str(script), str(tmp_path)]
    done = subprocess.run(command, env=runs.environment(), capture_output=True, text=True, timeout=runs.LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["switched_off"] == second["switched_off"] == {"liger": False}
    assert first["probes"] == second["probes"] and "rank 1: output 0 is off" in first["probes"][0]["message"]
    assert done.stderr.count("liger auto is false in this stage") == 1


# ---- what a stage compares ----


WIDTHS = {"student": 32, "teacher": 48}


def names_of(config, stage_name, roles, family="qwen2_vl", impl="torch", liger=()):
    """Of all but the attention."""
    tokenizer = tiny_families.make_processor(family).tokenizer
    models = {role: tiny_families._config(family, WIDTHS[role], 2, False, tokenizer) for role in roles}
    probes = of_run.probes_of(
        config.model_copy(update={"impl": impl}),
        stage_name,
        models,
        device=CPU,
        attention=dict.fromkeys(roles, "eager"),
        liger=liger,
        widened=False,
    )
    assert len({(p.name, p.option, p.dtype) for p in probes}) == len(probes)
    return [probe.name for probe in probes]


@pytest.mark.parametrize(
    "sections, stage_name, roles, names",
    [
        (
            {},
            "verbalize",
            ("student", "teacher"),
            [
                "linear_cross_entropy, width 32",
                "linear_cross_entropy, width 48",
                "verb_ffn, width 32",
                "verb_ffn, width 48",
            ],
        ),
        (
            {"verbalize": {"objective": "both", "models": ["teacher"]}, "verbalizer": {"architecture": "mlp"}},
            "verbalize",
            ("teacher",),
            ["layer_kl_matrix, widths 48 and 48"],
        ),
        (
            {},
            "interact",
            ("student", "teacher"),
            ["layer_kl_matrix, widths 32 and 48", "verb_ffn, width 32", "verb_ffn, width 48"],
        ),
        (  # of a teacher on disk
            {},
            "interact",
            ("student",),
            ["layer_kl_matrix, widths 32 and 32", "verb_ffn, width 32"],
        ),
        (
            {"interact": {"divergence": "jsd", "intermediate": "none"}},
            "interact",
            ("student", "teacher"),
            ["linear_divergence (beta 0.5), widths 32 and 48"],
        ),
        (
            {"interact": {"intermediate": "ce", "last": "none"}},
            "interact",
            ("student",),
            ["linear_cross_entropy, width 32", "verb_ffn, width 32"],
        ),
        (
            {"interact": {"headless": True, "intermediate": "l2", "last": "none"}},
            "interact",
            ("student", "teacher"),
            ["verb_ffn, width 32 to 48", "verb_ffn, width 48"],
        ),
        ({}, "sft", ("student",), ["linear_cross_entropy, width 32, trained head"]),
        ({"sft": {"start_from": "base", "method": "lora"}}, "sft", ("student",), ["linear_cross_entropy, width 32"]),
    ],
)
def test_operators_that_a_stage_uses(workspace, tmp_path, sections, stage_name, roles, names):
    config = config_of(workspace, tmp_path / "run", **sections)
    found = names_of(config, stage_name, roles)
    assert [name.removesuffix(", 33 tokens") for name in found] == names
    assert names_of(config, stage_name, roles, impl="reference") == []


@pytest.mark.parametrize(
    "family, names",
    [
        ("qwen2_vl", ["Liger RMSNorm, width 32", "Liger SwiGLU, inner width 64"]),
        ("qwen3_vl", ["Liger RMSNorm, width 32", "Liger RMSNorm, width 16", "Liger SwiGLU, inner width 64"]),
        ("qwen3_vl_moe", ["Liger RMSNorm, width 32", "Liger RMSNorm, width 16"]),
        (
            "llava_onevision",
            ["Liger RMSNorm, width 32", "Liger SwiGLU, inner width 64", "Liger RoPE, 2 and 2 heads of width 16"],
        ),
        (
            "smolvlm",
            ["Liger RMSNorm, width 32", "Liger SwiGLU, inner width 64", "Liger RoPE, 2 and 2 heads of width 16"],
        ),
    ],
)
def test_liger_modules_that_a_stage_uses(workspace, tmp_path, family, names):
    """Those that `apply_liger` puts into the family's language model."""
    pytest.importorskip("liger_kernel")
    config = config_of(workspace, tmp_path / "run")
    assert names_of(config, "sft", ("student",), family, impl="reference", liger=("student",)) == names
    assert names_of(config, "sft", ("student",), family, impl="reference", liger=()) == []


@pytest.mark.parametrize("name, count", [("sdpa", 2), ("flash_varlen", 2), ("eager", 0), ("flex_attention", 0)])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_attention_that_a_stage_uses(family, name, count):
    model = tiny_families._config(family, 32, 2, False, tiny_families.make_processor(family).tokenizer)
    found = of_run._of_attention(name, "teacher", model, torch.float32) if of_run.backbone.is_known(name) else []
    assert len(found) == count and {probe.option for probe in found} <= {"teacher.attn_implementation"}
    width = 12 if family == "gemma3" else 16
    ours = (f"2 heads of width {width}, causal", "heads of width 8, of images")
    assert all(any(each in p.name for each in ours) for p in found), [p.name for p in found]


# ---- vlsi-fast check --device ----


def test_check_compares_on_this_device(workspace, tmp_path, monkeypatch, capsys):
    path = str(runs.write_config(runs.settings(workspace, tmp_path / "run"), tmp_path / "config.yaml"))
    command = ["check", "--config", path, "--rows", "2", "--json", "--device"]
    assert main(command) == 0
    lines = {line["name"]: line for line in json.loads(capsys.readouterr().out) if line["name"].startswith("device")}
    assert lines.keys() >= {"device", "device: layer_kl_matrix, widths 32 and 48"} and len(lines) > 8
    if not torch.cuda.is_available():
        assert (
            lines["device"]["detail"].startswith("cpu, torch") and "CUDA uses other parts" in lines["device"]["detail"]
        )
    assert all(line["status"] == "pass" for line in lines.values())

    kernel = operators.linear_cross_entropy
    monkeypatch.setattr(operators, "linear_cross_entropy", lambda *a, **options: 1.01 * kernel(*a, **options))
    assert main(command) == 1
    lines = [line for line in json.loads(capsys.readouterr().out) if line["status"] == "FAILURE"]
    assert {line["name"].partition(",")[0] for line in lines} == {"device: linear_cross_entropy"}
    assert "output 0 is off by" in lines[0]["detail"] and "PyTorch itself" in lines[0]["fix"]


def test_check_says_what_a_stage_would_switch_off(workspace, tmp_path, monkeypatch, capsys):
    path = str(runs.write_config(runs.settings(workspace, tmp_path / "run"), tmp_path / "config.yaml"))
    monkeypatch.setattr(of_run, "probes_of", lambda *a, **options: [wrong(*LIGER)])
    assert main(["check", "--config", path, "--rows", "2", "--json", "--device"]) == 0
    line = json.loads(capsys.readouterr().out)[-1]
    assert line["status"] == "notice" and "a stage would set liger to false" in line["detail"]
    assert main(["check", "--config", path, "--rows", "2", "--json", "--device", "--liger", "true"]) == 1
    line = json.loads(capsys.readouterr().out)[-1]
    assert line["status"] == "FAILURE" and ("need a CUDA device" in line["detail"] or "liger is true" in line["fix"])


def test_check_without_models_hides_nothing(workspace, tmp_path):
    config = config_of(workspace, tmp_path / "run")
    config = changed_config(config, {"teacher.path": str(tmp_path / "none")})
    (line,) = device_check.look_at_device(device_check.Subject(config))
    assert line.status == "not checked" and "teacher" in line.detail
