"""verbalize.objective, interact.divergence and .intermediate_schedule, and `stages`: whole runs and their tools."""

import json
import math
import shutil

import pytest
import tiny_runs as runs
import torch
from safetensors.torch import load_file

from vlsi_fast import load_config, run
from vlsi_fast.cli import main
from vlsi_fast.config import ConfigError
from vlsi_fast.inspection.folders import inspect_folder
from vlsi_fast.lineage import LineageError, read_record, write_record
from vlsi_fast.loading import load_backbone
from vlsi_fast.runs import open_run
from vlsi_fast.verbalizer import read_spec


def config_of(workspace, output, training=None, **sections):
    tree = runs.settings(workspace, output, **(training or {}))
    for name, value in sections.items():
        tree[name] = tree.get(name, {}) | value if isinstance(value, dict) else value
    return load_config(runs.write_config(tree, output.parent / f"{output.name}.yaml"))


def start(workspace, output, stage="all", resume=False, training=None, **sections):
    return run(config_of(workspace, output, training, **sections), stage, resume)


@pytest.fixture(scope="module")
def verbalized(workspace, tmp_path_factory):
    """Objective -> a run's folder with its verbalize stage finished."""
    folder = tmp_path_factory.mktemp("verbalized")
    for objective in ("answers", "own_output", "both"):
        training = {"max_steps": 2}
        start(workspace, folder / objective, "verbalize", training=training, verbalize={"objective": objective})
    return {name: folder / name for name in ("answers", "own_output", "both")}


@pytest.fixture(scope="module")
def short(workspace, tmp_path_factory):
    """A run of verbalize and interact alone, told by `stages`."""
    output = tmp_path_factory.mktemp("short") / "run"
    data = {"eval": runs.settings(workspace, output)["data"]["train"]}
    records = start(workspace, output, stages=["verbalize", "interact"], data=data)
    assert list(records) == ["verbalize", "interact"] and not (output / "sft").exists()
    return output


# ---- verbalize.objective ----


def test_objectives_are_one_loss_and_their_sum(verbalized):
    """Before the first update all three have the same verbalizers and rows."""
    first = {name: runs.metrics(folder, "verbalize")[0] for name, folder in verbalized.items()}
    names = [name for name in first["answers"] if name.startswith("loss/")]
    assert len(names) == 8 and all(list(record)[3:11] == names for record in first.values())
    for name in names:
        assert first["both"][name] == pytest.approx(first["answers"][name] + first["own_output"][name], rel=1e-5)
    for folder in verbalized.values():
        found = runs.losses(folder, "verbalize")
        assert found[-1] < found[0]


def test_the_objective_is_recorded_but_not_compared(workspace, verbalized, tmp_path):
    """Verbalizers that learnt something else are still verbalizers of this model."""
    for objective, folder in verbalized.items():
        assert read_spec(folder / "verbalize" / "teacher").made_for["objective"] == objective
        assert read_record(folder / "verbalize")["config"]["verbalize"]["objective"] == objective
        assert inspect_folder(folder / "verbalize" / "student")["objective"] == objective
    folders = {"student": verbalized["own_output"], "teacher": verbalized["both"]}
    named = {role: {"verbalizers": str(folder / "verbalize" / role)} for role, folder in folders.items()}
    start(workspace, tmp_path / "run", training={"max_steps": 1}, stages=["interact"], **named)
    assert math.isfinite(runs.losses(tmp_path / "run", "interact")[0])


def test_another_objective_is_another_run(workspace, verbalized):
    steps = {"max_steps": 2}
    with pytest.raises(LineageError, match="verbalize.objective: there 'both', now 'own_output'"):
        start(workspace, verbalized["both"], "verbalize", True, steps, verbalize={"objective": "own_output"})
    with pytest.raises(LineageError, match="verbalize.objective: there None, now 'both'"):
        start(workspace, verbalized["answers"], "verbalize", True, steps, verbalize={"objective": "both"})


