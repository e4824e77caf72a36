"""The planner on `teacher.mode: cached`: hand arithmetic, measured memory of a true step, and what the command says."""

import copy
import dataclasses
import json
import shutil
import sys

import live_bytes
import pytest
import tiny_demo
import tiny_runs as runs
import torch

from vlsi_fast.cli import main
from vlsi_fast.config import ConfigError, load_config
from vlsi_fast.planner.build import Models, setup_of, step_of
from vlsi_fast.planner.memory import Batch
from vlsi_fast.planner.rows import row_operations
from vlsi_fast.planner.speed import operations, traffic
from vlsi_fast.planner.walk import walk
from vlsi_fast.stages import STAGE_CLASSES
from vlsi_fast.stages.throughput import Throughput
from vlsi_fast.teacher_cache.build import Chosen, build
from vlsi_fast.teacher_cache.recalling import CachedTeacher

PAPER = runs.ROOT / "configs" / "qwen2vl_72b_to_7b.yaml"
ZERO3 = {"training.deepspeed": str(runs.ROOT / "configs" / "zero3.json")}


# ---- against measured memory ----


@pytest.fixture(scope="module")
def verbalized(tmp_path_factory):
    """A run of models a little larger than the demo's, stage verbalize done."""
    folder = tmp_path_factory.mktemp("cached")
    changes = {
        "output_dir": str(folder / "run"),
        "training.report_to": [],
        "training.deepspeed": None,
        "training.per_device_train_batch_size": 32,
        "verbalize.training.max_steps": 1,
        "interact.training.max_steps": 2,
        **tiny_demo.start(folder / "start"),
    }
    STAGE_CLASSES["verbalize"](load_config(runs.ROOT / "configs" / "demo.yaml", changes)).run()
    return folder, changes


CASES = {
    "float32": (Chosen(numbers="float32"), {}),
    "int8, two micro-batches": (
        Chosen(numbers="int8"),
        {"training.gradient_accumulation_steps": 2, "training.per_device_train_batch_size": 16},
    ),
    "hidden, Jensen-Shannon": (Chosen(form="hidden"), {"interact.divergence": "jsd"}),
}


@pytest.mark.parametrize("case", CASES)
def test_predicted_peak_is_within_a_tenth_of_the_measured(verbalized, monkeypatch, tmp_path, case):
    """One process, float32, stage interact from a cache; the teacher's folder is gone when it runs.

    As `test_planner.test_predicted_peak_is_within_a_tenth_of_the_measured`; nothing was fitted.
    """
    folder, changes = verbalized
    chosen, more = CASES[case]
    changes = changes | {"teacher.cache": str(tmp_path / "cache"), **more}
    config = load_config(runs.ROOT / "configs" / "demo.yaml", changes)
    build(config, dataclasses.replace(chosen, progress=False))
    shutil.copytree(folder / "run" / "verbalize", tmp_path / "run" / "verbalize")
    config = load_config(
        runs.ROOT / "configs" / "demo.yaml",
        changes | {"teacher.mode": "cached", "output_dir": str(tmp_path / "run"), "teacher.path": str(tmp_path / "no")},
    )
    measured = live_bytes.measure(config, "interact", monkeypatch)
    assert measured.peak > 1.2 * measured.start > 0
    ratio = live_bytes.predicted(config, "interact", measured).peak.total / measured.peak
    print(case, round(ratio, 3))
    assert abs(ratio - 1) < 0.1, ratio


# ---- by hand ----


@pytest.fixture(scope="module")
def paper():
    return Models(load_config(PAPER, ZERO3))


def cached(paper, stage="interact", batch=None, **changes):
    config = load_config(PAPER, {"teacher.mode": "cached", **ZERO3, **changes})
    models = copy.copy(paper)
    models.config = config
    return step_of(models, stage, setup_of(config, stage, 8), batch or (lambda shape: Batch(1, 1024, 64, 256 * 4)))


V, S, T = 152064, 3584, 8192


