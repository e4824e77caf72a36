"""Evaluation while training: numbers against stock models, training left alone, the best kept, an early end."""

import json
import os
import re
import shutil
import signal
import time
import types

import pytest
import tiny_runs as runs
import torch
from safetensors.torch import load_file
from test_stages import start
from transformers import Qwen2VLForConditionalGeneration

from vlsi_fast import load_config, run
from vlsi_fast.config import ConfigError
from vlsi_fast.data.encoding import IGNORED
from vlsi_fast.data.processors import load_processor
from vlsi_fast.errors import StoppedEarly
from vlsi_fast.evaluation.scoring import exact_match
from vlsi_fast.inspection.stages import inspect_stage
from vlsi_fast.lineage import LineageError, read_record, rows_used
from vlsi_fast.planner.checks.machine import checkpoint_bytes
from vlsi_fast.planner.checks.subject import Subject
from vlsi_fast.ranks.watch import watch
from vlsi_fast.report.page import build_page
from vlsi_fast.runs import open_run
from vlsi_fast.stages import evaluating, trainer
from vlsi_fast.stages.evaluating import Evaluation, last_answers, likeliest_tokens
from vlsi_fast.stages.leaving import Leaving

SFT = {"start_from": "base"}
CONSTANT = {"lr_scheduler_type": "constant"}


def data_of(workspace, limit=7) -> dict:
    return {"eval": [{"reader": "messages", "path": str(workspace / "rows.jsonl"), "limit": limit}]}


def evaluations(output, stage="sft") -> list[dict]:
    path = output / stage / "eval.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def values(output, stage="sft") -> list[dict]:
    """Evaluations without their times."""
    return [{k: v for k, v in record.items() if k != "runtime"} for record in evaluations(output, stage)]


def checkpoints(output) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (output / "sft").glob("checkpoint-*"))


def weights(output) -> dict:
    return load_file(output / "sft" / "student" / "model.safetensors")


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def planned(monkeypatch, losses: dict[int, float]) -> None:
    """Evaluations that find these losses, by the optimizer step, instead of the model's."""

    def run(self, model):
        return {"loss": losses[int(re.search(r"step (\d+)", watch.place)[1])], "rows": 1}

    monkeypatch.setattr(Evaluation, "run", run)


# ---- the numbers ----


@pytest.fixture(scope="module")
def learnt(workspace, tmp_path_factory):
    """A student that has learnt some rows, and was evaluated on these and others."""
    output = tmp_path_factory.mktemp("learnt") / "run"
    training = {"max_steps": 40, "eval_steps": 40, "learning_rate": 3e-3, "gradient_accumulation_steps": 1}
    data = {"train": [{"reader": "messages", "path": str(workspace / "rows.jsonl"), "limit": 6}]}
    start(
        workspace,
        output,
        "sft",
        training=training | {"save_minutes": None},
        sft=SFT,
        data=data | data_of(workspace, 11),
    )
    return output


def test_exact_match_is_that_of_generated_answers(learnt, workspace):
    (found,) = evaluations(learnt)
    data = load_config(learnt.parent / "run.yaml").data
    scored = exact_match(learnt / "sft" / "student", data, batch_size=4)
    assert found["rows"] == scored["rows"] == 11
    assert found["exact_match"] == scored["accuracy"] and 0 < found["exact_match"] < 1


def test_the_loss_is_that_of_the_stock_model_row_by_row(learnt):
    (found,) = evaluations(learnt)
    folder = learnt / "sft" / "student"
    model, processor = Qwen2VLForConditionalGeneration.from_pretrained(folder), load_processor(folder)
    from vlsi_fast.data.dataset import VlsiDataset
    from vlsi_fast.data.sources import build_source

    data = load_config(learnt.parent / "run.yaml").data
    total, count = 0.0, 0
    for row in VlsiDataset(build_source(data.eval), {"student": processor}, data):
        inputs = dict(row["student"])
        tokens = int((inputs["labels"][:, 1:] != IGNORED).sum())
        with torch.no_grad():
            total += float(model(**inputs).loss) * tokens
        count += tokens
    assert found["answer_tokens"] == count and found["step"] == 40
    assert found["loss"] == found["loss/answer"] == pytest.approx(total / count, rel=1e-5)


