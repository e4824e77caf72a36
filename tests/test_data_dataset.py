"""Rows for two models, replacement of unusable rows, batches, and the log of what was skipped."""

import errno
import json
import math
import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import make_model, make_processor
from torch.utils.data import DataLoader

from vlsi_fast.config_data import DataConfig, SourceConfig
from vlsi_fast.data import storage
from vlsi_fast.data.collate import Collator
from vlsi_fast.data.dataset import AnswerMismatchError, NoUsableRowError, VlsiDataset, equivalent
from vlsi_fast.data.encoding import encode
from vlsi_fast.data.messages import Sample
from vlsi_fast.data.skipped import CHANCE, SkipLog, TooManySkippedRows, UnusableRow, log_chance
from vlsi_fast.data.sources import build_source


@pytest.fixture
def rows(tmp_path):
    """Six rows on disk: 0 text, 1 missing image, 2 image, 3 empty answer, 4 two images and two turns, 5 broken."""
    for name, size in (("a", (56, 56)), ("b", (84, 28))):
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / f"{name}.png")

    def llava(image, *turns):
        who = ("human", "gpt")
        return {"image": image, "conversations": [{"from": who[i % 2], "value": turn} for i, turn in enumerate(turns)]}

    data = [
        llava(None, "Is there a red circle?", "yes"),
        llava("gone.png", "What color?", "red"),
        llava("a.png", "What shape is in the image?", "rectangle"),
        llava("a.png", "What?", ""),
        llava(["a.png", "b.png"], "<image> or <image>?", "blue circle", "And now?", "no"),
        {"conversations": 3},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(data))
    return DataConfig(train=[SourceConfig(reader="llava", path=str(tmp_path / "rows.json"))])


def dataset_of(config, **processors):
    return VlsiDataset(build_source(config.train), processors, config)


def test_rows_are_replaced_by_the_next_usable_one_and_recorded(rows):
    dataset = dataset_of(rows, student=make_processor("tiny"))
    got = [dataset[i] for i in range(6)]
    assert len(dataset) == 6
    assert [row["id"] for row in got] == [f"rows.json#{i}" for i in (0, 2, 2, 4, 4, 0)]
    assert [[(record["id"], record["cause"]) for record in row["skipped"]] for row in got] == [
        [],
        [("rows.json#1", "missing_image")],
        [],
        [("rows.json#3", "empty_answer")],
        [],
        [("rows.json#5", "bad_row")],
    ]
    assert set(got[0]) == {"id", "student", "skipped", "answered", "unaligned"} and got[0]["answered"] is False
    assert dataset[-1]["id"] == "rows.json#0"
    with pytest.raises(IndexError):
        dataset[6]


