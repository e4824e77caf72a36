"""A teacher whose layers speak the student's language, in everything around the stages: how it is held, its cache,
checks, and what one can look at."""

import json
import shutil

import pytest
import tiny_families
import tiny_runs as runs
import torch
from safetensors.torch import load_file

from vlsi_fast import load_config, run
from vlsi_fast.backbones import family_of
from vlsi_fast.cli import main
from vlsi_fast.config import ConfigError
from vlsi_fast.data.dataset import VlsiDataset
from vlsi_fast.data.processors import load_processor
from vlsi_fast.data.sources import build_source
from vlsi_fast.planner.checks import command
from vlsi_fast.planner.checks.device import probes_of
from vlsi_fast.planner.checks.subject import FAILURE, PASS, Subject
from vlsi_fast.report import samples
from vlsi_fast.runs import open_run
from vlsi_fast.speech import open_speaker
from vlsi_fast.stages import STAGE_CLASSES
from vlsi_fast.stages import stage as stages
from vlsi_fast.teacher_cache.build import Chosen, build
from vlsi_fast.teacher_cache.checking import check
from vlsi_fast.teacher_cache.manifest import HEAD, read_manifest
from vlsi_fast.teacher_cache.verifying import problems_of
from vlsi_fast.viewer.columns import hear, sources_of

STEPS = ("loss", "kl", "matches", "loss/last", "rows", "answer_tokens")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`run`: all three stages, the teacher verbalized and in the job. `live`: interact with the same verbalizers.
    `exact` and `hidden`: the teacher's caches."""
    folder = tmp_path_factory.mktemp("translated")
    runs.make_models(folder)
    runs.make_rows(folder, 16)
    config = config_of(folder, folder / "run")
    for stage in ("verbalize", "interact", "sft"):
        run(config, stage)
    config = config_of(folder, folder / "live")
    run(config, "interact")
    build(config, Chosen(folder / "exact", numbers="float32", progress=False))
    build(config, Chosen(folder / "hidden", form="hidden", progress=False))
    return folder


def config_of(folder, output, **sections):
    tree = runs.settings(folder, output, max_steps=2) | {"matching": {}, "verbalizer": {"language": "student"}}
    if output.name != "run":
        for role in ("student", "teacher"):
            tree[role]["verbalizers"] = str(folder / "run" / "verbalize" / role)
    for name, value in sections.items():
        tree[name] = tree.get(name, {}) | value if isinstance(value, dict) else value
    return load_config(runs.write_config(tree, output.parent / f"{output.name}.json"))


# ---- the teacher's own head ----


@pytest.mark.parametrize("mode", ["replicated", "offload"])
@pytest.mark.parametrize("tied", [False, True])
def test_its_own_head_is_let_go_of(tmp_path, mode, tied):
    from types import SimpleNamespace

    from vlsi_fast.teacher import load_teacher

    tiny_families.save(tmp_path / "teacher", "qwen2_vl", hidden=48, layers=2, seed=1, tied=tied)
    args = SimpleNamespace(device=torch.device("cpu"), deepspeed=None)
    own, there = (
        load_teacher(tmp_path / "teacher", mode, "float32", "sdpa", None, args, has_head) for has_head in (True, False)
    )
    head = family_of(own.model.config).head(own.model).weight.numel()
    sizes = [sum(p.numel() for p in held.model.parameters()) for held in (own, there)]
    shared = tied and mode == "replicated"  # offloaded, the embedding has left the head behind
    assert sizes[0] - sizes[1] == (0 if shared else head) and there.head_weight is None and own.head_weight is not None
    inputs = {"input_ids": torch.randint(0, 250, (1, 5)), "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    with torch.no_grad():
        assert torch.equal(own.run(inputs), there.run(inputs))


def test_stages_load_it_without(folder, tmp_path, monkeypatch):
    found, load = [], stages.load_teacher

    def kept(*arguments):
        found.append(load(*arguments))
        return found[-1]

    monkeypatch.setattr(stages, "load_teacher", kept)
    run(config_of(folder, tmp_path / "again"), "interact")
    own = {"verbalizer": {"language": "own"}, "verbalize": {"models": ["teacher"]}, "teacher": {"verbalizers": None}}
    run(config_of(folder, tmp_path / "own", **own), "verbalize")
    assert [each.head_weight is None for each in found] == [True, False]


# ---- its cache ----


@pytest.mark.parametrize("cache", ["exact", "hidden"])
def test_a_cached_run_is_the_live_one_to_the_last_bit(folder, tmp_path, cache):
    output = tmp_path / "cached"
    run(config_of(folder, output, teacher={"mode": "cached", "cache": str(folder / cache)}), "interact")
    live, cached = (
        [[record.get(name) for name in STEPS] for record in runs.metrics(where, "interact")]
        for where in (folder / "live", output)
    )
    assert live == cached
    one, other = (load_file(p / "interact" / "student" / "model.safetensors") for p in (folder / "live", output))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert not (folder / cache / HEAD).exists() and not list(problems_of(folder / cache))


def test_the_last_layer_alone(folder, tmp_path):
    """No target layer speaks, and the last one does through a verbalizer: the cache and the record know its stage."""
    alone = {"intermediate": "none"}
    live = config_of(folder, tmp_path / "live", interact=alone)
    run(live, "interact")
    build(live, Chosen(tmp_path / "cache", numbers="float32", progress=False))
    assert read_manifest(tmp_path / "cache")["identity"]["teacher"]["verbalizers"] is not None
    cached = {"mode": "cached", "cache": str(tmp_path / "cache")}
    run(config_of(folder, tmp_path / "cached", interact=alone, teacher=cached), "interact")
    assert runs.losses(tmp_path / "live", "interact") == runs.losses(tmp_path / "cached", "interact")
    shutil.copytree(folder / "run", tmp_path / "whole")
    path = tmp_path / "whole" / "interact" / "vlsi_stage.json"
    record = json.loads(path.read_text())
    for language, expected in (("student", ["verbalize", "interact", "sft"]), ("own", ["interact", "sft"])):
        record["config"]["interact"] |= alone
        record["config"]["verbalizer"]["language"] = language
        path.write_text(json.dumps(record))
        assert open_run(tmp_path / "whole").stages_behind("sft") == expected


def test_another_language_or_student_is_refused(folder, tmp_path):
    for cache in ("exact", "hidden"):
        cached = {"mode": "cached", "cache": str(folder / cache)}
        with pytest.raises(ConfigError, match="verbalizer.language: student in the cache, own in this run"):
            run(config_of(folder, tmp_path / cache, teacher=cached, verbalizer={"language": "own"}), "interact")
    runs.make_models(tmp_path)
    student = {"path": str(tmp_path / "student"), "verbalizers": str(folder / "run" / "verbalize" / "student")}
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "student")
    model.lm_head.weight.data.mul_(1.01)
    model.save_pretrained(tmp_path / "student")
    for cache in ("exact", "hidden"):
        cached = {"mode": "cached", "cache": str(folder / cache)}
        with pytest.raises(ConfigError, match="the student's language head"):
            run(config_of(folder, tmp_path / f"other_{cache}", teacher=cached, student=student), "interact")