def test_records_from_before_these_options_go_on(verbalized, short, workspace, tmp_path):
    """None of them is in an older record, nor in what a run at their defaults compares."""
    output = shutil.copytree(verbalized["answers"], tmp_path / "run")
    record = read_record(output / "verbalize")
    assert not {"objective"} & record["identity"]["verbalize"].keys()
    del record["config"]["verbalize"]["objective"], record["config"]["stages"]
    write_record(output / "verbalize", record)
    assert open_run(output).config.stages == ["verbalize", "interact", "sft"]
    assert start(workspace, output, "verbalize", True, {"max_steps": 2})["verbalize"]["state"] == "finished"
    identity = read_record(short / "interact")["identity"]["interact"]
    assert not {"divergence", "jsd_beta", "intermediate_schedule"} & identity.keys()
    assert "intermediate_weight" in identity


@pytest.mark.parametrize(
    "sections",
    [
        {"verbalize": {"objective": "both"}, "verbalizer": {"architecture": "decoder", "norm": True}},
        {"verbalize": {"objective": "own_output", "models": ["student"]}, "dtype": "bfloat16"},
    ],
    ids=["decoder", "bfloat16"],
)
def test_own_output_with_other_settings(workspace, tmp_path, sections):
    start(workspace, tmp_path / "run", "verbalize", training={"max_steps": 1}, **sections)
    assert all(map(math.isfinite, runs.losses(tmp_path / "run", "verbalize")))


# ---- interact.divergence ----


@pytest.mark.parametrize("divergence, dtype", [("reverse_kl", "float32"), ("jsd", "bfloat16")])
def test_divergences_train(workspace, short, tmp_path, divergence, dtype):
    shutil.copytree(short / "verbalize", tmp_path / "run" / "verbalize")
    start(workspace, tmp_path / "run", "interact", interact={"divergence": divergence}, dtype=dtype)
    found, forward = runs.metrics(tmp_path / "run", "interact"), runs.metrics(short, "interact")
    assert found[0]["matches"] == forward[0]["matches"]  # and the matrix of forward KLs at the first step
    tolerance = {"float32": 1e-6, "bfloat16": 5e-2}[dtype]
    assert found[0]["kl"] == [pytest.approx(row, rel=tolerance) for row in forward[0]["kl"]]
    assert not any(a["loss"] == pytest.approx(b["loss"], rel=1e-4) for a, b in zip(found, forward))
    assert all(math.isfinite(record["loss"]) and record["loss"] > 0 for record in found)


# ---- interact.intermediate_schedule ----


def test_schedule_in_a_run_and_after_resuming(workspace, short, tmp_path):
    """Two micro-batches a step: the step counts, not they. A run resumed in the middle is the straight one."""
    interact = {"intermediate_schedule": "cosine", "intermediate_weight": 0.5}
    options = {"interact": interact, "training": {"save_steps": 1}}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    shutil.copytree(short / "verbalize", straight / "verbalize")
    start(workspace, straight, "interact", **options)
    weights = [record["intermediate_weight"] for record in runs.metrics(straight, "interact")]
    assert weights == pytest.approx([0.25 * (1 + math.cos(math.pi * step / 3)) for step in range(3)], abs=1e-12)
    assert [record["intermediate_weight"] for record in runs.metrics(short, "interact")] == [1.0] * 3
    shutil.copytree(straight, resumed)
    shutil.rmtree(resumed / "interact" / "adapter")
    runs.rewind(resumed / "interact", 2)  # checkpoints of steps 2 and 3 were kept
    start(workspace, resumed, "interact", True, **options)
    assert [r["intermediate_weight"] for r in runs.metrics(resumed, "interact")] == weights
    assert runs.losses(resumed, "interact") == runs.losses(straight, "interact")
    folders = [folder / "interact" / "adapter" for folder in (straight, resumed)]
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert all(torch.equal(a[name], b[name]) for name in a)
    # the parts of the loss are weighed: at the first step both runs have the same models and matches
    first, whole = (runs.metrics(folder, "interact")[0] for folder in (straight, short))
    assert first["loss/student_layer_2"] == pytest.approx(0.5 * whole["loss/student_layer_2"], rel=1e-6)
    assert first["loss/last"] == pytest.approx(whole["loss/last"], rel=1e-6)


