"""The ten sources of the paper's mix, counts, filters, samples, mix files, and memory."""

import json
import os
import subprocess
import sys

import pytest
import tiny_mix
import yaml
from pydantic import ValidationError

from vlsi_fast.config import ConfigError, load_config
from vlsi_fast.config_data import DataConfig, SourceConfig
from vlsi_fast.config_mix import split_sample
from vlsi_fast.data import jsonfile
from vlsi_fast.data.images import load_image
from vlsi_fast.data.readers import sampled_row
from vlsi_fast.data.skipped import UnusableRow
from vlsi_fast.data.sources import build_source

IMAGE = "image"
PAPER = {  # thousands, section 4.1(d)
    ("sharegpt4o_images",): 57, ("sharegpt4v_captions", "sharegpt4v_instruct"): 755,
    ("allava_vflan", "allava_text"): 548, ("minigemini",): 27, ("llava_hd",): 116,
    ("docowl_downstream", "docowl_reasoning"): 599, ("gllava_align", "gllava_qa"): 177, ("mathvision",): 3,
    ("mathinstruct",): 262, ("mathplus",): 304,
}  # fmt: skip


def kinds(sample):
    return [(message["role"], [part.get("text", IMAGE) for part in message["content"]]) for message in sample.messages]


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    """(root, rows of each entry) of small downloads."""
    import datasets

    root = tmp_path_factory.mktemp("downloads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        yield root, tiny_mix.make_downloads(root)


def test_the_mix_file_has_the_papers_sources_and_counts():
    rows = {
        source.name: source.count or split_sample(source.path)[1]
        for source in DataConfig(train=str(tiny_mix.MIX)).train
    }
    assert rows.keys() == {name for names in PAPER for name in names}
    for names, thousands in PAPER.items():  # 599K is 574K + 25K
        assert thousands in (sum(rows[name] for name in names) // 1000, sum(rows[name] // 1000 for name in names))
    assert sum(rows.values()) == 2_852_771
    weights = {source["name"]: source["weight"] for source in yaml.safe_load(tiny_mix.MIX.read_text())["sources"]}
    assert weights == {name: pytest.approx(count / 1000) for name, count in rows.items()}


def test_every_layout_reads_and_every_image_opens(downloads):
    root, counts = downloads
    source = build_source(tiny_mix.mix_config(root, counts))
    assert {part.name: len(part) for part in source.parts} == counts
    samples = {}
    for i in range(len(source)):
        sample = source[i]
        assert [role for role, _ in kinds(sample)] == ["user", "assistant"]
        assert all(load_image(ref).size == (32, 32) for ref in sample.images)
        samples.setdefault(sample.id.split("#")[0], []).append(sample)
    first = {name: kinds(rows[0]) for name, rows in samples.items()}
    assert first["sharegpt4o_images"] == [("user", [IMAGE, "What is it?"]), ("assistant", ["A."])]
    assert [sample.images[0].path for sample in samples["sharegpt4v_captions"]] == [
        "coco/train2017/0.jpg",
        "wikiart/2.jpg",
    ]
    assert kinds(samples["sharegpt4v_instruct"][1]) == [("user", ["Hi"]), ("assistant", ["Hello"])]
    assert [kinds(sample)[1][1] for sample in samples["allava_vflan"]] == [["P"], ["V"]]  # of two files
    assert first["allava_text"] == [("user", ["Write."]), ("assistant", ["Text."])]
    assert {sample.images[0].path.split("/")[0] for sample in samples["minigemini"]} == {
        "docvqa",
        "chartqa",
        "dvqa",
        "ai2d",
    }
    assert [sample.images[0].path for sample in samples["llava_hd"]] == [
        "arxivqa/images/1.png",
        "TextbookQA/train/1.png",
    ]
    for name in ("docowl_downstream", "docowl_reasoning"):  # <|image|> is an image there, <image> is text
        assert first[name] == [("user", [IMAGE, "What is <image> in HTML?"]), ("assistant", ["A tag."])]
    assert first["gllava_qa"][1] == ("assistant", ["qa_tuning"])
    assert first["mathvision"] == [("user", ["How many? ", IMAGE]), ("assistant", ["7"])]
    assert kinds(samples["mathvision"][1]) == [("user", [IMAGE, " Which of ?"]), ("assistant", ["B"])]
    assert first["mathinstruct"] == [("user", ["2 + 2"]), ("assistant", ["4"])]
    assert len(samples["mathplus"]) == 3 and first["mathplus"][1] == ("assistant", ["a"])


def test_choices_are_lettered_and_bad_questions_are_bad_rows(tmp_path):
    rows = [
        {"q": "Pick.", "o": ["cat", "dog"], "a": 3},
        {"q": "No answer", "a": None},
        {"q": "No column"},
        {"q": None, "a": "x"},
        {"q": "<image1> and <image2>", "a": "x", "images": ["1.png", "2.png"]},
        {"q": "<image1>", "a": "x"},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"question_column": "q", "answer_column": "a", "options_column": "o"}
    source = build_source([SourceConfig(reader="qa", path=str(tmp_path / "q.jsonl"), **columns)])
    assert kinds(source[0]) == [("user", ["Pick.\n(A) cat\n(B) dog"]), ("assistant", ["3"])]
    assert kinds(source[1])[1] == ("assistant", [""])  # an empty answer, counted as such later
    assert kinds(source[4])[0] == ("user", [IMAGE, " and ", IMAGE])
    for row, message in ((2, "no column 'a'"), (3, "'q' is NoneType"), (5, "1 <image> placeholders, but 0")):
        with pytest.raises(UnusableRow, match=message) as error:
            source[row]
        assert error.value.cause == "bad_row"


@pytest.fixture
def ten(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "x"}]} for i in range(10)
    ]
    (tmp_path / "ten.json").write_text(json.dumps(rows))
    return str(tmp_path / "ten.json")


