"""`vlsi-fast data answer`: what is asked, how answers are drawn, what an interruption leaves, what is kept."""

import json
import os
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import tiny_families
import tiny_runs as runs
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

import vlsi_fast.data.answering.asking as asking
from vlsi_fast import load_config, run
from vlsi_fast.cli import main
from vlsi_fast.config import ConfigError
from vlsi_fast.config_data import SourceConfig
from vlsi_fast.data.answering import answer
from vlsi_fast.data.answering.decoding import choose, numbers_of
from vlsi_fast.data.answering.filters import Filters, normalised, repetition
from vlsi_fast.data.answering.parts import Files
from vlsi_fast.data.answering.prompts import Questions, read_questions, turns_of
from vlsi_fast.data.processors import load_processor
from vlsi_fast.data.skipped import UnusableRow
from vlsi_fast.data.sources import build_source
from vlsi_fast.export.card import _data
from vlsi_fast.lineage import LineageError, checkpoint_digest, read_record, write_record

QUESTIONS = ["What is shown?", "Is there a red circle, or no shape at all?"]
SHORT = {"max_new_tokens": 6, "batch_size": 4, "progress": False, "keep_cut": True}
SAMPLED = SHORT | {"temperature": 1.0, "samples": 3, "seed": 5}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Six pictures of different sizes in two folders, one damaged; a hidden one, and a file that is none."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "b").mkdir()
    (folder / ".hidden").mkdir()
    for i in range(6):
        name = f"b/{i}.PNG" if i % 2 else f"{i}.jpg"
        Image.new("RGB", (32 + 8 * i, 40), runs.COLORS[i % 6]).save(folder / name)
    (folder / "4.jpg").write_bytes(b"no picture")
    shutil.copy(folder / "0.jpg", folder / ".hidden" / "0.jpg")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def model(workspace):
    return workspace / "teacher"


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@lru_cache(maxsize=1)
def stock_model(folder):
    return load_processor(folder), AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def stock(folder, turns, paths, max_new_tokens=6):
    """Ids that stock `generate` adds to one conversation, padded by nothing."""
    processor, own = stock_model(folder)
    images = iter([Image.open(path).convert("RGB") for path in paths])
    turns = [
        {**turn, "content": [p | ({"image": next(images)} if p["type"] == "image" else {}) for p in turn["content"]]}
        for turn in turns
    ]
    inputs = processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    new = own.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return new[0, inputs["input_ids"].shape[1] :], inputs, own, processor


# ---- answers ----


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])
def test_greedy_answers_are_stock_generates_row_by_row(family, pictures, tmp_path):
    tiny_families.save(tmp_path / "model", family)
    found = answer(None, pictures, QUESTIONS, tmp_path / "a.jsonl", model=tmp_path / "model", **SHORT)
    rows = rows_of(tmp_path / "a.jsonl")
    assert found["kept"] == len(rows) == 10 and found["unusable"] == {"truncated_image": 2}
    ids = ["0.jpg", "2.jpg", "b/1.PNG", "b/3.PNG", "b/5.PNG"]
    assert [(row["id"], row["answered_by"]["question"]) for row in rows] == [(name, k) for name in ids for k in (0, 1)]
    for row in rows:
        new, _, _, processor = stock(tmp_path / "model", row["messages"][:-1], [pictures / row["images"][0]])
        assert row["messages"][-1]["content"][0]["text"] == processor.tokenizer.decode(new, skip_special_tokens=True)
        assert row["messages"][0]["content"] == [
            {"type": "image"},
            {"type": "text", "text": QUESTIONS[row["answered_by"]["question"]]},
        ]
    assert len({row["messages"][-1]["content"][0]["text"] for row in rows}) > 1, "equal answers would prove nothing"