def test_the_last_answer_of_a_row_is_found():
    labels = [torch.tensor([[-100, -100, 5, 6, -100, -100, 7, 8, -100]]), torch.tensor([[9, -100, 3]])]
    rows = [{"student": {"labels": each}} for each in labels]
    assert last_answers(rows).tolist() == [-1, -1, 0, 0, 1]  # no position predicts a row's first token


def test_the_last_answer_of_an_aligned_row_is_not_the_last_run_of_its_labels():
    whole = torch.tensor([[-100, 5, 6, -100, 7, 8, 9, -100]])
    labels = torch.tensor([[-100, 5, -100, -100, 7, -100, 9, -100]])
    assert last_answers([{"student": {"labels": labels}, "whole": whole}]).tolist() == [-1, 0, 0]


def test_the_likeliest_token_is_the_first_of_equal_ones(monkeypatch):
    monkeypatch.setattr(evaluating, "CHUNK", 4)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(50, 8, generator=generator), torch.randn(11, 8, generator=generator)
    weight[[9, 10]] = weight[[2, 8]]  # across chunks
    assert torch.equal(likeliest_tokens(hidden, weight), (hidden @ weight.T).argmax(1))
    assert likeliest_tokens(hidden[:0], weight).shape == (0,)


def test_rows_that_cannot_be_used_are_left_out(workspace, tmp_path, monkeypatch):
    lines = (workspace / "rows.jsonl").read_text().splitlines()
    bad = json.dumps(json.loads(lines[0]) | {"images": ["images/none.png"]})
    sources = {"whole": lines[:4], "holes": [lines[0], bad, lines[1], lines[2], bad, bad, lines[3], bad]}
    found = {}
    for name, rows in sources.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(rows) + "\n")
        data = {"eval": [{"reader": "messages", "path": str(path), "image_root": str(workspace)}]}
        training = {"max_steps": 1, "eval_steps": 1}
        start(workspace, tmp_path / name, "sft", training=training, sft=SFT, data=data)
        (found[name],) = evaluations(tmp_path / name)
    assert (found["holes"]["rows"], found["holes"]["skipped_rows"]) == (4, 4)
    for name in ("rows", "answer_tokens", "exact_match"):
        assert found["holes"][name] == found["whole"][name]
    assert found["holes"]["loss"] == pytest.approx(found["whole"]["loss"], rel=1e-6)
    assert not (tmp_path / "holes" / "sft" / "skipped_rows.jsonl").exists()  # that lists rows of data.train