# ---- stages ----


def test_a_run_without_sft_is_read_by_every_tool(workspace, short, tmp_path, capsys):
    found = open_run(short)
    assert found.student == short / "interact" / "student" and found.last_stage == "interact"
    seen = inspect_folder(short)
    assert seen["next"] == "all stages are finished: vlsi-fast export" and not seen["problems"]
    assert seen["settings"]["stages"] == ["verbalize", "interact"]
    assert main(["inspect", str(short)]) == 0 and "planned" not in capsys.readouterr().out
    question = ["--question", "What is it?", "--max-new-tokens", "2", "--image", str(workspace / "images" / "3.png")]
    assert main(["verbalize", "--run", str(short), "--json", *question]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [model["checkpoint"] for model in said["models"]][1] == str(short / "interact" / "student")
    assert main(["eval", "--run", str(short), "--limit", "2", "--max-new-tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"][str(short)]["path"] == str(short / "interact" / "student")
    page = tmp_path / "report.html"
    assert main(["report", str(short), "--out", str(page), "--samples", "1"]) == 0
    text = page.read_text()
    assert "is missing" not in text and '-interact"' in text and '-sft"' not in text


def test_export_of_a_run_without_sft(short, tmp_path):
    summary = {"questions": 9, "teacher_accuracy": 0.9, "student_before_accuracy": 0.1, "student_after_accuracy": 0.5}
    shutil.copytree(short, tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    assert main(["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    exported, trained = (load_backbone(f, "float32") for f in (tmp_path / "out", short / "interact" / "student"))
    for (name, a), b in zip(exported.state_dict().items(), trained.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    card = (tmp_path / "out" / "README.md").read_text()
    assert "kld at target layers, kld at the last layer" in card and "| sft |" not in card
    assert "50.00" in card  # the run's own scores are of its last student


def test_cards_say_the_objective_and_the_divergence():
    from vlsi_fast.export.card import _what

    config = {"lora": {"rank": 8, "alpha": 8}, "verbalize": {"models": ["student"], "objective": "both"}}
    assert "KL from the model's own last layer" in _what({"stage": "verbalize", "config": config})
    interact = {"intermediate": "kld", "last": "ce", "divergence": "jsd", "jsd_beta": 0.3}
    config["interact"] = interact | {"intermediate_schedule": "cosine"}
    said = _what({"stage": "interact", "config": config})
    assert said.endswith("jsd (beta 0.3) at target layers (fading out, cosine), ce at the last layer")


def test_interact_and_sft_without_verbalizers(workspace, tmp_path):
    interact = {"intermediate": "none"}
    records = start(
        workspace, tmp_path / "run", stages=["interact", "sft"], interact=interact, training={"max_steps": 1}
    )
    assert list(records) == ["interact", "sft"] and not (tmp_path / "run" / "verbalize").exists()
    assert records["interact"]["identity"]["data_start"] == 0 and records["sft"]["identity"]["data_start"] == 4
    assert "intermediate_weight" not in runs.metrics(tmp_path / "run", "interact")[0]
    assert open_run(tmp_path / "run").student == tmp_path / "run" / "sft" / "student"
    assert inspect_folder(tmp_path / "run")["next"].startswith("all stages are finished")


def test_a_stage_that_was_run_by_name_counts(workspace, short, tmp_path):
    """`stages` says what `all` runs; sft run on top of it makes the student, and is what goes on if it was cut off."""
    output = shutil.copytree(short, tmp_path / "run")
    records = start(workspace, output, stages=["verbalize", "interact"], resume=True)
    assert all(record["state"] == "finished" for record in records.values())
    start(workspace, output, "sft", stages=["verbalize", "interact"], training={"max_steps": 1})
    assert open_run(output).student == output / "sft" / "student"
    write_record(output / "sft", read_record(output / "sft") | {"state": "running"})
    assert inspect_folder(output)["next"].startswith("--stage sft --resume")
    assert open_run(output).student == output / "interact" / "student"


def test_inspect_says_which_listed_stage_is_next(verbalized, tmp_path):
    output = shutil.copytree(verbalized["answers"], tmp_path / "run")
    assert inspect_folder(output)["next"] == "--stage interact"
    record = read_record(output / "verbalize")
    cases = ((["verbalize"], "other runs may take its verbalizers"), (["verbalize", "sft"], "--stage sft"))
    for stages, wanted in cases:
        record["config"]["stages"] = stages
        write_record(output / "verbalize", record)
        assert wanted in inspect_folder(output)["next"]


def test_plan_and_check_look_at_the_listed_stages(workspace, tmp_path, capsys, monkeypatch):
    from vlsi_fast.planner.checks import machine

    seen, count = [], machine.checkpoint_bytes
    monkeypatch.setattr(machine, "checkpoint_bytes", lambda subject: seen.append(count(subject)) or seen[-1])
    tree = runs.settings(workspace, tmp_path / "run") | {"stages": ["verbalize", "interact"]}
    path = str(runs.write_config(tree, tmp_path / "config.yaml"))
    assert main(["plan", "--config", path, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [stage["stage"] for stage in plan["stages"]] == ["verbalize", "interact"]
    needs = []
    for stages in ("[verbalize]", "[verbalize, interact]", "[verbalize, interact, sft]"):
        main(["check", "--config", path, "--json", "--rows", "1", "--stages", stages])
        needs.append(seen[-1])
        assert json.loads(capsys.readouterr().out)
    assert needs == sorted(set(needs)) and len(needs) == 3


# ---- bad input ----


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stages": []}, "stages must name some of verbalize, interact, sft, once each, in this order"),
        ({"stages": ["interact", "interact"]}, "once each"),
        ({"stages": ["sft", "interact"]}, "in this order; got"),
        ({"stages": ["verbalise"]}, "stages.0"),
        ({"stages": ["verbalize", "sft"]}, "add interact, or set sft.start_from to base"),
        (
            {"stages": ["interact", "sft"]},
            r"add verbalize, name trained ones \(student.verbalizers, teacher.verbalizers\)",
        ),
        ({"stages": ["interact"], "interact.intermediate": "ce"}, r"name trained ones \(student.verbalizers\)"),
        ({"verbalize.objective": "own"}, "verbalize.objective"),
        ({"interact.divergence": "kl"}, "interact.divergence"),
        (
            {"interact.divergence": "jsd", "interact.intermediate": "ce", "interact.last": "l2"},
            "neither interact.interm",
        ),
        ({"interact.jsd_beta": 0.3}, "interact.jsd_beta belongs to interact.divergence jsd"),
        ({"interact.divergence": "jsd", "interact.jsd_beta": 1.0}, "interact.jsd_beta"),
        ({"interact.intermediate_schedule": "linear", "interact.last": "none"}, "needs both interact.intermediate and"),
        (
            {"interact.intermediate_schedule": "linear", "interact.intermediate": "none"},
            "needs both interact.intermediate",
        ),
    ],
    ids=str,
)
def test_bad_options_name_the_fix(workspace, tmp_path, changes, message):
    path = runs.write_config(runs.settings(workspace, tmp_path / "run"), tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=message):
        load_config(path, changes)


def test_good_lists_of_stages(workspace, tmp_path):
    path = runs.write_config(runs.settings(workspace, tmp_path / "run"), tmp_path / "config.yaml")
    for changes in (
        {"stages": ["sft"], "sft.start_from": "base"},
        {"stages": ["verbalize", "interact", "sft"], "sft.start_from": "base"},  # the control beside the run
        {"stages": ["interact"], "interact.intermediate": "none"},
        {"stages": ["interact"], "interact.intermediate": "l2", "interact.headless": True},
        {"stages": ["interact"], "student.verbalizers": "a", "teacher.verbalizers": "b"},
    ):
        assert load_config(path, changes).stages == changes["stages"]
    assert load_config(path, ["--stages", "[verbalize, interact]"]).stages == ["verbalize", "interact"]
