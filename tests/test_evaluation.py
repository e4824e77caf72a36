"""`vlsi-fast eval` on rows of one's own: metrics, intervals, answers in batches, the command."""

import json
import math
import random
from collections import Counter
from itertools import product
from typing import get_args

import pytest
import tiny_demo
import tiny_families
import tiny_runs as runs
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from vlsi_fast.cli import main
from vlsi_fast.config_data import DataConfig, SourceConfig
from vlsi_fast.data.processors import load_processor
from vlsi_fast.data.sources import build_source
from vlsi_fast.demo.pictures import facts
from vlsi_fast.evaluation.answers import answer_rows
from vlsi_fast.evaluation.arguments import READERS
from vlsi_fast.evaluation.intervals import mcnemar, paired_difference, wilson
from vlsi_fast.evaluation.metrics import exact_match, question_type, relaxed_match
from vlsi_fast.evaluation.report import short_names
from vlsi_fast.lineage import write_record


@pytest.mark.parametrize(
    ("prediction", "answer", "relaxed"),
    [
        ("3.14", "3", True),
        ("3.15", "3", True),
        ("3.16", "3", False),
        ("2.85", "3", True),
        ("-3", "3", False),
        ("12.5%", "12%", True),
        ("12%", "0.12", True),
        ("12", "12%", False),
        ("-95", "-100", True),
        ("0", "0", True),
        ("0.0", "0", False),
        ("0.01", "0", False),
        ("1", "0", False),
        ("nan", "nan", True),
        ("inf", "5", False),
        ("5", "inf", False),
        ("", "5", False),
        ("five", "5", False),
        (" Yes", "yes ", True),
        ("yes", "no", False),
        ("%", "5", False),
        ("1,000", "1000", False),
    ],
)
def test_relaxed_accuracy_is_chartqas(prediction, answer, relaxed):
    assert relaxed_match(prediction, answer) is relaxed
    assert exact_match(prediction, answer) is (prediction.strip().lower() == answer.strip().lower())


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("Yes", "yes/no"),
        ("no.", "yes/no"),
        ("A", "choice"),
        ("(d)", "choice"),
        ("b.", "choice"),
        ("7", "number"),
        ("1,234.5", "number"),
        ("12%", "number"),
        ("-3", "number"),
        ("red", "other"),
        ("a circle", "other"),
        ("", "other"),
    ],
)
def test_types_follow_from_the_answer(answer, kind):
    assert question_type(answer) == kind


@pytest.mark.parametrize(
    ("x", "n", "low", "high"),  # Newcombe (1998), Statistics in Medicine 17:857, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_published_intervals(x, n, low, high):
    assert wilson(x, n) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))
    assert wilson(n - x, n) == pytest.approx((1 - wilson(x, n)[1], 1 - wilson(x, n)[0]))


def test_shares_without_rows_are_refused():
    for bad in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="no share"):
            wilson(*bad)
    with pytest.raises(ValueError, match="no table of pairs"):
        paired_difference(3, 3, 5)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 1), (2, 9), (5, 5), (7, 6), (0, 12)])
def test_mcnemar_counts_the_outcomes_at_least_as_unequal(b, c):
    outcomes = [abs(2 * sum(flips) - b - c) >= abs(b - c) for flips in product((0, 1), repeat=b + c)]
    assert mcnemar(b, c) == mcnemar(c, b) == pytest.approx(sum(outcomes) / len(outcomes))


def test_mcnemar_of_many_rows():
    assert mcnemar(5000, 5200) == pytest.approx(math.erfc((199 / math.sqrt(10200)) / math.sqrt(2)), rel=1e-3)
    assert mcnemar(0, 4000) == 0.0  # less than any float


@pytest.mark.parametrize(("n", "b", "c"), [(80, 0.10, 0.25), (20, 0.05, 0.10)])
def test_paired_interval_covers_the_true_difference(n, b, c):
    """95% of 2,000 draws of n pairs, less 1.5 points (three standard errors); the method is a little cautious."""
    draw, covered = random.Random(0), 0
    for _ in range(2000):
        cells = Counter(draw.choices("bc=", weights=(b, c, 1 - b - c), k=n))
        low, high = paired_difference(cells["b"], cells["c"], n)
        covered += low <= c - b <= high
    assert 0.935 <= covered / 2000 <= 0.985