def test_samples_are_taken_from_all_of_the_rows():
    def batches(samples, batch_size=2):
        options = {"batch_size": batch_size, "samples": samples, "seed": 0, "workers": 0, "device": torch.device("cpu")}
        return Evaluation(torch.nn.Module(), range(10), None, **options).batches

    assert batches(4) == [[0, 2], [5, 7]] and batches(99, 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


# ---- training is left alone ----


def test_evaluations_change_nothing_of_the_training(workspace, tmp_path, monkeypatch):
    """With dropout, so that random numbers are drawn; and interact's evaluation gives the same when made again."""
    once = Evaluation.run

    def twice(self, model):
        mode = self.module.training
        found, again = once(self, model), once(self, model)
        assert found == again and self.module.training == mode
        return found

    monkeypatch.setattr(Evaluation, "run", twice)
    lora = {"rank": 8, "alpha": 8, "dropout": 0.2}
    for name, training in (("with", {"eval_steps": 2}), ("without", {})):
        sections = {"lora": lora, "matching": {"strategy": "multinomial"}, "sft": {"method": "lora"}}
        start(workspace, tmp_path / name, training=training, data=data_of(workspace), **sections)
    for stage in ("verbalize", "interact", "sft"):
        assert runs.losses(tmp_path / "with", stage) == runs.losses(tmp_path / "without", stage)
        found = values(tmp_path / "with", stage)
        assert [record["step"] for record in found] == [2, 3] and not evaluations(tmp_path / "without", stage)
        parts = [name for name in found[0] if name.startswith("loss/")]
        assert parts == [name for name in runs.metrics(tmp_path / "with", stage)[0] if name.startswith("loss/")]
        assert found[0]["loss"] == pytest.approx(sum(found[0][name] for name in parts))
        assert found[1]["loss"] < found[0]["loss"] and ("exact_match" in found[0]) == (stage != "verbalize")
    assert same(weights(tmp_path / "with"), weights(tmp_path / "without"))


def test_their_time_is_not_that_of_a_step(workspace, tmp_path, monkeypatch):
    passed, clock = [0.0], time.perf_counter
    for module in (evaluating, trainer):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=lambda: clock() + passed[0]))

    def run(self, model):
        passed[0] += 1e6
        return {"loss": 1.0}

    monkeypatch.setattr(Evaluation, "run", run)
    start(workspace, tmp_path / "run", "sft", training={"eval_steps": 1}, sft=SFT, data=data_of(workspace))
    assert all(record["step_seconds"] < 1e5 for record in runs.metrics(tmp_path / "run", "sft"))
    assert all(record["runtime"] > 9e5 for record in evaluations(tmp_path / "run"))


# ---- the best, and an early end ----

LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: 1.5, 5: 0.999, 6: 2.0}
BEST = CONSTANT | {"eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1, "max_steps": 4}
EARLY = BEST | {"max_steps": 6, "early_stopping_patience": 2}


@pytest.fixture(scope="module")
def two_steps(workspace, tmp_path_factory):
    """Weights after two steps, of a run that ended there and was never evaluated."""
    output = tmp_path_factory.mktemp("two") / "run"
    start(workspace, output, "sft", training=CONSTANT | {"max_steps": 2}, sft=SFT)
    return weights(output)


def test_the_result_has_the_best_weights(workspace, tmp_path, monkeypatch, two_steps):
    planned(monkeypatch, LOSSES)
    start(workspace, tmp_path / "best", "sft", training=BEST, sft=SFT, data=data_of(workspace))
    assert same(weights(tmp_path / "best"), two_steps)
    assert checkpoints(tmp_path / "best") == [2, 4]
    summary = read_record(tmp_path / "best" / "sft")["summary"]
    assert summary["best"] == {"metric": "loss", "value": 1.0, "step": 2, "loaded": True}
    assert summary["optimizer_steps"] == 4 and summary["stopped_early_at"] is None
    start(
        workspace,
        tmp_path / "last",
        "sft",
        training=BEST | {"load_best_model_at_end": False},
        sft=SFT,
        data=data_of(workspace),
    )
    assert not same(weights(tmp_path / "last"), two_steps) and checkpoints(tmp_path / "last") == [4]
    assert read_record(tmp_path / "last" / "sft")["summary"]["best"]["loaded"] is False


def test_a_stage_that_gets_no_better_ends(workspace, tmp_path, monkeypatch, two_steps):
    planned(monkeypatch, LOSSES)
    record = start(workspace, tmp_path / "run", "sft", training=EARLY, sft=SFT, data=data_of(workspace))["sft"]
    assert record["state"] == "finished" and record == {
        k: v for k, v in read_record(tmp_path / "run" / "sft").items() if k != "format"
    }
    assert record["summary"]["stopped_early_at"] == record["summary"]["optimizer_steps"] == 4
    assert same(weights(tmp_path / "run"), two_steps)
    assert rows_used(tmp_path / "run" / "sft") == 4 * 4 and checkpoints(tmp_path / "run") == [2, 4]
    assert [record["step"] for record in evaluations(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_small_gain_does_not_count(workspace, tmp_path, monkeypatch):
    """0.999 is the best, but no gain of 0.01 over 1.0."""
    planned(monkeypatch, LOSSES)
    training = EARLY | {"early_stopping_patience": 3, "early_stopping_threshold": 0.01}
    start(workspace, tmp_path / "run", "sft", training=training, sft=SFT, data=data_of(workspace))
    summary = read_record(tmp_path / "run" / "sft")["summary"]
    assert (summary["optimizer_steps"], summary["best"]["step"]) == (5, 5)


def test_of_exact_match_the_highest_is_best(workspace, tmp_path, monkeypatch):
    matches = iter([0.1, 0.5, 0.5, 0.3])
    monkeypatch.setattr(Evaluation, "run", lambda self, model: {"loss": 1.0, "exact_match": next(matches)})
    training = BEST | {"metric_for_best_model": "exact_match"}
    start(workspace, tmp_path / "run", "sft", training=training, sft=SFT, data=data_of(workspace))
    best = read_record(tmp_path / "run" / "sft")["summary"]["best"]
    assert best == {"metric": "exact_match", "value": 0.5, "step": 2, "loaded": True}
    with pytest.raises(ConfigError, match="set verbalize.training.metric_for_best_model to loss"):
        start(workspace, tmp_path / "other", "verbalize", training=training, data=data_of(workspace))


def test_a_part_of_the_loss_can_decide(workspace, tmp_path):
    training = {"eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "loss/last"}
    sections = {"interact": {"intermediate": "none"}, "data": data_of(workspace)}
    start(workspace, tmp_path / "run", "interact", training=training, **sections)
    lowest = min(evaluations(tmp_path / "run", "interact"), key=lambda record: record["loss/last"])
    assert read_record(tmp_path / "run" / "interact")["summary"]["best"]["step"] == lowest["step"]
    training["metric_for_best_model"] = "loss/frist"
    with pytest.raises(ConfigError, match=r"interact: training.metric_for_best_model is loss/frist.* loss/last"):
        start(workspace, tmp_path / "other", "interact", training=training, **sections)


# ---- resumed ----


def test_a_run_in_pieces_ends_as_one_in_one_piece(workspace, tmp_path, monkeypatch):
    """Asked to end at every step: evaluations that were left out then are made up for."""
    training = CONSTANT | {
        "max_steps": 3,
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "early_stopping_patience": 2,
    }
    sections = {"sft": SFT, "data": data_of(workspace)}
    start(workspace, tmp_path / "whole", "sft", training=training, **sections)
    for piece in range(2):
        with pytest.raises(StoppedEarly):
            start(workspace, tmp_path / "pieces", "sft", piece > 0, training=training, max_hours=1e-9, **sections)
        assert len(evaluations(tmp_path / "pieces")) == piece
    start(workspace, tmp_path / "pieces", "sft", True, training=training, **sections)
    assert values(tmp_path / "pieces") == values(tmp_path / "whole")
    assert runs.losses(tmp_path / "pieces", "sft") == runs.losses(tmp_path / "whole", "sft")
    assert same(weights(tmp_path / "pieces"), weights(tmp_path / "whole"))
    best = [read_record(tmp_path / name / "sft")["summary"]["best"] for name in ("pieces", "whole")]
    assert best[0] == best[1]


def test_the_patience_that_is_left_is_kept(workspace, tmp_path, monkeypatch, two_steps):
    planned(monkeypatch, LOSSES)
    sections = {"training": EARLY | {"save_steps": 1}, "sft": SFT, "data": data_of(workspace)}
    wishes = Leaving.wishes

    def asked_at_three(self):
        if watch.place.endswith("step 3"):
            os.kill(os.getpid(), signal.SIGTERM)
        return wishes(self)

    monkeypatch.setattr(Leaving, "wishes", asked_at_three)
    with pytest.raises(StoppedEarly, match="step 3 of 6"):
        start(workspace, tmp_path / "run", "sft", **sections)
    monkeypatch.setattr(Leaving, "wishes", wishes)
    start(workspace, tmp_path / "run", "sft", True, **sections)
    assert read_record(tmp_path / "run" / "sft")["summary"]["stopped_early_at"] == 4
    # died between the last checkpoint and the result
    runs.rewind(tmp_path / "run" / "sft", 4)
    shutil.rmtree(tmp_path / "run" / "sft" / "student")
    start(workspace, tmp_path / "run", "sft", True, **sections)
    assert len(runs.losses(tmp_path / "run", "sft")) == 4 and same(weights(tmp_path / "run"), two_steps)


def test_a_best_checkpoint_that_is_damaged_or_gone(workspace, tmp_path, monkeypatch, capfd):
    planned(monkeypatch, LOSSES)
    sections = {"training": BEST, "sft": SFT, "data": data_of(workspace)}
    start(workspace, tmp_path / "run", "sft", **sections)
    folder = tmp_path / "run" / "sft"
    runs.rewind(folder, 4)
    shutil.rmtree(folder / "student")
    damaged = folder / "checkpoint-2" / "trainable.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(LineageError, match="checkpoint-2, the best checkpoint, is not what was written: trainable"):
        start(workspace, tmp_path / "run", "sft", True, **sections)
    shutil.rmtree(folder / "checkpoint-2")
    start(workspace, tmp_path / "run", "sft", True, **sections)
    said = capfd.readouterr().err
    assert "checkpoint-2, the best so far, is gone" in said and "its result has the last weights" in said
    assert read_record(folder)["summary"]["best"]["loaded"] is False
    layer = "layers.0.mlp.up_proj.weight"
    last, made = (
        next(value for name, value in stored.items() if name.endswith(layer))
        for stored in (load_file(folder / "checkpoint-4" / "trainable.safetensors"), weights(tmp_path / "run"))
    )
    assert torch.equal(last, made)


def test_what_decides_is_part_of_the_run(workspace, tmp_path):
    sections = {"sft": SFT, "data": data_of(workspace)}
    start(workspace, tmp_path / "run", "sft", training={"eval_steps": 2}, **sections)
    start(workspace, tmp_path / "run", "sft", True, training={}, **sections)  # only measures: may change
    with pytest.raises(LineageError, match="training.early_stopping_patience: there None, now 3"):
        start(
            workspace,
            tmp_path / "run",
            "sft",
            True,
            training={"eval_steps": 2, "early_stopping_patience": 3},
            **sections,
        )


# ---- what tools make of them ----


def test_the_report_and_inspect_show_evaluations(learnt, tmp_path):
    (found,) = evaluations(learnt)
    page = build_page([open_run(learnt)])
    assert page.count('alt="evaluations of stage sft') == 2  # loss, exact match
    assert f"loss {found['loss']:.4g}, step 40" in page and "the result&#39;s" not in page
    assert inspect_stage(learnt / "sft")["summary"]["best"]["value"] == found["loss"]
    shutil.copytree(learnt / "sft", tmp_path / "run" / "sft")
    (tmp_path / "run" / "sft" / "eval.jsonl").unlink()
    assert "evaluations of stage" not in build_page([open_run(tmp_path / "run")])


def test_the_planner_counts_the_best_checkpoint(workspace, tmp_path):
    tree = runs.settings(workspace, tmp_path / "run", eval_steps=2) | {"stages": ["interact"]}
    tree["data"] |= data_of(workspace)
    tree["interact"], path = {"intermediate": "none"}, tmp_path / "run.yaml"
    sizes = []
    for best in (False, True):
        tree["training"]["load_best_model_at_end"] = best
        config = load_config(runs.write_config(tree, path))
        sizes.append(checkpoint_bytes(Subject(config, ("interact",))))
    lora = {
        "up": (32, 64),
        "gate": (32, 64),
        "down": (64, 32),
        "q": (32, 32),
        "k": (32, 32),
        "v": (32, 32),
        "o": (32, 32),
    }
    trained = 4 * sum(8 * (a + b) for a, b in lora.values())
    assert sizes[1] - sizes[0] == 12 * trained


# ---- bad input ----

BAD = {
    "no rows": ({"training.eval_steps": 5, "data.eval": []}, "needs rows to evaluate on: add data.eval"),
    "best, never evaluated": ({"training.load_best_model_at_end": True}, "load_best_model_at_end needs .*eval_steps"),
    "patience, never evaluated": (
        {"training.early_stopping_patience": 2},
        "early_stopping_patience needs .*eval_steps",
    ),
    "samples of nothing": ({"training.max_eval_samples": 2}, "max_eval_samples needs .*eval_steps"),
    "threshold alone": (
        {"training.eval_steps": 5, "training.early_stopping_threshold": 0.1},
        "early_stopping_threshold belongs to early_stopping_patience",
    ),
    "metric alone": (
        {"training.eval_steps": 5, "training.metric_for_best_model": "exact_match"},
        "decides nothing without load_best_model_at_end",
    ),
    "unknown metric": (
        {"training.eval_steps": 5, "training.load_best_model_at_end": True, "training.metric_for_best_model": "bleu"},
        "use loss, loss/PART .* or exact_match",
    ),
    "never": ({"training.eval_steps": 0}, "eval_steps.*greater than or equal to 1"),
    "the Trainer's own": ({"training.extra": {"eval_strategy": "epoch"}}, "extra.eval_strategy is set by the stage"),
    "by extra": ({"training.extra": {"load_best_model_at_end": True}}, "set training.load_best_model_at_end itself"),
}


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD)
def test_options_that_do_not_go_together(workspace, tmp_path, changes, message):
    tree = runs.settings(workspace, tmp_path / "run")
    tree["data"] |= data_of(workspace)
    with pytest.raises(ConfigError, match=message):
        load_config(runs.write_config(tree, tmp_path / "run.yaml"), changes)


# ---- several ranks ----


@pytest.mark.slow
def test_ranks_evaluate_as_one_process_and_keep_the_best(workspace, tmp_path):
    """Seven rows on two ranks of ZeRO-3: one rank has a micro-batch that does not count. Sft is evaluated on answers
    that it does not learn, so that its best weights are not the last."""
    rows = [json.loads(line) for line in (workspace / "rows.jsonl").read_text().splitlines()[:7]]
    for row in rows:
        row["messages"][1]["content"] = "teal brown"
    (tmp_path / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"eval": [{"reader": "messages", "path": str(tmp_path / "others.jsonl"), "image_root": str(workspace)}]}
    common = {"max_steps": 3, "learning_rate": 1e-2, **CONSTANT}
    evaluated = {"eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1}
    stages, jobs = ("verbalize", "interact", "sft"), []
    for name, training in {"one": evaluated, "two": evaluated, "plain": {}, "short": {"max_steps": 2}}.items():
        tree = runs.settings(workspace, tmp_path / name, **(common | training)) | {"preflight": False, "sft": SFT}
        tree["data"] |= data
        if name != "one":
            tree["training"] |= {"deepspeed": runs.zero3(), "gradient_accumulation_steps": 1}
        config = runs.write_config(tree, tmp_path / f"{name}.json")
        jobs += [(stage, config) for stage in stages if name in ("two", "plain") or (name, stage) == ("short", "sft")]
    runs.train_several("--fresh", *jobs)
    run(load_config(tmp_path / "one.json"), "all")
    for stage in stages:
        assert runs.losses(tmp_path / "two", stage) == runs.losses(tmp_path / "plain", stage)
        ours, theirs = values(tmp_path / "two", stage), values(tmp_path / "one", stage)
        assert [record["rows"] for record in ours] == [7, 7, 7]
        for a, b in zip(ours, theirs, strict=True):
            assert a.keys() == b.keys()
            for name in a.keys() - {"stage"}:
                assert a[name] == pytest.approx(b[name], rel=1e-3), (stage, name)
    best = [read_record(tmp_path / name / "sft")["summary"]["best"]["step"] for name in ("one", "two")]
    assert best == [2, 2] and checkpoints(tmp_path / "two") == [2, 3]
    assert same(weights(tmp_path / "two"), weights(tmp_path / "short"))
    assert not same(weights(tmp_path / "two"), weights(tmp_path / "plain"))