def test_samples_are_those_of_a_forward_pass_and_one_number_a_token(pictures, model, tmp_path):
    """Replayed by hand: softmax at temperature 0.7 of the 20 likeliest, cumulated; the model's own log-probability."""
    options = SAMPLED | {"temperature": 0.7, "top_k": 20}
    answer(None, pictures, QUESTIONS[0], tmp_path / "a.jsonl", model=model, limit=2, **options)
    for row in rows_of(tmp_path / "a.jsonl"):
        question, by = ["0.jpg", "2.jpg"].index(row["id"]), row["answered_by"]
        _, inputs, own, processor = stock(model, row["messages"][:-1], [pictures / row["id"]])
        numbers, ids, total = numbers_of(5, question, by["sample"], 0, 6), [], 0.0
        for step in range(6):
            sofar = inputs["input_ids"] if not ids else torch.cat([inputs["input_ids"], torch.tensor([ids])], 1)
            extra = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}
            kinds = {"mm_token_type_ids": (sofar == own.config.image_token_id).int()}
            logits = own(input_ids=sofar, **extra, **kinds).logits[0, -1].double()
            top = (logits / 0.7).topk(20)
            probabilities = torch.zeros_like(logits).scatter(0, top.indices, top.values.softmax(0))
            chosen = int((probabilities.cumsum(0) <= numbers[step]).sum())
            total += logits.log_softmax(0)[chosen].item()
            ids.append(chosen)
            if chosen == own.generation_config.eos_token_id:
                break
        text = processor.tokenizer.decode(ids, skip_special_tokens=True)
        assert row["messages"][-1]["content"][0]["text"] == text
        assert by["logprob"] == pytest.approx(total / len(ids), abs=2e-4)


def test_choice_follows_the_distribution():
    scores = torch.tensor([[0.1, 0.2, 0.0, 0.3, 0.4]]).log().expand(20000, 5)
    numbers = torch.tensor(numbers_of(0, 1, 0, 0, 20000), dtype=torch.float64)[:, None]
    share = torch.bincount(choose(scores, numbers).flatten(), minlength=5) / 20000
    # four standard errors
    torch.testing.assert_close(share, torch.tensor([0.1, 0.2, 0.0, 0.3, 0.4]), atol=4 * (0.24 / 20000) ** 0.5, rtol=0)
    edges = torch.tensor([[0.0], [1 - 2.0**-53]], dtype=torch.float64)
    hidden = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, 4)
    assert choose(hidden, edges).flatten().tolist() == [1, 2], "a token without probability was taken at an edge"


def test_samples_do_not_depend_on_the_batch(pictures, model, tmp_path):
    for size in (1, 3, 8):
        options = SAMPLED | {"batch_size": size, "limit": 3}
        answer(None, pictures, QUESTIONS, tmp_path / f"{size}.jsonl", model=model, **options)
    texts = [[row["messages"] for row in rows_of(tmp_path / f"{size}.jsonl")] for size in (1, 3, 8)]
    assert texts[0] == texts[1] == texts[2]
    answers = [json.dumps(messages[-1]) for messages in texts[0]]
    assert len(set(answers)) > 0.9 * len(answers), "samples that are alike would prove nothing"


def test_batches_that_do_not_fit_in_memory_are_halved(pictures, model, tmp_path, monkeypatch):
    options = SAMPLED | {"limit": 2, "samples": 2}
    answer(None, pictures, QUESTIONS, tmp_path / "a.jsonl", model=model, **options)
    true, sizes = asking.generate, []

    def small(model, inputs, **options):
        if len(inputs["input_ids"]) > room:
            raise torch.OutOfMemoryError("no room")
        sizes.append(len(inputs["input_ids"]))
        return true(model, inputs, **options)

    monkeypatch.setattr(asking, "generate", small)
    room = 1
    answer(None, pictures, QUESTIONS, tmp_path / "b.jsonl", model=model, **options)
    whole, halved = ([row["messages"] for row in rows_of(tmp_path / f"{name}.jsonl")] for name in "ab")
    assert set(sizes) == {1} and len(sizes) == 8 and whole == halved
    room = 0
    with pytest.raises(ConfigError, match="one question does not fit in memory"):
        answer(None, pictures, QUESTIONS, tmp_path / "c.jsonl", model=model, **options)