def write_rows(folder, turns):
    """JSONL of (question, answer, number of images); images of different sizes."""
    lines = []
    for i, (question, answer, images) in enumerate(turns):
        paths = [f"{i}_{k}.png" for k in range(images)]
        for k, path in enumerate(paths):
            Image.new("RGB", (40 + 16 * k, 32 + 8 * i), runs.COLORS[(i + k) % 6]).save(folder / path)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"images": paths, "messages": messages}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return DataConfig(
        **{key: [{"reader": "messages", "path": str(folder / "rows.jsonl")}] for key in ("train", "eval")}
    )


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])
@pytest.mark.parametrize("beams", [1, 5])
def test_answers_in_batches_are_those_of_stock_generate_row_by_row(tmp_path, family, beams):
    """Prompts of different lengths with none, one and two images; the reference is padded by nothing."""
    data = write_rows(
        tmp_path,
        [
            ("What is it?", "red", 1),
            ("Is there a red circle, or a blue rectangle, or no shape?", "no", 2),
            ("yes or no", "yes", 0),
            ("<image>Is <image> this the same shape as the first?", "yes", 2),
        ],
    )
    tiny_families.save(tmp_path / "model", family)
    options = {"max_new_tokens": 6, "num_beams": beams}
    found = [row for row in answer_rows(tmp_path / "model", data, skipped=Counter(), batch_size=3, **options)]
    processor = load_processor(tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32)
    rows = build_source(data.eval)
    assert [row.id for row in found] == [rows.row_id(i) for i in range(4)]
    for i, row in enumerate(found):
        images = iter([Image.open(tmp_path / f"{i}_{k}.png") for k in range(len(rows[i].images))])
        turns = [
            {
                **turn,
                "content": [p | ({"image": next(images)} if p["type"] == "image" else {}) for p in turn["content"]],
            }
            for turn in rows[i].messages[:-1]
        ]
        inputs = processor.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        new = model.generate(**inputs, do_sample=False, **options)[0, inputs["input_ids"].shape[1] :]
        assert row.prediction == processor.tokenizer.decode(new, skip_special_tokens=True), row
    assert len({row.prediction for row in found}) > 1, "rows that answer alike would prove nothing"


def test_types_come_from_the_rows_own_column(tmp_path):
    rows = [
        {"instruction": "2 + 2?", "output": 4, "kind": "sum"},
        {"instruction": "red?", "output": "no", "kind": None},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))

    def types(**fields):
        source = build_source([SourceConfig(path=str(tmp_path / "rows.json"), **fields)])
        return [source[i].type for i in range(2)]

    assert types(reader="qa", type_column="kind") == ["sum", "(none)"] and types(reader="qa") == [None, None]
    import datasets

    datasets.Dataset.from_list([row | {"output": str(row["output"])} for row in rows]).save_to_disk(tmp_path / "saved")
    saved = {"reader": "qa", "path": str(tmp_path / "saved")}
    assert build_source([SourceConfig(**saved, type_column="kind")])[0].type == "sum"
    with pytest.raises(ValueError, match=r"type_column: no column 'type'.* it has instruction, output, kind"):
        build_source([SourceConfig(**saved, type_column="type")])
    with pytest.raises(ValueError, match="type_column is for reader llava and messages"):
        SourceConfig(reader="easy_vqa", type_column="kind")
    turns = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}
    (tmp_path / "llava.json").write_text(json.dumps([{"conversations": turns, "kind": "chat"}]))
    assert (
        build_source([SourceConfig(reader="llava", path=str(tmp_path / "llava.json"), type_column="kind")])[0].type
        == "chat"
    )


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of which only the end is there: the demo's untrained student as trained student, and a record."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "sft").mkdir()
    tiny_demo.make_student(folder / "sft" / "student")
    drawings = tiny_demo.write_drawings(folder / "drawings", 14) | {"type_column": "kind"}
    data = {"train": [{"reader": "easy_vqa"}], "eval": [drawings]}
    config = {"output_dir": str(folder), "teacher": {"path": "t"}, "student": {"path": "s"}, "data": data}
    write_record(folder / "sft", {"stage": "sft", "state": "finished", "config": config})
    return folder