@pytest.mark.parametrize("where", ["header", "pixels", "path"])
def test_a_file_system_that_fails_is_no_damaged_row(rows, monkeypatch, capsys, where):
    """The read is made again; only a file system that goes on failing ends the run, and with its own words."""
    dataset, slept, failures = dataset_of(rows, student=make_processor("tiny")), [], [0]
    target, name = {"header": (Image, "open"), "pixels": (Image.Image, "load"), "path": (Path, "is_file")}[where]
    call = getattr(target, name)

    def failing(*args, **kwargs):
        if failures[0] > 0:
            failures[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle")
        return call(*args, **kwargs)

    if where == "pixels":
        target = type(Image.open(dataset.sources[2].images[0].root + "/a.png"))
        call = getattr(target, name)
    monkeypatch.setattr(target, name, failing)
    monkeypatch.setattr(storage.time, "sleep", slept.append)
    failures[0] = 2
    assert dataset[2]["id"] == "rows.json#2" and dataset[2]["skipped"] == []
    assert slept == [0.5, 2.0] and capsys.readouterr().err.count("Stale file handle") == 2
    failures[0] = 10**9
    with pytest.raises(storage.StorageError, match=r"failed 5 times within 30 seconds: .*Stale file handle.*--resume"):
        dataset[2]


def test_too_long_is_judged_for_each_role(rows):
    rows = rows.model_copy(update={"max_length": 60})
    small, large = make_processor("tiny"), make_processor("tiny", min_pixels=280 * 280)
    assert dataset_of(rows, student=small)[2]["id"] == "rows.json#2"
    for processors in ({"student": small, "teacher": large}, {"student": large, "teacher": small}):
        skipped = dataset_of(rows, **processors)[2]["skipped"]
        assert [(record["id"], record["cause"]) for record in skipped[:1]] == [("rows.json#2", "too_long")]


def test_no_usable_row(rows):
    rows = rows.model_copy(update={"max_length": 2})
    message = "none of 6 rows from row 4 .*too_long 3, .*First: rows.json#4: too_long"
    with pytest.raises(NoUsableRowError, match=message):
        dataset_of(rows, student=make_processor("tiny"))[4]


def test_equivalent_processors_encode_once(rows):
    student, teacher = make_processor("tiny"), make_processor("tiny")
    assert equivalent(student, teacher)
    row = dataset_of(rows, student=student, teacher=teacher)[2]
    assert row["student"] is row["teacher"]
    other_template = make_processor("tiny")
    other_template.chat_template = "{# #}" + other_template.chat_template
    others = [make_processor("tiny", patch_size=16), make_processor("tiny", max_pixels=9999), other_template]
    for other in (*others, make_processor("qwen")):
        assert not equivalent(student, other)
    row = dataset_of(rows, student=student, teacher=others[0])[2]
    assert row["student"] is not row["teacher"]


def test_roles_are_aligned_by_answer_tokens(rows):
    student = make_processor("tiny")
    teacher = make_processor("tiny", min_pixels=112 * 112)
    row = dataset_of(rows, student=student, teacher=teacher)[4]
    assert row["student"]["input_ids"].shape[1] < row["teacher"]["input_ids"].shape[1]
    answers = [row[role]["labels"][row[role]["labels"] != -100].tolist() for role in ("student", "teacher")]
    assert answers[0] == answers[1] and len(answers[0]) >= 4


def test_answer_mismatch_shows_the_row(rows):
    teacher = make_processor("tiny")
    teacher.chat_template = teacher.chat_template.replace("'<|im_end|>\\n'", "'<|endoftext|><|im_end|>\\n'")
    dataset = dataset_of(rows, student=make_processor("tiny"), teacher=teacher)
    with pytest.raises(AnswerMismatchError) as error:
        dataset[0]
    count = len(teacher.tokenizer("yes").input_ids)
    for part in ("rows.json#0", f"student: {count + 1} tokens, 'yes<|im_end|>'", f"teacher: {count + 2} tokens"):
        assert part in str(error.value)


def test_roles_are_checked(rows):
    for processors in ({}, {"pupil": make_processor("tiny")}):
        with pytest.raises(ValueError, match="student, teacher"):
            dataset_of(rows, **processors)


def answer_logits(model, batch, row):
    with torch.no_grad():
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return logits[row, :-1][batch["labels"][row, 1:] != -100]


def test_a_mixed_batch_gives_each_row_its_own_logits(rows):
    processor = make_processor("tiny")
    dataset, collate, model = dataset_of(rows, student=processor), Collator({"student": processor}), make_model()
    features = [dataset[i] for i in (4, 0, 2)]  # two images, none, one
    batch = collate(features)
    together = batch["student"]
    longest = max(feature["student"]["input_ids"].shape[1] for feature in features)
    assert together["input_ids"].shape == together["labels"].shape == (3, longest)
    assert together["image_grid_thw"].shape == (3, 3)
    assert together["pixel_values"].shape[0] == together["image_grid_thw"].prod(1).sum()
    pad = together["attention_mask"] == 0
    assert pad.any() and (together["input_ids"][pad] == processor.tokenizer.pad_token_id).all()
    assert (together["labels"][pad] == -100).all() and (together["mm_token_type_ids"][pad] == 0).all()
    for i, feature in enumerate(features):
        alone = collate([feature])["student"]
        expected, got = answer_logits(model, alone, 0), answer_logits(model, together, i)
        assert expected.shape[0] > 0 and expected.std() > 0.1
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)  # logits are of order 1; fp32 sums reordered