def test_conversations_are_answered_turn_by_turn(model, tmp_path):
    """The model's own first answer stands before the second question; the row's answers are not looked at."""
    Image.new("RGB", (40, 32), "red").save(tmp_path / "0.png")
    Image.new("RGB", (40, 48), "blue").save(tmp_path / "1.png")
    turns = [("system", "Be brief."), ("user", "<image>What is it?"), ("assistant", "WRONG"), ("user", "And <image>?")]
    row = {"id": "talk", "images": ["0.png", "1.png"], "messages": [{"role": r, "content": c} for r, c in turns]}
    text = {"messages": [{"role": "user", "content": "yes or no"}, {"role": "assistant", "content": "WRONG"}]}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (row, text, {"messages": []}, [])))
    found = answer(None, tmp_path / "rows.jsonl", None, tmp_path / "a.jsonl", model=model, **SHORT)
    talk, short = rows_of(tmp_path / "a.jsonl")
    assert found["unusable"] == {"bad_row": 2} and [r["role"] for r in short["messages"]] == ["user", "assistant"]
    assert (talk["id"], short["id"], short["images"]) == ("talk", "1", []) and "WRONG" not in json.dumps([talk, short])
    roles = [turn["role"] for turn in talk["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"] and talk["images"] == ["0.png", "1.png"]
    for end in (2, 4):
        new, _, _, processor = stock(model, talk["messages"][:end], [tmp_path / name for name in ("0.png", "1.png")])
        said = talk["messages"][end]["content"][0]["text"]
        assert said == processor.tokenizer.decode(new, skip_special_tokens=True) != ""


# ---- files ----


def test_answers_are_read_by_the_reader_and_trained_on(workspace, pictures, tmp_path, capsys):
    """With labelled rows in a mix: data stats, metrics, the stage's record and the model card count them apart."""
    out = tmp_path / "answered.jsonl"
    words = ["--images", pictures, "--questions", QUESTIONS[0], "--out", out, "--keep-cut", "--max-new-tokens", 5]
    config = runs.settings(workspace, tmp_path / "run", max_steps=2, per_device_train_batch_size=3)
    config["sft"] = {"start_from": "base"}
    config["data"]["train"][0]["limit"] = 7
    file = runs.write_config(config, tmp_path / "labelled.yaml")
    assert main(["data", "answer", "--config", str(file), *map(str, words)]) == 0
    told = capsys.readouterr().out
    manifest = json.loads((tmp_path / "answered.jsonl.manifest.json").read_text())
    assert manifest["teacher"]["digest"] == checkpoint_digest(workspace / "teacher")
    assert "1 truncated_image" in told and f"path: {out}" in told and f"image_root: {pictures}" in told
    kept = manifest["kept"]
    assert (kept, manifest["rows"]) == (len(rows_of(out)), 6) and kept == 5
    config["data"]["train"].append(manifest["source"])
    file = runs.write_config(config, tmp_path / "mixed.yaml")
    assert main(["data", "stats", "--config", str(file)]) == 0
    told = capsys.readouterr().out
    assert f"answered.jsonl: {kept} rows, {kept} of them answered by a model" in told
    assert f"{7 + kept} rows (7 labelled, {kept} answered by a model)" in told
    run(load_config(file), "sft")
    steps = runs.metrics(tmp_path / "run", "sft")
    record = read_record(tmp_path / "run" / "sft")
    summary = record["summary"]
    assert summary["rows"] == 12 and summary["answered_rows"] == kept == sum(step["answered_rows"] for step in steps)
    tokenizer = load_processor(workspace / "student").tokenizer
    tokens = [len(tokenizer.encode(row["messages"][-1]["content"][0]["text"])) + 1 for row in rows_of(out)]
    assert summary["answered_tokens"] == sum(tokens) == sum(step["answered_tokens"] for step in steps)
    share = f"{sum(tokens) / summary['answer_tokens']:.0%}"
    assert f"Of the 12 rows read in the last stage, 5 (42%; {share} of the answer tokens) have" in _data(record)
    record["identity"]["data"]["train"][0].pop("answered", None)  # a run from before there was the field
    write_record(tmp_path / "run" / "sft", record)
    run(load_config(file), "sft", resume=True)


def test_a_source_may_say_who_answered_it(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    lines = [{"messages": turns}, {"messages": turns, "answered_by": {"teacher": "x"}}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def found(answered):
        source = build_source([SourceConfig(reader="messages", path=str(tmp_path / "rows.jsonl"), answered=answered)])
        each = [source[i].answered_by is not None for i in range(2)]
        assert source.parts[0].answered_rows() == sum(each)
        return each

    assert found(None) == [False, True] and found(True) == [True, True] and found(False) == [False, False]


def test_built_rows_remember_who_answered_them(tmp_path, monkeypatch):
    import datasets

    from vlsi_fast.config_data import DataConfig
    from vlsi_fast.data.build import build

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    lines = [{"messages": turns}, {"messages": turns, "answered_by": {"teacher": "x"}}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    build(DataConfig(train=[{"reader": "messages", "path": str(tmp_path / "rows.jsonl")}]), tmp_path / "built")
    source = build_source(DataConfig(train=str(tmp_path / "built" / "mix.yaml")).train)
    assert [source[i].answered_by for i in range(2)] == [None, '{"teacher": "x"}']
    assert source.parts[0].answered_rows() == 1


class Killed(BaseException):
    pass


def test_what_was_interrupted_goes_on_and_gives_the_same_file(pictures, model, tmp_path, monkeypatch):
    """Killed in the third of three batches; half of the second one's line is left, and a damaged line of its own."""
    answer(None, pictures, QUESTIONS, tmp_path / "whole.jsonl", model=model, **SAMPLED)
    out, true, calls = tmp_path / "a.jsonl", asking.Answerer.answer, []

    def dying(self, batch):
        calls.append(batch)
        if len(calls) == 3:
            raise Killed
        return true(self, batch)

    monkeypatch.setattr(asking.Answerer, "answer", dying)
    with pytest.raises(Killed):
        answer(None, pictures, QUESTIONS, out, model=model, **SAMPLED)
    part = Files(out).parts / "rank-00000.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    assert len(lines) == 2 and not out.exists()
    part.write_bytes(lines[0] + lines[1][: len(lines[1]) // 2])
    with pytest.raises(LineageError, match=r"decoding.seed: there 5, now 6"):
        answer(None, pictures, QUESTIONS, out, model=model, **SAMPLED | {"seed": 6})
    with pytest.raises(LineageError, match=r"asked.questions: there 2, now 1"):
        answer(None, pictures, QUESTIONS[0], out, model=model, **SAMPLED)
    (Files(out).parts / "rank-00003.jsonl").write_bytes(b"\0\0\n")  # of a rank that there was
    calls[:] = [None] * 10
    answer(None, pictures, QUESTIONS, out, model=model, **SAMPLED | {"keep": "all"})  # filters may change
    assert len(calls) == 12, "only the two batches that were missing are answered"
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not Files(out).parts.exists()


def test_what_is_there_is_not_overwritten(pictures, model, tmp_path):
    out = tmp_path / "a.jsonl"
    out.write_text("mine\n")
    with pytest.raises(LineageError, match="is another file"):
        answer(None, pictures, QUESTIONS[0], out, model=model, limit=1, **SHORT)
    assert out.read_text() == "mine\n"
    answer(None, pictures, QUESTIONS[0], out, model=model, limit=1, fresh=True, **SHORT)
    with pytest.raises(LineageError, match="is finished; choose another --out, or --fresh"):
        answer(None, pictures, QUESTIONS[0], out, model=model, limit=1, **SHORT)
    files = Files(tmp_path / "b.jsonl")
    files.claim({}, False)
    with files.part(0), pytest.raises(LineageError, match="another process writes"), files.part(0):
        pass
    with pytest.raises(LineageError, match="lacks 2 of 2 batches"):
        list(files.merged(2))


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "options"), [("torchrun", SHORT), ("deepspeed", SAMPLED)])
def test_two_ranks_write_what_one_writes(launcher, options, pictures, model, tmp_path):
    answer(None, pictures, QUESTIONS, tmp_path / "one.jsonl", model=model, **options)
    port, bin = str(28000 + os.getpid() % 1000), Path(sys.executable).parent
    launch = {
        "torchrun": [bin / "torchrun", "--nproc_per_node", "2", "--master_port", port, "-m"],
        "deepspeed": [bin / "deepspeed", "--num_accelerators", "2", "--master_port", port, "--module"],
    }[launcher]
    (tmp_path / "questions.txt").write_text("\n".join(QUESTIONS) + "\n\n")
    words = ["--model", model, "--images", pictures, "--questions", tmp_path / "questions.txt", "--max-new-tokens", 6]
    words += ["--batch-size", 4, "--keep-cut", "--out", tmp_path / "two.jsonl"]
    words += ["--temperature", 1, "--samples", 3, "--seed", 5] if options is SAMPLED else []
    done = subprocess.run(
        [*map(str, launch), "vlsi_fast", "data", "answer", *map(str, words)],
        cwd=runs.ROOT,
        env=runs.environment(),
        timeout=runs.LIMIT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("To train on them") == 1
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


# ---- filters ----


def said(*texts, tokens=5, finished=True, repetition=0.0, **more):
    one = {"tokens": [tokens], "finished": [finished], "repetition": [repetition]}
    return [one | {"texts": [text]} | more for text in texts]


@pytest.mark.parametrize(
    ("filters", "answers", "causes"),
    [
        ({}, said("red"), [None]),
        ({}, said("red", finished=False), ["cut"]),
        ({"keep_cut": True}, said("red", finished=False), [None]),
        ({}, said(" ", cause="empty"), ["empty"]),
        ({}, said("<|im_end|>", cause="special_token"), ["special_token"]),
        ({"min_tokens": 6}, said("red"), ["too_short"]),
        ({"max_tokens": 4}, said("red"), ["too_many_tokens"]),
        ({"min_tokens": 5, "max_tokens": 5}, said("red"), [None]),
        ({"max_repetition": 0.2}, said("red", repetition=0.25), ["repetition"]),
        ({"max_repetition": 0.25}, said("red", repetition=0.25), [None]),
        ({}, said("red", "red", "blue"), [None, None, None]),
        ({"keep": "first"}, said("blue", "red", "red"), [None, "not_kept", "not_kept"]),
        ({"keep": "majority"}, said("blue", "Red.", " red"), ["not_kept", None, "not_kept"]),
        ({"min_agreement": 0.6}, said("blue", "red", "RED"), ["disagreement", None, "not_kept"]),
        ({"min_agreement": 0.6, "keep": "all"}, said("blue", "red", "RED"), ["disagreement", None, None]),
        ({"min_agreement": 0.7}, said("blue", "red", "RED"), ["disagreement"] * 3),
        # what is rejected agrees with nothing
        ({"min_agreement": 0.6}, said("red", "red") + said("red", finished=False), [None, "not_kept", "cut"]),
        ({"min_agreement": 0.6}, said("red") + said("red", "red", finished=False), ["disagreement", "cut", "cut"]),
    ],
)
def test_filters_say_why(filters, answers, causes):
    assert Filters(**filters).judge(answers)[0] == causes


def test_repetition_is_the_share_of_stretches_that_came_before():
    assert repetition([1, 2, 3]) == 0 and repetition(range(50)) == 0
    assert repetition([7] * 10) == pytest.approx(6 / 7)  # seven stretches, one kind
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert normalised("  A  Red\ncircle. ") == "a red circle"


def test_rejected_answers_are_listed_and_counted(pictures, model, tmp_path):
    """Answers that spell a special token would be read as that token in training."""
    answer(None, pictures, QUESTIONS[0], tmp_path / "all.jsonl", model=model, **SAMPLED)
    everything = rows_of(tmp_path / "all.jsonl")
    options = {k: v for k, v in SAMPLED.items() if k != "keep_cut"}
    found = answer(None, pictures, QUESTIONS[0], tmp_path / "a.jsonl", model=model, **options)
    kept, rejected = rows_of(tmp_path / "a.jsonl"), rows_of(tmp_path / "a.jsonl.rejected.jsonl")
    cut = [row for row in rejected if row["cause"] == "cut"]
    assert found["rejected"]["cut"] == len(cut) > 0 and found["kept"] == len(kept)
    assert len(everything) == len(kept) + len(cut) and found["answers"] == 15
    listed = next(row for row in rejected if row["cause"] == "truncated_image")
    assert listed["id"] == "4.jpg" and "Pillow" in listed["detail"]
    assert {"messages", "answered_by"} <= cut[0].keys()
    assert not any("<|" in json.dumps(row["messages"]) for row in everything)


def test_answers_that_spell_special_tokens_are_rejected(pictures, model, tmp_path, monkeypatch):
    def spelling(model, inputs, logits_processor, **options):
        ids = load_processor(folder).tokenizer.encode("a", add_special_tokens=False)
        spelled = [load_processor(folder).tokenizer.convert_tokens_to_ids(c) for c in "<|im_end|>"]
        logits_processor[0].logprobs.extend(torch.zeros(len(inputs["input_ids"])) for _ in ids + spelled)
        return torch.tensor([ids + spelled]).expand(len(inputs["input_ids"]), -1)

    folder = model
    monkeypatch.setattr(asking, "generate", spelling)
    found = answer(None, pictures, QUESTIONS[0], tmp_path / "a.jsonl", model=model, limit=1, **SHORT)
    assert found["rejected"] == {"special_token": 1} and found["kept"] == 0


# ---- what is asked ----


def test_questions_are_a_file_a_list_or_a_text(tmp_path):
    (tmp_path / "q.txt").write_text("\ufeffone?\n\n  two?  \n", encoding="utf-8")
    assert read_questions(tmp_path / "q.txt") == read_questions(str(tmp_path / "q.txt")) == ["one?", "two?"]
    assert read_questions("What is it? " * 500) == [("What is it? " * 500).strip()]
    assert read_questions("Why?") == ["Why?"]
    with pytest.raises(FileNotFoundError, match="gone.txt does not exist"):
        read_questions("gone.txt")
    with pytest.raises(ConfigError, match="holds no question"):
        read_questions(" ")


def test_drawn_questions_follow_from_the_seed(pictures):
    texts = [f"q{i}?" for i in range(10)]

    def drawn(seed):
        asked = Questions(pictures, texts, per_image=3, seed=seed)
        return [asked.name(i) for i in range(len(asked))]

    assert drawn(0) == drawn(0) != drawn(1) and len(drawn(0)) == 18
    rows = [tuple(k for _, k in drawn(0)[i : i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(set(row)) == list(row) for row in rows) and len(set(rows)) > 3


def test_rows_are_read_in_the_readers_formats(tmp_path):
    rows = [
        {"id": 7, "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nred?"}]},
        {"images": ["a.png"], "question": "blue?"},
        {"image": "a.png", "instruction": "What is <image1>?", "output": "x"},
        {"messages": [{"role": "user", "content": [{"type": "image", "url": "a.png"}, {"type": "text", "text": "?"}]}]},
        {"image": "a.png"},
        {"messages": [{"role": "assistant", "content": "hello"}]},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    asked = Questions(tmp_path / "rows.json", None)
    first = asked[0]
    assert first.id == "7" and first.images[0].path == "a.png" and first.images[0].root == str(tmp_path)
    assert first.turns == [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "red?"}]}]]
    assert [asked[i].turns[0][0]["content"][-1]["text"] for i in (1, 2, 3)] == ["blue?", "?", "?"]
    for i, message in ((4, "none of the columns"), (5, "no user turn")):
        with pytest.raises(UnusableRow, match=message):
            asked[i]
    given = Questions(tmp_path / "rows.json", ["Is <image> red?"])
    assert all(len(given[i].images) == 1 for i in range(5))
    assert [part["type"] for part in given[3].turns[0][0]["content"]] == ["text", "image", "text"]
    with pytest.raises(UnusableRow, match="no picture"):
        given[5]
    turns = [{"role": role, "content": []} for role in ("assistant", "system", "user", "user", "assistant", "user")]
    assert [[t["role"] for t in group] for group in turns_of(turns)] == [["system", "user", "user"], ["user"]]


def test_rows_that_the_processor_refuses_are_told_apart(pictures, workspace, model, tmp_path):
    """A picture 300 times as wide as high, a question too long for data.max_length. A spelt image token is text."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "good.png")
    Image.new("RGB", (3000, 8), "red").save(tmp_path / "wide.png")
    asked = [
        ("good.png", "red?"),
        ("wide.png", "red?"),
        ("good.png", "red " * 200),
        ("good.png", "a <|image_pad|>?"),
        ("../out.png", "red?"),
        ("good.png", "blue?"),
    ]
    lines = [json.dumps({"image": image, "question": question}) for image, question in asked]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    config = runs.settings(workspace, tmp_path / "run")
    config["data"]["max_length"] = 100
    file = runs.write_config(config, tmp_path / "c.yaml")
    found = answer(file, tmp_path / "rows.jsonl", None, tmp_path / "a.jsonl", **SHORT)
    assert found["unusable"] == {"bad_row": 1, "too_long": 1, "path_outside_image_root": 1} and found["answers"] == 3
    rejected = {row["id"]: row["detail"] for row in rows_of(tmp_path / "a.jsonl.rejected.jsonl") if "detail" in row}
    assert "refuses the row" in rejected["1"] and "max_length is 100" in rejected["2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "2"], "--samples 2 is for sampling"),
        (["--top-p", "0.9"], "--top-p 0.9 is for sampling"),
        (["--top-p", "1.5"], "probability"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--min-agreement", "0.5"], "set --samples"),
        (["--max-repetition", "2"], "a share, from 0 to 1"),
        (["--min-tokens", "9", "--max-tokens", "3"], "below --min-tokens"),
        (["--min-tokens", "900"], "above --max-new-tokens"),
        (["--questions-per-image", "2"], "there are 1"),
        (["--image-root", "x"], "--image-root is for rows"),
        (["--limit", "0"], "--limit is 0"),
        (["--images", "gone"], "gone does not exist"),
        (["--images", "README.md"], "rows in a .json or .jsonl file"),
        (["--model", "./gone"], "does not exist"),
        (["--teacher.mode", "zero3"], "cannot answer"),
        (["--teacher.mode", "int8", "--device", "cpu"], "needs an NVIDIA GPU"),
        (["--teacher.mod", "x"], "teacher.mod"),
    ],
)
def test_bad_input_names_the_fix(words, message, pictures, workspace, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(runs.ROOT)
    config = runs.write_config(runs.settings(workspace, tmp_path / "run"), tmp_path / "c.yaml")
    given = ["--images", pictures, "--questions", "What?", "--config", config, "--out", tmp_path / "a.jsonl", *words]
    assert main(["data", "answer", *map(str, given)]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.glob("a.jsonl*"))


def test_someone_must_answer_something(pictures, tmp_path, capsys):
    base = ["data", "answer", "--images", str(pictures), "--out", str(tmp_path / "a.jsonl")]
    for words, message in [
        (["--questions", "What?"], "say who answers"),
        (["--model", "x", "--teacher.mode", "nf4"], "--teacher.mode overrides"),
        (["--config", "configs/demo.yaml"], "give --questions"),
    ]:
        assert main([*base, *words]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="holds no pictures"):
        Questions(tmp_path, "What?")
