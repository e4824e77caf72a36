"""Rows and files made to harm: each is a skipped row with its cause and its place, and starts nothing."""

import io
import json
import os
from collections import Counter

import pytest
import tiny
import tiny_families
import torch
from PIL import Image
from test_report import make_run

from vlsi_fast.config import ConfigError, load_config
from vlsi_fast.config_data import DataConfig
from vlsi_fast.data import encoding, images, messages
from vlsi_fast.data.build import build
from vlsi_fast.data.dataset import AnswerMismatchError, VlsiDataset
from vlsi_fast.data.encoding import encode
from vlsi_fast.data.images import ImageRef, load_image
from vlsi_fast.data.processors import load_processor
from vlsi_fast.data.skipped import SkipLog, UnusableRow, row_boundary
from vlsi_fast.data.sources import build_source
from vlsi_fast.evaluation.answers import answer_rows
from vlsi_fast.loading import load_backbone
from vlsi_fast.report import page as page_of
from vlsi_fast.report import samples
from vlsi_fast.runs import open_run

DEEP = "[" * 200_000


def chat(question="q", answer="a", **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]} | more


BAD = [
    ("bad_row", json.dumps({"conversations": [{"from": ["human"], "value": "q"}, {"from": "gpt", "value": "a"}]})),
    ("bad_row", json.dumps(chat() | {"messages": [{"role": {}, "content": "q"}]})),
    ("bad_row", json.dumps({"messages": [{"role": "user", "content": [{"type": {"a": 1}}]}]})),
    ("bad_row", json.dumps(chat("\ud800"))),
    ("bad_row", json.dumps(chat("q", "a\udfff"))),
    ("bad_row", json.dumps(chat("<image>", images=["data:image/png;base64,é"]))),
    ("bad_row", json.dumps(chat("<image>", images=["data:,\ud800"]))),
    ("missing_image", json.dumps(chat("<image>", images=["\ud800.png"]))),
    ("missing_image", json.dumps(chat("<image>", images=["http://127.0.0.1:1/a.png"]))),
    ("path_outside_image_root", json.dumps(chat("<image>", images=["../../../../../../etc/passwd"]))),
    ("bad_row", json.dumps(chat("<image>", images=[{"bytes": [1]}]))),
    ("bad_row", DEEP),
    ("bad_row", '{"messages": ' + DEEP + "]" * 200_000 + "}"),
    ("bad_row", "\x00\xff"),
    ("bad_row", "1" * 10_000),
]


@pytest.fixture
def bad(tmp_path):
    """A good row, a blank line, and the bad ones."""
    folder = tmp_path / "in"
    folder.mkdir()
    lines = [json.dumps(chat()), "", *(line for _, line in BAD)]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="latin-1")
    return folder / "rows.jsonl"


def config(path, reader="messages", **options):
    return DataConfig(train=[{"reader": reader, "path": str(path), "image_root": str(path.parent)}], **options)


def expected(path, first=3):
    return [(cause, str(path), first + i) for i, (cause, _) in enumerate(BAD)]


def places(records):
    return [(record["cause"], record["file"], record["line"]) for record in records]


def test_bad_rows_are_skipped_with_cause_file_and_line(bad, tmp_path):
    data = config(bad, max_skipped_share=1.0)
    dataset = VlsiDataset(build_source(data.train), {"student": tiny.make_processor()}, data)
    row = dataset[1]
    assert row["id"] == "rows.jsonl#0"
    assert places(row["skipped"]) == expected(bad)
    log = SkipLog(tmp_path / "skipped.jsonl", len(dataset), 1.0)
    log.record(row["skipped"])
    written = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert places(written) == expected(bad)
    assert all(len(record["detail"]) < 1100 for record in written)


def test_data_build_drops_the_same_rows(bad, tmp_path):
    manifest = build(config(bad, max_skipped_share=1.0), tmp_path / "out")
    assert manifest["rows"] == 1 and manifest["dropped"] == dict(Counter(sorted(cause for cause, _ in BAD)))
    lines = (tmp_path / "out" / "skipped_rows.jsonl").read_text().splitlines()
    assert places(map(json.loads, lines)) == expected(bad)


