"""What a run with translating verbalizers costs, by hand and against its own modules on a device that is not there."""

import dataclasses
import math

import pytest
import tiny_families as families
import tiny_runs as runs

from vlsi_fast import load_config
from vlsi_fast.planner.build import Models, setup_of, step_of
from vlsi_fast.planner.dry_run.gpus import GPUS
from vlsi_fast.planner.dry_run.rows import rows_that_fit
from vlsi_fast.planner.dry_run.run import run_stage
from vlsi_fast.planner.loss_memory import head_bytes, read_heads
from vlsi_fast.planner.memory import Batch, held
from vlsi_fast.planner.placement import pcie_bytes
from vlsi_fast.planner.recalled import recalled_of
from vlsi_fast.planner.report import rows_of
from vlsi_fast.planner.speed import operations, traffic
from vlsi_fast.planner.walk import walk
from vlsi_fast.planner.worth import build_step

PAPER = runs.ROOT / "configs" / "qwen2vl_72b_to_7b.yaml"
D, S, V, N = 8192, 3584, 152064, 64
"""Widths of teacher and student, rows of either head, answer tokens; 20 and 7 target layers."""
SIZE = 2 * S * D + S * S + S * D
"""Parameters of a verb-FFN that translates: gate and up, down, and the linear map."""


def step_at(stage, ranks=8, setup=None, **changes):
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    config = load_config(PAPER, {"verbalizer.language": "student"} | changes)
    models = Models(config)
    setup = dataclasses.replace(setup_of(config, stage, ranks), **(setup or {}))
    return step_of(models, stage, setup, lambda shape: Batch(1, 1024, N, 256 * 4)), models


def test_operations_by_hand():
    """DESIGN: 4 N V d_s a teacher layer. The last one is among them in verbalize as well."""
    step, models = step_at("interact")
    found = operations(step)
    assert found["heads"] == pytest.approx(N * V * (21 * 4 * S + 8 * 4 * S))
    assert found["teacher verbalizers"] == pytest.approx(2 * N * 21 * SIZE)
    step, _ = step_at("verbalize")
    found = operations(step)
    assert found["heads"] == pytest.approx(N * V * 4 * S * (21 + 7))
    # forward and the weights' gradients; the gate's and up's reach them through down
    assert found["teacher verbalizers"] == pytest.approx(N * 21 * (4 * SIZE + 2 * S * S))
    assert [spoken.shape.depth for spoken in step.roles.values()] == [26, 80]  # the teacher's last layer speaks, too
    alone, _ = step_at("verbalize", verbalize__models=["teacher"])
    assert operations(alone)["heads"] == pytest.approx(N * V * 4 * S * 21)
    last, _ = step_at("interact", interact__intermediate="none")
    assert operations(last)["heads"] == pytest.approx(N * V * (4 * S + 4 * S))
    assert operations(last)["teacher verbalizers"] == pytest.approx(2 * N * SIZE)
    jsd, _ = step_at("interact", interact__divergence="jsd")
    matching, pair = 20 * 4 * S + 7 * 2 * S, 2 * 4 * S + 4 * S
    assert operations(jsd)["heads"] == pytest.approx(N * V * (matching + 8 * pair))
    built = build_step(
        models, setup_of(models.config, "interact", 8), lambda _: step.batches["teacher"], recalled_of(models), "zero3"
    )
    assert operations(built)["heads"] == pytest.approx(N * V * 21 * 4 * S)


def test_held_by_hand():
    """Eight ranks of ZeRO-3: the teacher without its head, 21 verbalizers, a copy of the student's norm, and of its
    head where the student is not there."""
    step, models = step_at("interact")
    teacher, norm = models.shapes["teacher"], 2 * S
    assert not teacher.tied and teacher.ends.count(V * D) == 2
    backbone = sum(math.ceil(n / 8) for n in teacher.parameters) - V * D // 8
    verbalizers = 21 * sum(math.ceil(n / 8) for n in (S * D, S * D, S * S, S * D))
    found = held(step.roles, step.setup, step.batches)
    assert found["teacher"] == 2 * (backbone + verbalizers) + norm
    step, _ = step_at("interact", interact__intermediate="none")  # those of the other layers come with the last one's
    assert held(step.roles, step.setup, step.batches)["teacher"] == 2 * (backbone + verbalizers) + norm
    step, _ = step_at("verbalize")
    assert held(step.roles, step.setup, step.batches)["teacher"] == 2 * backbone + norm
    step, _ = step_at("verbalize", verbalize__models=["teacher"])
    assert held(step.roles, step.setup, step.batches)["teacher"] == 2 * backbone + norm + 2 * V * S


@pytest.mark.parametrize("mode", ["replicated", "int8", "nf4"])
def test_a_whole_teacher_has_no_head(mode):
    """2.5 GB less on each GPU than through its own."""
    found = []
    for language in ("own", "student"):
        step, _ = step_at("interact", setup={"teacher_mode": mode}, verbalizer__language=language)
        verbalizers = sum(math.ceil(n / 8) for layer in step.roles["teacher"].verbalizers for n in layer)
        found.append(held(step.roles, step.setup, step.batches)["teacher"] - 2 * verbalizers)
    assert found[0] - found[1] == 2 * V * D - 2 * S and 2 * V * D / 1e9 == pytest.approx(2.49, abs=0.005)


