"""Rows of a step in balanced micro-batches or without padding, through the Trainer: the same loss, less padding."""

import json

import pytest
import tiny_families as families
import tiny_runs as runs
import torch
from PIL import Image

from vlsi_fast import load_config, run
from vlsi_fast.config import ConfigError
from vlsi_fast.lineage import read_record
from vlsi_fast.loading import load_backbone
from vlsi_fast.stages.trainer import StageTrainer

PAIR = {"teacher": "llava_onevision", "student": "qwen3_vl"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pair across families, and rows of very different lengths with one, several and no images."""
    folder = tmp_path_factory.mktemp("batches")
    families.save(folder / "teacher", PAIR["teacher"], hidden=48, layers=6, seed=1)
    families.save(folder / "student", PAIR["student"], hidden=32, layers=4, seed=2, tied=True)
    path = runs.make_rows(folder)
    rows = [json.loads(line) for line in path.read_text().splitlines()][:24]
    for i, row in enumerate(rows):
        row["messages"][0]["content"] += " Tell me more." * (5 * i % 7)
        if i % 5 == 3:
            row["images"] *= 2
            row["messages"][0]["content"] = "<image>" + row["messages"][0]["content"]
        elif i % 5 == 4:
            row.pop("images")
            row["messages"][0]["content"] = "What?"
    image = Image.open(folder / rows[0]["images"][0]).resize((64, 20))
    image.save(folder / rows[0]["images"][0])
    path.write_text("\n".join(map(json.dumps, rows)))
    return folder


def start(folder, output, stage, /, data=None, resume=False, **training):
    tree = runs.settings(folder, output, gradient_accumulation_steps=4, max_steps=2, gradient_checkpointing=True)
    tree |= {"sft": {"start_from": "base"}, "interact": {"intermediate": "none", "last": "kld"}}
    tree["data"] |= data or {}
    tree["training"] |= training
    return run(load_config(runs.write_config(tree, output.parent / f"{output.name}.yaml")), stage, resume=resume)


def weights(output):
    return dict(load_backbone(output / "sft" / "student", "float32").named_parameters())


# ---- padding_free ----


def test_padding_free_changes_no_loss(folder, tmp_path, capsys):
    """Both models of a pair across families; with sdpa, whose mask is the square of the tokens, as is said."""
    for name, asked in (("padded", "auto"), ("packed", True)):
        start(folder, tmp_path / name, "interact", {"padding_free": asked})
    assert capsys.readouterr().err.count("the student's attention mask has the square") == 1
    padded, packed = (runs.metrics(tmp_path / name, "interact") for name in ("padded", "packed"))
    for one, other in zip(padded, packed, strict=True):
        assert other["padding_share"] == 0 < one["padding_share"] < 1
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-5)
        assert [one[n] for n in ("answer_tokens", "rows")] == [other[n] for n in ("answer_tokens", "rows")]
    for name, packs in (("padded", False), ("packed", True)):
        summary = read_record(tmp_path / name / "interact")["summary"]
        assert summary["padding_free"] == {"student": packs, "teacher": packs}


def test_an_attention_that_cannot_is_named_before_weights_are_loaded(folder, tmp_path):
    tree = runs.settings(folder, tmp_path / "run")
    tree["student"]["attn_implementation"] = "paged|sdpa"
    tree["data"]["padding_free"] = True
    config = load_config(runs.write_config(tree, tmp_path / "run.yaml"))
    with pytest.raises(ConfigError, match="data.padding_free is true, but paged.sdpa is not known"):
        run(config, "verbalize")


# ---- balance_batch ----


class Killed(Exception):
    pass


@pytest.fixture
def read(monkeypatch):
    """[(step, ids of a micro-batch's rows, its positions)] of all that goes through the Trainer."""
    seen, compute = [], StageTrainer.compute_loss

    def noted(trainer, model, inputs, **options):
        facts = inputs["facts"]
        seen.append((trainer.state.global_step, tuple(facts["ids"]), facts["positions"]))
        return compute(trainer, model, inputs, **options)

    monkeypatch.setattr(StageTrainer, "compute_loss", noted)
    return seen


def by_step(read):
    steps = {}
    for step, ids, _ in read:
        steps.setdefault(step, []).extend(ids)
    return {step: sorted(ids) for step, ids in steps.items()}


def test_balanced_steps_have_the_same_rows_and_losses(folder, tmp_path, monkeypatch, read):
    """sft, 3 steps of 8 of 24 rows: padded; and packed, from a worker, killed in the third step and resumed."""
    options = dict(lr_scheduler_type="constant", max_steps=3)
    start(folder, tmp_path / "plain", "sft", **options)
    rows = by_step(read)
    options |= dict(balance_batch=True, save_steps=1)
    finish = StageTrainer._finish_step

    def killed(trainer):
        if trainer.state.global_step == 2:
            raise Killed
        finish(trainer)

    read.clear()
    start(folder, tmp_path / "padded", "sft", **options)
    assert by_step(read) == rows
    read.clear()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(StageTrainer, "_finish_step", killed)
        start(folder, tmp_path / "packed", "sft", {"padding_free": True, "num_workers": 1}, **options)
    assert by_step(read) == rows
    unfinished = [each for each in read if each[0] == 2]
    read.clear()
    start(folder, tmp_path / "packed", "sft", {"padding_free": True}, resume=True, **options)
    assert read == unfinished and len(read) == 4, "the same micro-batches in the same order"
    plain, before = runs.metrics(tmp_path / "plain", "sft"), weights(tmp_path / "plain")
    for name in ("padded", "packed"):
        balanced, after = runs.metrics(tmp_path / name, "sft"), weights(tmp_path / name)
        for one, other in zip(plain, balanced, strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert [one[n] for n in ("answer_tokens", "rows")] == [other[n] for n in ("answer_tokens", "rows")]
        assert sum(r["padding_share"] for r in balanced) < 0.5 * sum(r["padding_share"] for r in plain)
        for each, value in before.items():
            torch.testing.assert_close(after[each], value, rtol=1e-3, atol=2e-4, msg=each)
    # neither option makes it another run
    options["balance_batch"] = False
    assert start(folder, tmp_path / "packed", "sft", resume=True, **options)["sft"]["state"] == "finished"


@pytest.mark.slow
def test_two_balanced_ranks_equal_one_process(folder, tmp_path):
    """Losses and sampled matches: the same micro-batches have the same draws."""
    trees = {}
    for name, accumulation in (("one", 4), ("two", 2)):
        tree = runs.settings(
            folder, tmp_path / name, gradient_accumulation_steps=accumulation, balance_batch=True, max_steps=3
        )
        tree["matching"] = {"strategy": "multinomial"}
        tree["stages"] = ["verbalize", "interact"]
        trees[name] = runs.write_config(tree, tmp_path / f"{name}.yaml")
    run(load_config(trees["one"]), "verbalize")
    run(load_config(trees["one"]), "interact")
    jobs = [("verbalize", trees["two"]), ("interact", trees["two"])]
    runs.train_several("--fresh", *jobs, launcher="torchrun")
    for stage in ("verbalize", "interact"):
        one, two = (runs.metrics(tmp_path / name, stage) for name in ("one", "two"))
        for a, b in zip(one, two, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=2e-5)
            assert a["rows"] == b["rows"] and a["answer_tokens"] == b["answer_tokens"]
            assert a.get("matches") == b.get("matches") and ("matches" in a) == (stage == "interact")


def test_grouping_by_length_names_its_successor(folder, tmp_path):
    tree = runs.settings(folder, tmp_path / "run", group_by_length=True)
    with pytest.raises(ConfigError, match="training: group_by_length is no more: set balance_batch"):
        load_config(runs.write_config(tree, tmp_path / "run.yaml"))
    tree["training"]["group_by_length"] = False  # as records of older runs have it
    assert not load_config(runs.write_config(tree, tmp_path / "run.yaml")).training.balance_batch