def test_a_step_from_a_cache_by_hand(paper):
    """72B teaching 7B, 64 answer tokens: 20 target layers and the last, of 3584 float16 numbers and a float32 each."""
    step = cached(paper)
    assert list(step.roles) == ["student"] and step.vocab == V and step.setup.window == 1
    curve, student = walk(step), sum(n for n in paper.shapes["student"].parameters)
    pixels = 4 * 1024 * 1176 + 8 * 3 * 1024
    assert curve.held["inputs"] == 16 * (pixels + 64 * 21 * (4 + 2 * S))  # all micro-batches of an optimizer step
    assert curve.largest["targets"] == 4 * 64 * (21 * (S + 1) + 8 * S)
    assert dict(curve.moments)["targets unpacked"] > 0 and curve.held.get("teacher", 0) == 0
    assert curve.held["targets"] == 0
    # vocabulary passes are the student's alone; its own forward and what ZeRO-3 moves of it are as with a teacher
    config = load_config(PAPER, ZERO3)
    live = step_of(paper, "interact", setup_of(config, "interact", 8), lambda shape: step.batches["student"])
    found, other = operations(step), operations(live)
    assert found.pop("heads") == 64 * V * 8 * 4 * S
    assert found == {name: value for name, value in other.items() if name.startswith("student")}
    assert "teacher gathers" not in traffic(step) and traffic(step)["student gathers"] >= 2 * 0.9 * student
    # verbalize has the teacher all the same
    assert list(cached(paper, "verbalize").roles) == ["student", "teacher"]
    assert cached(paper, "verbalize").setup.teacher_mode == "zero3"


def test_hidden_states_from_a_cache_by_hand(paper):
    """For Jensen-Shannon; the teacher's head is on every GPU, and the passes over both heads are as before."""
    step = cached(paper, **{"interact.divergence": "jsd"})
    curve = walk(step)
    pixels = 4 * 1024 * 1176 + 8 * 3 * 1024
    assert curve.held["inputs"] == 16 * (pixels + 64 * 21 * 2 * T)
    assert curve.held["teacher"] == 2 * V * T
    assert curve.largest["targets"] == 4 * 64 * 20 * (S + 1)  # those that drive the matching
    matching, pair = 20 * 2 * (T + S) + 7 * 2 * S, 4 * (T + S) + 4 * S
    assert operations(step)["heads"] == 64 * V * (matching + 8 * pair)


@pytest.mark.parametrize(
    "changes, layers, has_last",
    [
        ({"interact.last": "ce"}, 20, False),
        ({"interact.intermediate": "none"}, 0, True),
        ({"teacher.layers": [2, 30, 40, 50, 60, 70, 78]}, 7, True),
    ],
)
def test_layers_that_are_read(paper, changes, layers, has_last):
    config = load_config(PAPER, {"teacher.mode": "cached", **ZERO3, **changes})
    models = Models(config, configs=paper.configs)
    step = step_of(models, "interact", setup_of(config, "interact", 8), lambda shape: Batch(1, 64, 8, 0))
    assert (step.recalled.layers, step.recalled.has_last) == (layers, has_last)
    targets = 4 * 8 * (layers + has_last) * (S + 1)
    own = 4 * 8 * S * ((7 if layers else 0) + has_last)
    assert walk(step).largest["targets"] == targets + own


def test_a_run_that_no_cache_serves(paper):
    headless = {"interact.headless": True, "interact.intermediate": "l2", "interact.last": "none"}
    with pytest.raises(ConfigError, match=r"interact.headless .* set teacher.mode to auto"):
        cached(paper, **headless)
    assert cached(paper, **{"interact.intermediate": "ce", "interact.last": "ce"}).recalled is None


# ---- the command ----


def plan(capsys, *arguments):
    assert main(["plan", "--json", *map(str, arguments)]) in (0, 1)
    return json.loads(capsys.readouterr().out)