def test_an_offloaded_teacher_has_no_head_on_the_gpu():
    own, there = (
        step_at("interact", 1, {"teacher_mode": "offload", "zero": None}, verbalizer__language=language)[0]
        for language in ("own", "student")
    )
    bytes_ = [held(s.roles, s.setup, s.batches)["teacher"] for s in (own, there)]
    verbalizers = [2 * sum(map(sum, s.roles["teacher"].verbalizers)) for s in (own, there)]
    assert bytes_[0] - verbalizers[0] == 2 * D + 2 * V * D and bytes_[1] - verbalizers[1] == 2 * D + 2 * S
    copied = [pcie_bytes(s.roles["teacher"].shape, "offload", 2, 1, False, 0) for s in (own, there)]
    assert copied[0] == copied[1] == 2 * (73_405_560_320 - D - V * D)  # its own never visited the GPU with a layer


def test_both_speak_through_one_head():
    """It is gathered once where one loss compares the two, and for each of two losses in verbalize."""
    step, _ = step_at("interact", setup={"persist_heads": False})
    assert read_heads(step) == {"student": True}
    assert head_bytes(step, "student", "teacher") == {"gathered": 2 * V * S, "workspace": 0}
    teacher = step.roles["teacher"]
    gathered = sum(n for n in (*teacher.shape.parameters, *map(sum, teacher.verbalizers)) if n > 100_000)
    assert traffic(step)["teacher gathers"] == 2 * gathered
    found, kept = (step_at("verbalize", setup={"persist_heads": keep})[0] for keep in (False, True))
    alone, _ = step_at("verbalize", setup={"persist_heads": False}, verbalize__models=["student"])
    assert traffic(found)["student gathers"] - traffic(alone)["student gathers"] >= 2 * V * S
    assert read_heads(kept) == {"student": True} and head_bytes(kept, *kept.roles)["gathered"] == 2 * V * S
    assert traffic(found)["student gathers"] - traffic(kept)["student gathers"] == 2 * V * S * (2 - 1 / 16)
    lone, _ = step_at("verbalize", setup={"persist_heads": True}, verbalize__models=["teacher"])
    assert head_bytes(lone, "teacher") == {"gathered": 0, "workspace": 2 * V * S}  # a whole one, and its copy


def test_hidden_states_and_targets_by_hand():
    """Of width d_s: the targets of all pairs, and what a window keeps for other divergences."""
    step, _ = step_at("interact")
    assert walk(step).largest["targets"] == 4 * N * (21 * (S + 1) + 8 * S)
    jsd, _ = step_at("interact", setup={"window": 4}, interact__divergence="jsd")
    assert walk(jsd).largest["targets"] == 4 * 4 * N * 20 * (S + 1) + 4 * 2 * N * 21 * S
    spoken = step.roles["teacher"]
    assert spoken.recorded(step.batches["teacher"]) == 21 * N and not spoken.takes_last


def test_a_cache_of_translated_states():
    """Targets of d_s as ever; hidden states are of d_s, too, and the student's head reads them."""
    for divergence, width in (("forward_kl", S + 1), ("jsd", S)):
        step, models = step_at("interact", teacher__mode="cached", interact__divergence=divergence)
        found = step.recalled
        assert (found.read, found.kept, found.width, found.head) == (21, 21, S, 0)
        assert step.vocab == V and "teacher" not in held(step.roles, step.setup, step.batches)
        assert found.has_states == (divergence == "jsd")
        own = recalled_of(Models(load_config(PAPER, {"interact.divergence": "jsd"})))
        assert (own.width, own.head) == (D, V * D)
        assert found.as_form("hidden", "bfloat16").token_bytes(1) == 2 * S and width


# ---- the dry run ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both models, configs alone."""
    folder = tmp_path_factory.mktemp("dry")
    families.save(folder / "teacher", "qwen2_vl", hidden=48, layers=6, seed=1)
    families.save(folder / "student", "qwen2_vl", hidden=32, layers=4, seed=2)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return folder


@pytest.mark.parametrize(
    "stage, options",
    [
        ("verbalize", {}),
        ("verbalize", {"verbalize.models": ["teacher"], "verbalizer.architecture": "ffn"}),
        ("verbalize", {"verbalizer.architecture": "verb_ffn_x2"}),
        ("interact", {}),
        ("interact", {"interact.intermediate": "none"}),
        ("interact", {"interact.last": "ce", "interact.divergence": "jsd"}),
        ("interact", {"teacher.mode": "cached", "interact.divergence": "jsd"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())) or "default",
)
def test_the_stages_own_modules_agree(folder, stage, options):
    """Operations within 2%; that no part counts what is not there."""
    tree = runs.settings(folder, folder / "out", max_steps=1) | {"impl": "torch", "liger": False}
    path = runs.write_config(tree, folder / "run.yaml")
    fixed = {"data.padding_free": "auto", "dtype": "bfloat16", "verbalizer.language": "student"}
    config = load_config(path, fixed | options)
    models = Models(config)
    found = run_stage(config, models, stage, rows_that_fit(rows_of(config, models), config), GPUS["h100"])
    assert not found.problem, found.notes[-1]
    assert {part for part in found.flops if part.startswith("teacher")} == {
        part for part in found.planned_flops if part.startswith("teacher")
    }
    for part, flops in found.planned_flops.items():
        factor = 1.5 if part == "heads" else 1  # impl torch multiplies more often
        assert found.flops[part] == pytest.approx(flops * factor, rel=0.12 if part == "heads" else 0.02), part
    if stage == "verbalize":  # the student's head, whole, where it is not there; storages are of 512 bytes
        assert found.peak["teacher"] == pytest.approx(found.planned_peak["teacher"], abs=512 * 100)
    assert not [place for place in found.waits if place.startswith(("vlsi_fast/", "vlsi_kernels/"))]
