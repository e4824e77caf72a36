"""`vlsi-fast data`: conversion, interruption, verification."""

import hashlib
import json

import pytest
import tiny_mix
import yaml

import vlsi_fast.data.build as building
from vlsi_fast.cli import main
from vlsi_fast.config_data import DataConfig
from vlsi_fast.data.build import BuildError, build
from vlsi_fast.data.images import image_bytes
from vlsi_fast.data.manifest import shards_of, verify
from vlsi_fast.data.skipped import TooManySkippedRows
from vlsi_fast.data.sources import build_source


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")


@pytest.fixture
def data(tmp_path):
    """Two sources, 40 and 6 rows; four rows of the first cannot be used."""
    rows = [tiny_mix.llava(f"{i}.png", "<image>\nWhat?", f"row {i}") for i in range(40)]
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.png").write_bytes(tiny_mix.png(i))
    (folder / "3.png").unlink()
    (folder / "4.png").write_bytes(tiny_mix.png()[:50])
    rows[5]["image"] = "../outside.png"
    rows[38]["conversations"][1]["value"] = " "
    (folder / "a.json").write_text(json.dumps(rows))
    text = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": str(i)}]} for i in range(6)
    ]
    text[0]["messages"][0]["content"] = "What is <image> in HTML?"
    (folder / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text))
    sources = [
        {"reader": "llava", "path": "a.json", "name": "pictures", "weight": 3},
        {"reader": "messages", "path": "b.jsonl", "weight": 1, "placeholder": "<|image|>"},
    ]
    (folder / "mix.yaml").write_text(yaml.safe_dump({"root": ".", "sources": sources}))
    return DataConfig(train=str(folder / "mix.yaml"), max_skipped_share=0.2)


DROPPED = {"empty_answer": 1, "missing_image": 1, "path_outside_image_root": 1, "truncated_image": 1}


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "skipped_rows.jsonl"
    }


def rows_of(source):
    return [(source[i].messages, [image_bytes(ref) for ref in source[i].images]) for i in range(len(source))]


def test_a_built_folder_holds_the_rows_and_the_images_own_bytes(data, tmp_path):
    manifest = build(data, tmp_path / "out", shard_bytes=1000)
    assert manifest["rows"] == 42 and manifest["dropped"] == DROPPED
    assert manifest["sources"]["pictures"]["rows_read"] == 40 and manifest["sources"]["b.jsonl"]["dropped"] == {}
    assert len(manifest["sources"]["pictures"]["shards"]) > 2 and verify(tmp_path / "out") == []
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped_rows.jsonl").read_text().splitlines()]
    assert [row["id"] for row in listed] == [f"pictures#{i}" for i in (3, 4, 5, 38)]
    built = DataConfig(train=str(tmp_path / "out" / "mix.yaml"))
    assert [source.weight for source in built.train] == [3, 1]
    source = build_source(built.train)
    assert [part.name for part in source.parts] == ["pictures", "b.jsonl"] and source.sizes == [36, 6]
    kept = [i for i in range(46) if i not in (3, 4, 5, 38)]
    before = build_source(data.train)
    assert rows_of(source) == [(before[i].messages, [image_bytes(ref) for ref in before[i].images]) for i in kept]