def test_what_a_cache_costs_by_hand(capsys):
    """2.9M rows of 128 answer tokens and 1536 in all, on 8 A100 at 0.45 of their peak."""
    zero3 = ["--training.deepspeed", ZERO3["training.deepspeed"]]
    found = plan(capsys, "--config", PAPER, *zero3)
    worth, modes = found["teacher_cache"], found["teacher_modes"]
    sizes = {(each["form"], each["numbers"]): each["bytes"] for each in worth["choices"]}
    tokens = 2_900_000 * 128
    assert worth["answer_tokens"] == tokens and worth["layers"] == 21
    assert sizes == {
        ("targets", "float32"): tokens * 21 * 4 * (S + 1),
        ("targets", "float16"): tokens * 21 * (4 + 2 * S),
        ("targets", "bfloat16"): tokens * 21 * (4 + 2 * S),
        ("targets", "int8"): tokens * 21 * (6 + S),
        ("hidden", "bfloat16"): tokens * 21 * 2 * T,
    }
    # to build it: the teacher's share of a pass, and its passes over the vocabulary
    flops = next(s for s in found["stages"] if s["stage"] == "interact")["flops_per_sample"]
    teacher = sum(value for name, value in flops.items() if name.startswith("teacher"))
    targets = teacher + 128 * V * 21 * 2 * (T + S)
    for choice, each in (("float16", targets), ("int8", targets)):
        built = next(c for c in worth["choices"] if (c["form"], c["numbers"]) == ("targets", choice))["build_days"]
        assert built[0] == pytest.approx(2_900_000 * each / (8 * 312e12 * 0.45) / 86400)
        assert built[1] > built[0]
    hidden = worth["choices"][-1]["build_days"][0]
    assert hidden == pytest.approx(2_900_000 * teacher / (8 * 312e12 * 0.45) / 86400)
    # nothing is done twice: building and one pass are as much work as one pass with the teacher, so two pay
    live, one = worth["teacher"]["days"][0], worth["days"][0]
    assert built[0] + one == pytest.approx(live, rel=1e-9) and worth["pays_from"] == [2, 2]
    assert worth["teacher"]["mode"] == "zero3" and worth["folder"] is None
    rows_a_second = 2_900_000 / (one * 86400)
    assert worth["read_bytes_per_second"] == pytest.approx(rows_a_second * 128 * 21 * (4 + 2 * S))
    # of the table of modes: verbalize has its teacher, interact none
    verbalize = next(s for s in found["stages"] if s["stage"] == "verbalize")
    alone = plan(capsys, "--config", PAPER, *zero3, "--teacher.mode", "cached")
    assert alone["teacher_mode"] == "cached" and alone["teacher_cache"]["days"] == worth["days"]
    interact = next(s for s in alone["stages"] if s["stage"] == "interact")
    assert modes["cached"]["peak_bytes"] == max(s["peak"]["total"] for s in (verbalize, interact))
    assert interact["peak"]["total"] < 0.4 * modes["zero3"]["peak_bytes"]
    assert "teacher gathers" not in interact["traffic_bytes_per_micro_batch"]


def test_when_it_pays():
    from vlsi_fast.planner.worth import passes

    assert passes(7.0, 9.0, 2.0) == 2  # 7 + 2 is not less than 9; 7 + 4 is less than 18
    assert passes(6.9, 9.0, 2.0) == 1
    assert passes(70.0, 9.0, 2.0) == 11 and passes(1.0, 2.0, 2.0) is None


def test_the_table(capsys):
    arguments = ["plan", "--config", str(PAPER), "--training.deepspeed", ZERO3["training.deepspeed"]]
    main([*arguments, "--samples", "100000", "--teacher.mode", "cached"])
    text = " ".join(capsys.readouterr().out.split())
    assert "cached (this plan)" in text and "cache of 0.1M rows, 21 layers" in text
    assert "pays from 2 passes on (epochs x students with this head)" in text and "of this plan" in text
    main([*arguments, "--interact.intermediate", "ce", "--interact.last", "ce", "--stages", '["interact"]'])
    assert "cache of" not in capsys.readouterr().out