def test_eval_answers_the_others(bad, tmp_path):
    tiny_families.save(tmp_path / "model", "qwen2_vl")
    Image.new("RGB", (1, 300)).save(bad.parent / "narrow.png")
    Image.new("RGB", (32, 32)).save(bad.parent / "good.png")
    with bad.open("a") as file:
        for name in ("narrow.png", "good.png"):
            file.write(json.dumps(chat("<image> <|image_pad|><|im_end|>?", images=[name])) + "\n")
    data, skipped = config(bad), Counter()
    data = data.model_copy(update={"eval": data.train})
    found = list(answer_rows(tmp_path / "model", data, skipped=skipped, max_new_tokens=2, device="cpu"))
    assert [row.id for row in found] == ["rows.jsonl#0", f"rows.jsonl#{len(BAD) + 2}"]
    assert sum(skipped.values()) == len(BAD) + 1


def test_report_samples_pass_over_bad_rows(bad):
    from types import SimpleNamespace

    run = SimpleNamespace(config=SimpleNamespace(data=config(bad)))
    assert [found["question"] for found in samples._questions(run, 1)] == ["q"]
    assert [found["question"] for found in samples._questions(run, 5)] == ["q"]


def test_lists_hold_bad_rows_too(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(f"[{json.dumps(chat())},\n {DEEP}{']' * 200_000},\n {'7' * 5000},\n {json.dumps(chat('r'))}]")
    for extra in ({}, {"images_not_under": ["other"]}):
        data = config(path)
        source = build_source([data.train[0].model_copy(update=extra)])
        dataset = VlsiDataset(source, {"student": tiny.make_processor()}, data)
        row = dataset[1]
        assert row["id"] == "rows.json#3"
        assert places(row["skipped"]) == [("bad_row", str(path), 2), ("bad_row", str(path), 3)]


def test_folders_are_judged_of_paths_only(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps(chat(image=image)) for image in (5, {"a": 1}, [None], "x/a.png")] + [DEEP]))
    data = config(path)
    source = build_source([data.train[0].model_copy(update={"images_under": ["y"]})])
    assert [source.row_id(i) for i in range(len(source))] == [f"rows.jsonl#{i}" for i in range(4)]


# ---- the boundary itself ----


def test_what_no_check_foresaw_is_a_cause_that_names_the_exception(bad, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("a bug \ud800" + "x" * 5000)

    monkeypatch.setattr(messages, "as_images", broken)
    source = build_source(config(bad).train)
    with pytest.raises(UnusableRow) as error:
        source[0]
    assert error.value.cause == "unexpected_error"
    assert error.value.detail.startswith("ZeroDivisionError: a bug \\ud800xxx") and len(error.value.detail) < 1100
    monkeypatch.undo()
    monkeypatch.setattr(encoding, "check_messages", lambda _: {}["fault"])
    with pytest.raises(UnusableRow, match=r"unexpected_error: KeyError: 'fault' \(test_hostile_rows.py:\d+\)"):
        encode(source[0], tiny.make_processor(), config(bad), load_image)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), KeyboardInterrupt(), SystemExit(), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_memory_and_interrupts_pass(error):
    with pytest.raises(type(error)), row_boundary():
        raise error


def test_one_mismatch_is_a_row_and_many_are_the_templates(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(chat("q", answer)) + "\n" for answer in ["b"] * 12 + ["a"] * 2))
    student, teacher = tiny.make_processor(), tiny.make_processor()
    teacher.chat_template = teacher.chat_template.replace("part['text'] -}}", "part['text'] | replace('b', 'c') -}}")
    data = config(path, max_skipped_share=1.0)

    def dataset():
        return VlsiDataset(build_source(data.train), {"student": student, "teacher": teacher}, data)

    with pytest.raises(AnswerMismatchError, match="rows.jsonl#0"):
        dataset()[0]
    row = dataset()[8]
    assert row["id"] == "rows.jsonl#12" and {r["cause"] for r in row["skipped"]} == {"answer_mismatch"}
    known = dataset()
    assert known[13]["id"] == "rows.jsonl#13" and known[0]["id"] == "rows.jsonl#12"