def test_counts_are_checked(ten, capsys):
    def load(count, **more):
        return build_source([SourceConfig(reader="messages", path=ten, name="mine", count=count, **more)])

    assert len(load(10, limit=3)) == 3 and len(load(10)) == 10 and not capsys.readouterr().err
    with pytest.raises(ValueError, match=r"data.train\[0\] \(mine\): 10 rows found, 12 expected \(-16.67%\).* to 10"):
        load(12)
    load(12, count_tolerance=0.2)
    assert "10 rows found, 12 expected" in capsys.readouterr().err


def test_a_sample_comes_from_all_parts_of_the_file(ten):
    def rows(path, **more):
        source = build_source([SourceConfig(reader="messages", path=path, **more)])
        return [int(kinds(source[i])[0][1][0]) for i in range(len(source))], [
            source.row_id(i) for i in range(len(source))
        ]

    numbers, ids = rows(f"{ten}#5")
    assert [n // 2 for n in numbers] == [0, 1, 2, 3, 4] and ids == [f"ten.json#{n}" for n in numbers]
    assert rows(f"{ten}#5") == (numbers, ids) and rows(f"{ten}#10")[0] == list(range(10))
    with pytest.raises(ValueError, match="#11 asks for more rows than the 10 there are"):
        rows(f"{ten}#11")
    picked = [sampled_row(k, 100_000, 33_000) for k in range(33_000)]
    assert len(set(picked)) == 33_000 and picked == sorted(picked) and picked[-1] < 100_000
    assert 0.4 < sum(n % 2 for n in picked) / 33_000 < 0.6  # no rhythm of its own
    for fields, message in (
        ({"path": "x#5", "limit": 2}, "either limit"),
        ({"path": "x#0"}, "N >= 1"),
        ({"path": ["x#1", "y"]}, "a source of one path"),
    ):
        with pytest.raises(ValidationError, match=message):
            SourceConfig(reader="messages", **fields)


def test_mix_files_nest_in_lists_and_start_at_their_root(ten, tmp_path):
    (tmp_path / "mix.yaml").write_text("root: .\nsources: [{reader: messages, path: ten.json}]\n")
    (tmp_path / "bare.yaml").write_text("- {reader: messages, path: ten.json, limit: 2}\n")
    (tmp_path / "run.yaml").write_text("output_dir: o\nteacher: {path: t}\nstudent: {path: s}\ndata: {train: []}\n")
    mixes = [str(tmp_path / name) for name in ("mix.yaml", "bare.yaml")]
    inline = {"reader": "messages", "path": "ten.json", "limit": 1}
    config = load_config(tmp_path / "run.yaml", {"data.train": [*mixes, inline], "data.root": str(tmp_path)}).data
    assert len(build_source(config.train)) == 10 + 2 + 1
    assert DataConfig(**config.model_dump()) == config  # joined once
    assert len(build_source(DataConfig(train=mixes[0], root="/elsewhere").train)) == 10  # its own root counts
    (tmp_path / "wrong.yaml").write_text("source: []\n")
    for train, message in (
        ("gone.yaml", "data: mix file .*gone.yaml does not exist"),
        (str(tmp_path / "wrong.yaml"), "must hold `sources`.*found source"),
        ([{**inline, "weight": 1}, inline], "train.1 has no weight"),
        ([{**inline, "weigth": 1}], "did you mean data.train.0.weight"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(tmp_path / "run.yaml", {"data.train": train})


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_row_tables_hold_at_any_cut_of_the_file(tmp_path, monkeypatch, name):
    rows = [{"n": i, "text": 'é"]},{[\\' * (i % 7), "list": [1, {"a": []}]} for i in range(200)]
    text = json.dumps(rows, ensure_ascii=False, indent=1) if name == "rows.json" else None
    text = text or "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / name).write_text(f"\ufeff{text}", encoding="utf-8")
    for chunk in (7, 64, 4096):
        monkeypatch.setattr(jsonfile, "CHUNK_BYTES", chunk)
        file = jsonfile.JsonFile(tmp_path / name)
        assert [file.read(i) for i in range(len(file))] == rows
        odd = jsonfile.JsonFile(tmp_path / name, keep=lambda row: row["n"] % 2 == 1)
        assert [odd.read(i) for i in range(len(odd))] == rows[1::2]


@pytest.mark.parametrize("text", ['[{"a": 1}, {"a": ]', '[{"a": 1}', '[{"a": "\xff"}]', "[1, 2"])
def test_broken_lists_are_named(tmp_path, text):
    (tmp_path / "rows.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="rows.json is not valid JSON"):
        jsonfile.JsonFile(tmp_path / "rows.json")


def test_row_tables_are_kept_until_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(jsonfile, "CACHED_FROM_BYTES", 0)
    monkeypatch.setenv("VLSI_FAST_CACHE", str(tmp_path / "cache"))
    path, seen = tmp_path / "rows.json", []

    def keep(row):
        seen.append(row)
        return row["n"] > 0

    path.write_text('[{"n": 0}, {"n": 1}]')
    for _ in range(2):
        assert len(jsonfile.JsonFile(path, keep, "n > 0")) == 1
    assert len(seen) == 2  # the second time from the table
    assert len(jsonfile.JsonFile(path)) == 2  # another question, another table
    path.write_text('[{"n": 0}, {"n": 1}, {"n": 2}]')
    assert len(jsonfile.JsonFile(path, keep, "n > 0")) == 2
    assert not list((tmp_path / "cache").rglob("*.partial"))
    monkeypatch.setenv("VLSI_FAST_CACHE", str(path / "no folder"))
    assert len(jsonfile.JsonFile(path)) == 3


MEMORY = """
import resource, sys
import numpy, torch, vlsi_fast.data.mixing, vlsi_fast.data.sources as sources
from vlsi_fast.config_data import DataConfig
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = DataConfig(train=[{"reader": "llava", "path": path, "weight": 1} for path in sys.argv[1:]])
rows = sources.build_source(data.train)
order = vlsi_fast.data.mixing.EpochOrder(rows.sizes, 0, rows.weights)
texts = [rows[i].id for i in order.rows(0, 2000)]
print(len(rows), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """200,000 rows in 2 x 40 MB of JSON: as Python objects they take over 300 MB."""
    rows = (tiny_mix.llava(f"coco/{i}.jpg", "<image>\nWhat is it?", "word " * 50) for i in range(100_000))
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "a.json").write_text("[" + ",\n".join(lines) + "]")
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    paths = [str(tmp_path / name) for name in ("a.json", "a.jsonl")]
    environment = os.environ | {"VLSI_FAST_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", MEMORY, *paths]
    run = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=True, env=environment)
    count, grown = run.stdout.split()
    assert int(count) == 200_000
    assert float(grown) < 50, f"{grown} MiB"