def test_the_same_input_gives_the_same_bytes(data, tmp_path):
    for name, workers in (("one", 0), ("two", 2)):
        build(data, tmp_path / name, shard_bytes=1000, workers=workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("step", [1, 3, 9])
@pytest.mark.parametrize("place", ["row", "rename", "journal"])
def test_an_interrupted_build_goes_on(data, tmp_path, monkeypatch, step, place):
    build(data, tmp_path / "whole", shard_bytes=1000)
    if step == 9 and place != "row":
        step = len(shards_of(json.loads((tmp_path / "whole" / "manifest.json").read_text())))  # the last one
    calls = []

    def fail_at(inner, at):
        def wrapped(*args, **kwargs):
            calls.append(1)
            if len(calls) == at:
                raise KeyboardInterrupt
            return inner(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        if place == "row":
            patch.setattr(building, "_convert", fail_at(building._convert, step * 4))
        elif place == "rename":
            patch.setattr(building, "sha256", fail_at(building.sha256, step))
        else:
            patch.setattr(building._Journal, "add", fail_at(building._Journal.add, step))
        with pytest.raises(KeyboardInterrupt):
            build(data, tmp_path / "out", shard_bytes=1000)
    assert not (tmp_path / "out" / "manifest.json").exists()
    with pytest.raises(ValueError, match="the build is not finished"):
        verify(tmp_path / "out")
    with pytest.raises(BuildError, match="unfinished build of other sources"):
        build(data, tmp_path / "out", shard_bytes=2000)
    (tmp_path / "out" / "pictures" / "train-00099.parquet").write_bytes(b"of a start that had other rows")
    build(data, tmp_path / "out", shard_bytes=1000)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len((tmp_path / "out" / "skipped_rows.jsonl").read_text().splitlines()) == 4


def test_a_finished_build_is_left_alone_and_other_folders_are_refused(data, tmp_path):
    build(data, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    build(data, tmp_path / "out")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    with pytest.raises(BuildError, match="a build of other sources or options"):
        build(data, tmp_path / "out", shard_bytes=5)
    with pytest.raises(BuildError, match="is not empty"):
        build(data, tmp_path / "in")
    with pytest.raises(TooManySkippedRows, match="4 of the dataset's 46 rows"):
        build(data.model_copy(update={"max_skipped_share": 0.05}), tmp_path / "strict")


def test_damage_is_found(data, tmp_path):
    out = tmp_path / "out"
    build(data, out, shard_bytes=1000)
    first, second, third = sorted((out / "pictures").glob("*.parquet"))[:3]
    flipped = bytearray(first.read_bytes())
    flipped[60] ^= 1
    first.write_bytes(flipped)
    second.write_bytes(second.read_bytes()[:-1])
    third.rename(third.with_name("train-99999.parquet"))
    problems = verify(out)
    for part in (
        "train-00000.parquet has changed",
        "bytes, ",
        "train-00002.parquet is missing",
        "99999.parquet is not in",
    ):
        assert any(part in problem for problem in problems), part
    assert len(problems) == 4 and len(verify(out, checksums=False)) == 3
    with pytest.raises(ValueError, match=r"data.train\[0\].*train-00001.parquet has .* bytes"):
        build_source(DataConfig(train=str(out / "mix.yaml")).train)


def test_commands(data, tmp_path, capsys):
    mix, out = str(tmp_path / "in" / "mix.yaml"), str(tmp_path / "out")
    command = ["data", "build", "--config", mix, "--out", out, "--shard-size", "1KB"]
    assert main(command) == 1 and "cannot be used" in capsys.readouterr().err
    assert main([*command, "--data.max_skipped_share", "0.2"]) == 0
    text = capsys.readouterr().out
    assert "pictures: 36 of 40 rows; dropped: empty_answer 1" in text and "42 rows, 4 dropped" in text
    assert main(["data", "verify", out]) == 0 and "42 rows" in capsys.readouterr().out
    assert main(["data", "stats", "--config", f"{out}/mix.yaml"]) == 0
    assert "pictures: 36 rows, weight 3; 36 an epoch (75.00%)" in capsys.readouterr().out
    assert main(["data", "verify", str(tmp_path)]) == 2 and "no manifest.json" in capsys.readouterr().err
    assert main(["data", "stats", "--config", mix, "--data.rot", "x"]) == 2
    assert "data.rot: no such option; did you mean data.root?" in capsys.readouterr().err
    assert main(["data", "stats", "--config", mix, "--seed", "1"]) == 2
    next(tmp_path.glob("out/*/*.parquet")).unlink()
    assert main(["data", "verify", out, "--quick"]) == 1 and "is missing" in capsys.readouterr().err


def test_the_whole_mix_builds(tmp_path):
    counts = tiny_mix.make_downloads(tmp_path / "root")
    data = DataConfig(train=tiny_mix.mix_config(tmp_path / "root", counts))
    manifest = build(data, tmp_path / "out")
    assert manifest["dropped"] == {} and {name: s["rows"] for name, s in manifest["sources"].items()} == counts
    built = build_source(DataConfig(train=str(tmp_path / "out" / "mix.yaml")).train)
    assert rows_of(built) == rows_of(build_source(data.train))