# ---- what costs too much ----


def test_endless_text_is_refused_before_it_is_tokenized(monkeypatch):
    processor = tiny.make_processor()
    data = config_of_memory()
    monkeypatch.setattr(type(processor), "apply_chat_template", None)
    seen, stock = [], type(processor.tokenizer).__call__
    monkeypatch.setattr(type(processor.tokenizer), "__call__", lambda *a, **k: seen.append(len(a[1])) or stock(*a, **k))
    bound, longest = 1000, max(map(len, processor.tokenizer.get_vocab()))
    tight = data.model_copy(update={"max_length": bound})
    for size, reason, read in ((14_000_000, "a token has at most", 0), (longest * bound - 4, "alone", 16 * bound)):
        seen.clear()
        turns = [{"role": "user", "content": [{"type": "text", "text": "q"}]}]
        turns.append({"role": "assistant", "content": [{"type": "text", "text": ("ab " * size)[:size]}]})
        with pytest.raises(UnusableRow, match=rf"too_long: \d+ characters, .*{reason}"):
            encode(messages.Sample("r", turns), processor, tight, load_image)
        assert sum(seen) == read


def config_of_memory():
    return DataConfig(train=[{"reader": "easy_vqa"}])


def test_the_bound_on_characters_refuses_nothing_that_fits():
    processor = tiny.make_processor()
    longest = max(processor.tokenizer.get_vocab(), key=lambda token: (token.isalpha(), len(token)))
    turns = [{"role": "user", "content": [{"type": "text", "text": "q"}]}]
    turns.append({"role": "assistant", "content": [{"type": "text", "text": f" {longest}" * 300}]})
    sample = messages.Sample("r", turns)
    length = encode(sample, processor, config_of_memory(), load_image)["input_ids"].shape[1]
    exact = config_of_memory().model_copy(update={"max_length": length})
    assert encode(sample, processor, exact, load_image)["input_ids"].shape[1] == length


def test_pixels_of_a_row_are_judged_by_headers(tmp_path, monkeypatch):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    Image.new("RGB", (10, 10)).save(tmp_path / "b.png")
    refs = [ImageRef("a.png", str(tmp_path))] * 3 + [ImageRef("b.png", str(tmp_path))]
    images.check_pixels(refs, 600, 1900)
    loads, stock = [], Image.Image.load
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: loads.append(self) or stock(self))
    with pytest.raises(UnusableRow, match="too_many_pixels: 4 images of 1900 pixels.*data.max_row_pixels 1899"):
        images.check_pixels(refs, 600, 1899)
    with pytest.raises(UnusableRow, match="decompression_bomb"):
        images.check_pixels(refs, 599, 10**6)
    with pytest.raises(UnusableRow, match="too_many_pixels"):
        images.check_pixels(refs[:1], 600, 599)
    assert not loads


def test_the_bound_on_a_rows_pixels_holds_everywhere(tmp_path):
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(chat("<image><image>?", images=["a.png"] * 2)) + "\n" + json.dumps(chat()) + "\n")
    data = config(path, max_row_pixels=2 * 56 * 56 - 1, max_skipped_share=1.0)
    (record,) = VlsiDataset(build_source(data.train), {"student": tiny.make_processor()}, data)[0]["skipped"]
    assert record["cause"] == "too_many_pixels"
    assert build(data, tmp_path / "out")["dropped"] == {"too_many_pixels": 1}


def test_an_image_shown_twice_is_decoded_once(tmp_path):
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    loads = []

    def load(ref):
        loads.append(ref)
        return load_image(ref)

    sample = messages.Sample("r", turns, [ImageRef("a.png", str(tmp_path)) for _ in range(2)])
    row = encode(sample, tiny.make_processor(), config_of_memory(), load)
    assert len(loads) == 1 and row["image_grid_thw"].shape == (2, 3)


# ---- known good, kept so ----