def evaluate(capsys, *words) -> dict:
    assert main(["eval", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_and_a_model_side_by_side(run_folder, tmp_path, capsys):
    """Every number told follows from the answers written."""
    file, teacher_name = tmp_path / "answers.jsonl", str(tiny_demo.TEACHER)
    words = ["--run", run_folder, "--model", teacher_name, "--predictions", file, "--max-new-tokens", 64]
    found = evaluate(capsys, *words, "--batch-size", 8, "--limit", 12)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    student, teacher = ([line for line in lines if line["model"] == name] for name in (str(run_folder), teacher_name))
    assert len(student) == len(teacher) == 12 and [r["id"] for r in student] == [r["id"] for r in teacher]
    for name, rows in ((str(run_folder), student), (teacher_name, teacher)):
        score = found["models"][name]["exact_facts"]
        right = [facts(row["prediction"]) == facts(row["answer"]) for row in rows]
        assert (score["correct"], score["rows"]) == (sum(right), 12)
        assert score["interval"] == list(wilson(sum(right), 12))
        kinds = sorted({row["type"] for row in rows})
        assert len(kinds) > 1 and sorted(score["by_type"]) == kinds
        for kind in kinds:
            mine = [r for r, row in zip(right, rows) if row["type"] == kind]
            assert (score["by_type"][kind]["correct"], score["by_type"][kind]["rows"]) == (sum(mine), len(mine))
        assert list(score["by_source"]) == ["drawings.jsonl"]
        assert found["models"][name]["facts_f1"]["mean"] == pytest.approx(sum(r["facts_f1"] for r in rows) / 12)
    (difference,) = [each for each in found["differences"] if each["metric"] == "exact_facts"]
    pairs = [(bool(s["exact_facts"]), bool(t["exact_facts"])) for s, t in zip(student, teacher)]
    counts = pairs.count((True, False)), pairs.count((False, True))
    assert (difference["only_first"], difference["only_second"]) == counts and counts[1] > 0
    assert difference["difference"] == (counts[1] - counts[0]) / 12 and difference["p"] == mcnemar(*counts)
    assert found["models"][str(run_folder)]["path"] == str(run_folder / "sft" / "student")


def test_sources_are_told_apart_limited_and_printed(tmp_path, capsys):
    """Two sources, a row that cannot be used, and a number that is 5% off; the table shows all of it."""
    rows = [
        {"instruction": "red?", "output": "5", "image": "0.png"},
        {"instruction": "red?", "output": "no", "image": "x"},
    ]
    Image.new("RGB", (64, 64), "red").save(tmp_path / "0.png")
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows + rows[:1]))
    sources = [{"reader": "qa", "path": str(tmp_path / f"{name}.json")} for name in ("a", "b")]
    tree = {"teacher": {"path": "t"}, "student": {"path": "s"}, "output_dir": "o"}
    tree["data"] = {"train": [{"reader": "easy_vqa"}], "eval": sources}
    config = runs.write_config(tree, tmp_path / "c.yaml")
    words = ["--model", tiny_demo.TEACHER, "--config", config, "--limit", 2, "--max-new-tokens", 4]
    found = evaluate(capsys, *words)["models"][str(tiny_demo.TEACHER)]
    assert found["skipped"] == {"missing_image": 2} and found["exact_match"]["rows"] == 2
    assert {name: each["rows"] for name, each in found["exact_match"]["by_source"].items()} == {
        "a.json": 1,
        "b.json": 1,
    }
    assert main(["eval", *map(str, words)]) == 0
    text = capsys.readouterr().out
    assert "a.json" in text and "2 rows could not be used (missing_image 2)" in text and "teacher" in text


def test_bad_input_says_what_to_do(run_folder, tmp_path, capsys):
    model = ("--model", str(tiny_demo.TEACHER))
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": "red?", "output": "no", "image": "gone.png"}]))
    data = ("--data", str(rows), "--reader", "qa")
    for words, code, message in [
        ((), 2, "name a model"),
        (model, 2, "say what to answer"),
        ((*model, *model, *data), 2, "named twice"),
        ((*model, "--data", str(rows)), 2, "go together"),
        ((*model, "--reader", "qa"), 2, "go together"),
        ((*model, *data, "--config", "configs/demo.yaml"), 2, "remove one"),
        ((*model, *data, "--student.path", "x"), 2, "only --data.FIELD"),
        ((*model, *data, "--data.eval.0.question_colum", "x"), 2, "question_column"),
        ((*model, *data, "--out", "x"), 2, "--out is for --benchmarks"),
        ((*model, *data), 1, "no row could be scored (missing_image 1)"),
        (("--model", str(tmp_path), *data), 2, "no checkpoint"),
        (("--run", str(tmp_path)), 2, "holds no run"),
        (("--run", str(run_folder), "--data.eval", "[]"), 2, "no data.eval"),
        ((*model, "--data", str(tmp_path / "no.json"), "--reader", "qa"), 2, "does not exist"),
    ]:
        assert main(["eval", *words]) == code, words
        assert message in capsys.readouterr().err, words
    with pytest.raises(SystemExit):
        main(["eval", *model, *data, "--limit", "0"])
    assert "1 or more" in capsys.readouterr().err


def test_names_are_as_short_as_tells_them_apart():
    assert short_names(["runs/a/sft/student", "runs/b/sft/student"]) == {
        "runs/a/sft/student": "a/sft/student",
        "runs/b/sft/student": "b/sft/student",
    }
    assert list(short_names(["x/student/", "teacher"]).values()) == ["student", "teacher"]


def test_readers_of_the_options_are_those_of_the_sources():
    assert set(READERS) == set(get_args(SourceConfig.model_fields["reader"].annotation))