def test_a_text_only_batch_has_no_vision_tensors(rows):
    processor = make_processor("tiny")
    batch = Collator({"student": processor})([dataset_of(rows, student=processor)[0]] * 2)
    assert set(batch["student"]) == {"input_ids", "attention_mask", "mm_token_type_ids", "labels"}
    assert torch.isfinite(answer_logits(make_model(), batch["student"], 1)).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_shared_rows_stay_shared_and_skips_travel_with_the_batch(rows, workers):
    processors = {"student": make_processor("tiny"), "teacher": make_processor("tiny")}
    loader = DataLoader(
        dataset_of(rows, **processors), batch_size=3, collate_fn=Collator(processors), num_workers=workers
    )
    batches = list(loader)
    assert [batch["ids"] for batch in batches] == [
        ["rows.json#0", "rows.json#2", "rows.json#2"],
        ["rows.json#4", "rows.json#4", "rows.json#0"],
    ]
    assert [[record["cause"] for record in batch["skipped"]] for batch in batches] == [
        ["missing_image"],
        ["empty_answer", "bad_row"],
    ]
    for batch in batches:
        assert all(batch["student"][name] is batch["teacher"][name] for name in batch["student"])


def test_unshared_roles_are_padded_to_their_own_length(rows):
    processors = {"student": make_processor("tiny"), "teacher": make_processor("tiny", min_pixels=112 * 112)}
    dataset = dataset_of(rows, **processors)
    batch = Collator(processors)([dataset[0], dataset[2]])
    assert batch["student"]["input_ids"].shape[1] < batch["teacher"]["input_ids"].shape[1]


def test_collator_errors(rows):
    processor = make_processor("tiny")
    row = dataset_of(rows, student=processor)[0]
    row["student"] = {**row["student"], "odd": torch.zeros(2, 7)}
    with pytest.raises(ValueError, match=r"odd of shape \(2, 7\)"):
        Collator({"student": processor})([row])
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="student's tokenizer has no padding token"):
        Collator({"student": processor})


def record(i, cause="missing_image"):
    return {"id": f"m.json#{i}", "cause": cause, "detail": "é"}


def test_skip_log_writes_each_row_once_and_continues(tmp_path):
    path = tmp_path / "run" / "skipped.jsonl"
    log = SkipLog(path, total_rows=100, max_share=0.5)
    log.record([record(1), record(2, "too_long"), record(1)])
    log.record([record(1)])
    assert log.summary() == {"missing_image": 1, "too_long": 1}
    again = SkipLog(path, total_rows=100, max_share=0.5)
    again.record([record(2, "too_long"), record(3)])
    assert again.summary() == {"missing_image": 2, "too_long": 1}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [record(1), record(2, "too_long"), record(3)]
    log.check()
    assert log.summary() == again.summary()


def test_skip_log_survives_a_line_cut_by_a_crash(tmp_path):
    path = tmp_path / "skipped.jsonl"
    path.write_text(json.dumps(record(1)) + "\n" + '{"id": "m.json#2", "cau')
    log = SkipLog(path, total_rows=100, max_share=0.5)
    log.record([record(2), record(3)])
    assert SkipLog(path, total_rows=100, max_share=0.5).summary() == log.summary() == {"missing_image": 3}