def test_images_that_would_start_something_are_not_opened(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "EPS")
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    for data in (picture.getvalue(), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", svg, b"%PDF-1.4"):
        with pytest.raises(UnusableRow, match="truncated_image.*not an image file that Pillow can read as PNG, JPEG"):
            load_image(ImageRef(data=data))
    os.mkfifo(tmp_path / "pipe.png")
    for path in ("pipe.png", "/dev/zero", "https://127.0.0.1:1/a.png", "file:///etc/passwd", "\\\\host\\share\\a.png"):
        with pytest.raises(UnusableRow, match="missing_image|path_outside_image_root"):
            load_image(ImageRef(path, str(tmp_path)))


def test_text_is_no_template():
    processor = tiny.make_processor()
    evil = "{{ 7 * 7 }}{% raw %}{{ cycler.__init__.__globals__.os.getcwd() }}"
    turns = [{"role": role, "content": [{"type": "text", "text": evil}]} for role in ("user", "assistant")]
    row = encode(messages.Sample("r", turns), processor, config_of_memory(), load_image)
    assert processor.tokenizer.decode(row["labels"][row["labels"] != -100]) == evil + "<|im_end|>"


def test_yaml_makes_no_objects(tmp_path):
    proof = tmp_path / "proof"
    for tag in (f"!!python/object/apply:os.mkdir ['{proof}']", f"!!python/object/new:os.mkdir ['{proof}']"):
        (tmp_path / "run.yaml").write_text(f"output_dir: {tag}\n")
        with pytest.raises(ConfigError):
            load_config(tmp_path / "run.yaml")
        (tmp_path / "run.yaml").write_text("output_dir: x\n")
        with pytest.raises(ConfigError):
            load_config(tmp_path / "run.yaml", ["--output_dir", tag])
    (tmp_path / "mix.yaml").write_text(f"sources: [{{reader: qa, path: !!python/object/apply:os.mkdir ['{proof}']}}]\n")
    with pytest.raises(ValueError):
        DataConfig(train=str(tmp_path / "mix.yaml"))
    assert not proof.exists()


def test_code_in_a_checkpoint_folder_is_not_run(tmp_path):
    folder, proof = tmp_path / "model", tmp_path / "proof"
    tiny_families.save(folder, "qwen2_vl")
    code = f"import pathlib\npathlib.Path({str(proof)!r}).write_text('run')\n"
    for name in ("evil.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code + "def generate(*_, **__): pass\nclass Evil: pass\n")
    autos = {"config.json": ["AutoConfig", "AutoModelForImageTextToText"], "processor_config.json": ["AutoProcessor"]}
    autos |= {"tokenizer_config.json": ["AutoTokenizer"], "generation_config.json": []}
    for name, classes in autos.items():
        settings = json.loads((folder / name).read_text()) | {"custom_generate": str(folder)}
        settings["auto_map"] = {each: "evil.Evil" for each in classes}
        (folder / name).write_text(json.dumps(settings))
    processor, model = load_processor(folder), load_backbone(folder, "float32")
    inputs = processor(text=["q"], return_tensors="pt")
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert not proof.exists()


def test_words_of_rows_are_words_on_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(page_of, "lines", lambda *_, **__: "data:,")
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>{{ 7 * 7 }}"
    make_run(tmp_path / "run")
    cells = [
        {"layer": 2, "text": evil, "right": False, "share": 0.5},
        {"layer": "answer", "text": evil, "right": True, "share": 1.0},
    ]
    row = {
        "images": [],
        "question": evil,
        "answer": evil,
        "shade": evil,
        "columns": [{"model": "base", "cells": cells}],
    }
    run = open_run(tmp_path / "run")
    outcomes = [{"right": {evil: True}, "count": 3}]
    found = {"name": evil, "path": None, "file": "f", "metric": evil, "mean": 0.5, "rows": 2, "interval": [0.1, 0.9]}
    (tmp_path / "run" / "summary.json").unlink()
    own = found | {"name": "own", "path": str(run.student), "mean": 0.4}
    page = page_of.build_page(
        [run], [own, found], {run.folder: {"rows": [row] * 3, "outcomes": outcomes, "reason": evil}}
    )
    assert "<script>alert" not in page and "<img src=x" not in page and "&lt;script&gt;alert(1)" in page
    assert "{{ 7 * 7 }}" in page and "The student is at\xa040.0%, less than script&gt;&lt;img" in page
