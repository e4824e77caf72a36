"""Rows of a step in other micro-batches or without padding, through the Trainer: the same loss, less padding."""

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
from vlsi_fast.stages.batches import LengthGroups, UncollatedRows, to_device
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


# ---- group_by_length ----


class Killed(Exception):
    pass


def test_grouped_rows_give_the_same_steps_with_less_padding(folder, tmp_path, monkeypatch):
    """Same losses and weights in sft, 3 steps of 8 of 24 rows; from a worker, killed in the third step and resumed."""
    options = dict(lr_scheduler_type="constant", max_steps=3)
    start(folder, tmp_path / "plain", "sft", **options)
    finish = StageTrainer._finish_step

    def killed(trainer):
        if trainer.state.global_step == 2:
            raise Killed
        finish(trainer)

    options |= dict(group_by_length=True, save_steps=1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(StageTrainer, "_finish_step", killed)
        start(folder, tmp_path / "grouped", "sft", {"num_workers": 1}, **options)
    start(folder, tmp_path / "grouped", "sft", resume=True, **options)
    plain, grouped = (runs.metrics(tmp_path / name, "sft") for name in ("plain", "grouped"))
    for one, other in zip(plain, grouped, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["padding_share"] < one["padding_share"]
    assert sum(r["padding_share"] for r in grouped) < 0.7 * sum(r["padding_share"] for r in plain)
    before, after = weights(tmp_path / "plain"), weights(tmp_path / "grouped")
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-3, atol=2e-4, msg=name)
    # neither option makes it another run
    options["group_by_length"] = False
    records = start(folder, tmp_path / "grouped", "sft", {"padding_free": True}, resume=True, **options)
    assert records["sft"]["state"] == "finished"


def test_longest_first_and_stable():
    """Ties keep their order; every micro-batch keeps its size, the last and smaller one too."""
    lengths = [[3, 9, 5], [9, 2, 5], [5]]
    parts = [
        UncollatedRows([{"id": f"{i}{j}", "student": {"input_ids": torch.zeros(1, n)}} for j, n in enumerate(part)])
        for i, part in enumerate(lengths)
    ]
    parts = iter([*parts, "of the next step"])
    groups = LengthGroups(lambda rows: [row["id"] for row in rows], ("student",))
    assert list(groups(parts, 3, torch.device("cpu"))) == [["01", "10", "02"], ["12", "20", "00"], ["11"]]
    assert next(parts) == "of the next step"


def test_tensors_of_both_models_stay_shared_on_the_way():
    shared = {"input_ids": torch.arange(3)[None]}
    (row,) = UncollatedRows([{"student": shared, "teacher": shared}]).rows()
    assert row["student"] is row["teacher"] and row["student"]["input_ids"].tolist() == [[0, 1, 2]]


def test_grouped_batches_reach_the_device(monkeypatch):
    """Pinned first; what is no tensor stays."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t) or t)
    batch = {"batch": {"a": [torch.ones(2), 3]}, "facts": {"ids": ["x"], "n": 4}}
    moved = to_device(batch, torch.device("meta"))
    assert moved["batch"]["a"][0].device.type == "meta" and len(pinned) == 1
    assert moved["batch"]["a"][1] == 3 and moved["facts"] == batch["facts"]
    assert to_device(batch, torch.device("cpu")) is batch


@pytest.mark.parametrize(
    "sections, message",
    [
        ({"training": {"gradient_accumulation_steps": 1}}, "changes nothing where gradient_accumulation_steps is 1"),
        ({"sft": {"training": {"per_device_train_batch_size": 1}}}, "changes nothing where per_device_train_batch"),
        ({"data": {"padding_free": True}}, "no padding that training.group_by_length could save; remove one"),
    ],
)
def test_grouping_that_could_do_nothing_is_refused(folder, tmp_path, sections, message):
    tree = runs.settings(folder, tmp_path / "run", group_by_length=True)
    for name, values in sections.items():
        tree[name] = tree.get(name, {}) | values
    with pytest.raises(ConfigError, match=message):
        load_config(runs.write_config(tree, tmp_path / "run.yaml"))