def test_the_commands(folder, tmp_path, capsys):
    path = tmp_path / "checked.json"
    for cache in ("exact", "hidden"):
        config = config_of(folder, tmp_path / "checked", teacher={"mode": "cached", "cache": str(folder / cache)})
        found = check(config, 4)
        assert found["passed"] and found["rows"] == 4 and found["self_kl"] < 1e-5
        assert {r.name: r.status for r in command.look(Subject(config, ("interact",)))}[command.CACHE] == PASS
    assert main(["inspect", str(folder / "hidden")]) == 0
    said = capsys.readouterr().out
    assert "student's head" in said and "there, the same" in said and path.is_file()


# ---- checks before a run ----


def other_tokenizer(folder):
    """The teacher's with two ordinary tokens swapped."""
    file = folder / "teacher" / "tokenizer.json"
    tree = json.loads(file.read_text())
    vocab = tree["model"]["vocab"]
    one, other = list(vocab)[300:302]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    file.write_text(json.dumps(tree))


def test_checks(folder, tmp_path):
    for role in ("student", "teacher"):
        shutil.copytree(folder / role, tmp_path / role)
    shutil.copy(folder / "rows.jsonl", tmp_path)
    shutil.copytree(folder / "images", tmp_path / "images")
    other_tokenizer(tmp_path)

    def looked(language):
        config = config_of(tmp_path, tmp_path / "run", verbalizer={"language": language})
        return {r.name: r for r in command.look(Subject(config, rows=4))}

    own, translated = looked("own"), looked("student")
    assert own["tokenizers"].status == FAILURE and "verbalizer.language to student" in own["tokenizers"].fix
    assert "set verbalizer.language to student" in own["tokenizers"].detail
    assert translated["tokenizers"].status == PASS, translated["tokenizers"].detail
    assert not [r for r in translated.values() if r.status == FAILURE]
    count = len(json.loads((folder / "teacher" / "tokenizer.json").read_text())["model"]["vocab"])
    assert (
        f"{count} of the student's" in translated["tokenizers"].detail
        or "tokens are also" in translated["tokenizers"].detail
    )
    assert "x 32 random head" in translated["KL self-check"].detail and "x 48" in own["KL self-check"].detail
    assert "rows of the student's" in translated["head rows"].detail
    assert (
        "state for 100% of" in translated["answer alignment"].detail and "state" not in own["answer alignment"].detail
    )