def test_a_plan_from_a_cache_alone(verbalized, tmp_path, capsys):
    """The teacher's folder is gone: its config and the number of its layers are the cache's."""
    folder, changes = verbalized
    changes = changes | {"teacher.cache": str(tmp_path / "cache"), "stages": ["verbalize", "interact"]}
    config = load_config(runs.ROOT / "configs" / "demo.yaml", changes)
    build(config, Chosen(numbers="int8", layers=[1, 3, 4], rows=32, progress=False))
    tree = config.model_dump() | {"output_dir": str(tmp_path / "run")}
    tree["teacher"] |= {"mode": "cached", "path": str(tmp_path / "no"), "layers": None}
    tree |= {
        "stages": ["interact"],
        "student": tree["student"] | {"verbalizers": str(folder / "run/verbalize/student")},
    }
    path = runs.write_config(tree, tmp_path / "config.json")
    found = plan(capsys, "--config", path)
    assert found["parameters"]["teacher"] > found["parameters"]["student"]
    worth = found["teacher_cache"]
    assert (worth["folder"], worth["form"], worth["numbers"]) == (str(tmp_path / "cache"), "targets", "int8")
    assert worth["layers"] == 4 and worth["choices"][3]["row_bytes"] == 4 * (6 + 96) * found["rows"]["mean_answers"]
    here = load_config(path)
    step = step_of(Models(here), "interact", setup_of(here, "interact", 1), lambda s: Batch(1, 64, 8, 0))
    # 8 answer tokens: three layers of the cache and the last, the student's three and its last; 96 wide, float32
    assert walk(step).largest["targets"] == 4 * 8 * (4 * (96 + 1) + 4 * 96)
    here.teacher.layers = [1, 3, 4, 5]
    with pytest.raises(ConfigError, match="has teacher layers"):
        CachedTeacher(here)


def test_table_of_the_docs_is_what_the_script_prints():
    sys.path.insert(0, str(runs.ROOT / "benchmarks"))
    import teacher_modes

    page = teacher_modes.page()
    assert any(page.strip() in file.read_text() for file in (runs.ROOT / "docs").glob("*.md"))
    assert page.count("| `cached`, ") == 8


# ---- what else counts operations: balanced micro-batches and MFU, with the student alone at hand ----


@pytest.mark.parametrize("form", ["targets", "hidden"])
def test_rows_cost_what_the_student_does_and_its_heads(verbalized, tmp_path, form):
    """By hand from a step of the planner: tokens and patches are the student's, an answer token's head passes depend on
    whether the teacher's states still have to be read."""
    folder, changes = verbalized
    config = load_config(runs.ROOT / "configs" / "demo.yaml", changes | {"teacher.cache": str(tmp_path / "cache")})
    live = Models(config)
    build(config, Chosen(form=form, rows=32, progress=False))
    config = load_config(
        runs.ROOT / "configs" / "demo.yaml",
        changes | {"teacher.cache": str(tmp_path / "cache"), "teacher.mode": "cached", "teacher.path": "gone/away"},
    )
    student = {"student": live.configs["student"]}
    found, other = row_operations(config, "interact", student), row_operations(live.config, "interact", live.configs)
    assert list(found) == ["student"]
    for name in ("token", "token_pair", "patch", "patch_pair"):
        assert getattr(found["student"], name) == pytest.approx(getattr(other["student"], name))
    vocab, width, teacher = live.shapes["student"].vocab, 96, 192
    spared = 7 * 2 * vocab * (width + teacher)  # 2 V (d_l + d_s) for the six layers and the last
    expected = other["student"].answer - (spared if form == "targets" else 0)
    assert found["student"].answer == pytest.approx(expected, rel=1e-9)
    # MFU of a step of as many rows counts the same
    throughput = Throughput(config, "interact", student, 1, torch.device("cpu"))
    said = throughput.of(1.0, 4, 40, [400], [0])["tflops_per_rank"] * 1e12
    row = found["student"]
    assert said == pytest.approx(4 * (row.token * 100 + row.token_pair * 100**2 + row.answer * 10), rel=1e-6)