def test_skip_log_where_the_file_system_has_no_locks(tmp_path, monkeypatch):
    def refuse(number, *_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", lambda *_: refuse(errno.ENOLCK))
    log = SkipLog(tmp_path / "s.jsonl", total_rows=100, max_share=0.5)
    log.record([record(1)])
    assert log.summary() == {"missing_image": 1}
    monkeypatch.setattr("fcntl.flock", lambda *_: refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        log.record([record(2)])


def test_share_of_the_whole(tmp_path):
    log = SkipLog(tmp_path / "s.jsonl", total_rows=100, max_share=0.02)
    log.record([record(0), record(1, "too_long")])
    log.check()
    log.record([record(2)])
    with pytest.raises(TooManySkippedRows) as error:
        log.check()
    for part in ("3 of", "100 rows (3.00%)", "limit is 2.00%", "missing_image: 2", "too_long: 1", "s.jsonl"):
        assert part in str(error.value)
    assert "raise data.max_skipped_share" in str(error.value)


def test_share_of_what_was_read(tmp_path):
    log = SkipLog(tmp_path / "s.jsonl", total_rows=10**6, max_share=0.01)
    log.record([record(i) for i in range(3)])
    log.check(3, 200)  # chance: 2 are expected
    log.check(3, 4_000_000)
    with pytest.raises(TooManySkippedRows, match="20 of the first 200 rows"):
        log.check(20, 200)
    with pytest.raises(TooManySkippedRows, match="4 of the first 4 rows"):
        log.check(4, 4)


def test_the_bound_is_above_the_binomial_tail():
    for read, share in ((50, 0.01), (400, 0.1), (1000, 0.004)):
        for skipped in range(1, read, 7):
            terms = (math.comb(read, k) * share**k * (1 - share) ** (read - k) for k in range(skipped, min(read, 160)))
            assert math.exp(log_chance(skipped, read, share)) >= (1 - 1e-9) * math.fsum(terms)
    assert log_chance(1, 9, 0.0) == -math.inf and log_chance(9, 9, 1.0) == log_chance(0, 0, 0.5) == 0
    assert log_chance(7, 7, 0.1) == pytest.approx(7 * math.log(0.1))


def test_a_run_below_the_limit_goes_on_and_one_far_above_stops(tmp_path):
    """60 steps of 256 rows on 8 ranks, which judge together: 0.4% unusable against 1%."""
    chance = random.Random(0)

    def stopped(share):
        skipped = 0
        for step in range(1, 61):
            skipped += sum(chance.random() < share for _ in range(256))
            if log_chance(skipped, 256 * step, 0.01) < math.log(CHANCE):
                return step
        return None

    assert [stopped(0.004) for _ in range(40)] == [None] * 40
    assert all(step is not None and step <= 4 for step in (stopped(0.05) for _ in range(20)))


def test_no_skip_allowed(tmp_path):
    log = SkipLog(tmp_path / "s.jsonl", total_rows=10, max_share=0.0)
    log.check(0, 500)
    log.record([record(0)])
    with pytest.raises(TooManySkippedRows):
        log.check()


class SlowLog(SkipLog):
    """Leaves time between reading and writing, so that only the lock keeps processes from writing a row twice."""

    def _read_new_lines(self):
        super()._read_new_lines()
        time.sleep(0.002)


def write_records(path, first):
    log = SlowLog(path, total_rows=1000, max_share=1.0)
    for i in range(first, first + 60):
        log.record([record(i)])


def test_several_processes_share_the_file(tmp_path):
    path = tmp_path / "s.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=write_records, args=(path, first)) for first in (0, 0, 60)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    ids = [json.loads(line)["id"] for line in path.read_text().splitlines()]
    assert sorted(ids, key=lambda name: int(name.split("#")[1])) == [f"m.json#{i}" for i in range(120)]


def test_skip_log_arguments_and_causes(tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        SkipLog(tmp_path / "s", total_rows=0, max_share=0.1)
    with pytest.raises(ValueError, match="from 0 to 1"):
        SkipLog(tmp_path / "s", total_rows=1, max_share=2)
    with pytest.raises(ValueError, match="unknown cause 'boring'"):
        UnusableRow("boring", "x")


def test_real_easy_vqa_rows_run_through_the_model():
    config = DataConfig(train=[{"reader": "easy_vqa", "limit": 8}], max_skipped_share=0.0)
    processors = {"student": make_processor("tiny"), "teacher": make_processor("tiny")}
    loader = DataLoader(dataset_of(config, **processors), batch_size=4, collate_fn=Collator(processors))
    model = make_model()
    for batch in loader:
        assert not batch["skipped"]
        loss = model(**batch["student"]).loss
        assert torch.isfinite(loss) and loss > 1.0


def test_a_masked_image_changes_no_answer():
    """What keeps ranks in step on text-only batches must not be seen by the model."""
    processor = make_processor("tiny", patch_size=14, min_pixels=784, max_pixels=3136)
    model = make_model(tokenizer=processor.tokenizer, patch_size=14)
    rows = []
    for i, answer in enumerate(("red", "a blue circle")):
        messages = [
            {"role": "user", "content": [{"type": "text", "text": "What color is the shape? " * (i + 1)}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        sample = Sample(id=str(i), messages=messages)
        encoded = encode(sample, processor, DataConfig(train=[SourceConfig(reader="easy_vqa")]), None)
        rows.append({"id": str(i), "student": encoded, "skipped": []})
    plain = Collator({"student": processor})(rows)["student"]
    always = Collator({"student": processor}, always_image=True)(rows)["student"]
    assert "pixel_values" not in plain and "pixel_values" in always
    seen = []
    model.model.visual.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        one, other = (model(**{k: v for k, v in b.items() if k != "labels"}).logits for b in (plain, always))
    assert seen == [1]
    assert (always["labels"] != -100).sum() == (plain["labels"] != -100).sum()
    for r in range(2):
        n = int(plain["attention_mask"][r].sum())
        torch.testing.assert_close(other[r, :n], one[r, :n], rtol=1e-5, atol=1e-5)