def test_the_check_tells_how_many_tokens_are_taught(folder, tmp_path):
    """A student of shorter tokens than its teacher's: as many as training itself leaves in the labels."""
    for name in ("student", "teacher", "images"):
        shutil.copytree(folder / name, tmp_path / name)
    shutil.copy(folder / "rows.jsonl", tmp_path)
    file = tmp_path / "student" / "tokenizer.json"
    tree = json.loads(file.read_text())
    tree["model"]["merges"] = tree["model"]["merges"][: len(tree["model"]["merges"]) // 8]
    file.write_text(json.dumps(tree))
    other_tokenizer(tmp_path)
    config = config_of(tmp_path, tmp_path / "run")
    found = {r.name: r for r in command.look(Subject(config, rows=16))}
    processors = {role: load_processor(tmp_path / role) for role in ("student", "teacher")}
    dataset = VlsiDataset(build_source(config.data.train), processors, config.data, translated=True)
    rows = [dataset[i] for i in range(16)]
    whole, left_out = (sum(counts) for counts in zip(*(((r["whole"] != -100).sum(), r["unaligned"]) for r in rows)))
    assert 0 < left_out < whole
    assert f"state for {100 * (1 - left_out / whole):.0f}% of" in found["answer alignment"].detail
    assert "with a state of the teacher's" in found["chat templates"].detail


def test_probes_have_the_widths_that_run(folder, tmp_path):
    def names(stage, **sections):
        config = config_of(folder, tmp_path / "run", **{"impl": "torch", "liger": False} | sections)
        found = probes_of(Subject(config, (stage,)), torch.device("cpu"))
        return {probe.name.removesuffix(", 33 tokens") for probe in found if probe.option == "impl"}

    assert names("verbalize") == {"linear_cross_entropy, width 32", "verb_ffn, width 32", "verb_ffn, width 48 to 32"}
    assert names("verbalize", verbalize={"models": ["teacher"]}) == {
        "linear_cross_entropy, width 32",
        "verb_ffn, width 48 to 32",
    }
    assert names("interact") == {"layer_kl_matrix, widths 32 and 32", "verb_ffn, width 32", "verb_ffn, width 48 to 32"}
    alone = {"intermediate": "none"}
    assert names("interact", interact=alone) == {"layer_kl_matrix, widths 32 and 32", "verb_ffn, width 48 to 32"}
    twice = {"architecture": "verb_ffn_x2", "language": "student"}
    assert names("interact", verbalizer=twice, interact=alone) >= {"verb_ffn, width 48", "verb_ffn, width 48 to 32"}


# ---- what one can look at ----


def test_its_layers_cannot_be_heard_in_its_own_tokens(folder):
    with pytest.raises(ValueError, match="speak the student's tokens.*leave them out"):
        open_speaker(folder / "teacher", folder / "run" / "verbalize" / "teacher")
    found = open_run(folder / "run")
    sources = sources_of(found, ["base", "teacher"])
    assert [source.verbalizers is None for source in sources] == [False, False, True]
    assert "verbalizer.language student" in sources[2].note
    image = folder / "images" / "3.png"
    columns = hear(found, sources, [image], "what is this?", max_new_tokens=3)
    assert [[speech.layer for speech in column.speeches] for column in columns] == [[1, 2, 3, None]] * 2 + [[None]]
    with pytest.raises(ValueError, match="teacher: no verbalizers for layers .2.*cannot read back"):
        hear(found, sources[2:], [image], "what is this?", layers={"teacher": [2]})
    with pytest.raises(ConfigError, match="no verbalizers of"):
        sources_of(found, [str(folder / "teacher")])


def test_the_viewer_and_the_report(folder, capsys):
    image = str(folder / "images" / "3.png")
    asked = [
        "verbalize",
        "--run",
        str(folder / "run"),
        "--image",
        image,
        "--question",
        "what?",
        "--max-new-tokens",
        "2",
    ]
    assert main([*asked, "--compare", "base", "teacher", "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert models[2]["verbalizers"] is None and [layer["layer"] for layer in models[2]["layers"]] == [None]
    found = samples.what_layers_say(open_run(folder / "run"), 1, 2)
    (row,) = found["rows"]
    assert [len(column["cells"]) for column in row["columns"]] == [4, 4, 1]
    assert found["reason"].startswith("teacher: its layers speak the student's tokens")


def test_inspect_report_and_export(folder, tmp_path, capsys):
    assert main(["inspect", str(folder / "run" / "verbalize" / "teacher")]) == 0
    said = capsys.readouterr().out
    assert "the student's (checkpoint" in said and "width 32" in said
    assert main(["report", str(folder / "run"), "--samples", "1", "--out", str(tmp_path / "page.html")]) == 0
    assert "cannot read back" in (tmp_path / "page.html").read_text()
    assert main(["export", "--run", str(folder / "run"), "--out", str(tmp_path / "out")]) == 0
    assert "language student" in (tmp_path / "out" / "README.md").read_text()


def test_a_stage_that_only_listens_to_the_student_left_nothing_of_it(folder, tmp_path, capsys):
    config = config_of(folder, tmp_path / "run", verbalize={"models": ["teacher"]})
    STAGE_CLASSES["verbalize"](config).run()
    assert (tmp_path / "run" / "verbalize" / "teacher").is_dir()
    assert not (tmp_path / "run" / "verbalize" / "student").exists()
    assert main(["inspect", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
