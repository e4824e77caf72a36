"""Every reader, and the errors of the config and of missing files."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from vlsi_fast.config_data import DataConfig, SourceConfig
from vlsi_fast.data.images import load_image
from vlsi_fast.data.skipped import UnusableRow
from vlsi_fast.data.sources import build_source

IMAGE, TEXT = "image", "text"


def png(color=(255, 0, 0), size=(8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def kinds(sample):
    """The conversation in short: [(role, [text or IMAGE, ..]), ..]."""
    return [(message["role"], [part.get("text", IMAGE) for part in message["content"]]) for message in sample.messages]


def one(reader, path, **options):
    return build_source([SourceConfig(reader=reader, path=str(path), **options)])


LLAVA_ROWS = [
    {
        "id": "a",
        "image": "one.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A dog."},
            {"from": "human", "value": "Which colour?"},
            {"from": "gpt", "value": "Brown."},
        ],
    },
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    {
        "image": ["one.png", "two.png"],
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Compare <image> with\n<image>"},
            {"from": "gpt", "value": "The tag is <image>."},
        ],
    },
    {"image": "one.png", "conversations": [{"from": "human", "value": "No tag"}, {"from": "gpt", "value": "ok"}]},
]
LLAVA_KINDS = [
    [
        ("user", [IMAGE, "What is it?"]),
        ("assistant", ["A dog."]),
        ("user", ["Which colour?"]),
        ("assistant", ["Brown."]),
    ],
    [("user", ["Hi"]), ("assistant", ["Hello"])],
    [
        ("system", ["Be brief."]),
        ("user", ["Compare ", IMAGE, " with", IMAGE]),
        ("assistant", ["The tag is <image>."]),
    ],
    [("user", [IMAGE, "No tag"]), ("assistant", ["ok"])],
]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "lines.json"])
def test_llava(tmp_path, name):
    text = json.dumps(LLAVA_ROWS, indent=1) if name == "rows.json" else "\n\n".join(map(json.dumps, LLAVA_ROWS))
    (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
    source = one("llava", tmp_path / name)
    samples = [source[i] for i in range(len(source))]
    assert [kinds(sample) for sample in samples] == LLAVA_KINDS
    assert [[ref.path for ref in sample.images] for sample in samples] == [
        ["one.png"],
        [],
        ["one.png", "two.png"],
        ["one.png"],
    ]
    assert all(ref.root == str(tmp_path.resolve()) for sample in samples for ref in sample.images)
    assert [sample.id for sample in samples] == [f"{name}#{i}" for i in range(4)]


def test_messages(tmp_path):
    address = "data:image/png;base64," + base64.b64encode(png()).decode()
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
                {"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "image", "image": "2.png"}]},
                {"role": "assistant", "content": "d"},
                {"role": "user", "content": [{"type": "image", "image": None}, {"type": "text", "text": "e"}]},
                {"role": "assistant", "content": "f"},
            ],
            "images": ["1.png", "3.png"],
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": address}}]},
                {"role": "assistant", "content": "x"},
            ]
        },
        {
            "messages": [{"role": "user", "content": "see <image>?"}, {"role": "assistant", "content": "yes"}],
            "images": ["1.png"],
        },
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = one("messages", tmp_path / "m.jsonl")
    assert kinds(source[0]) == [("user", ["Hi"]), ("assistant", ["Hello"])]
    assert [ref.path for ref in source[1].images] == ["1.png", "2.png", "3.png"]
    assert kinds(source[1])[2] == ("user", ["c", IMAGE])
    assert load_image(source[2].images[0]).size == (8, 6)
    assert kinds(source[3])[0] == ("user", ["see ", IMAGE, "?"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "the row is list"),
        ({"messages": []}, "missing, empty or not a list"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role is 'tool'"),
        ({"messages": [{"role": "user", "content": 3}]}, "content of a user turn is int"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "part of type 'video'"),
        ({"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}, "image in a assistant turn"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "1 image parts without a path, but 0"),
        ({"messages": [{"role": "user", "content": "<image>"}]}, "1 <image> placeholders, but 0 images"),
        ({"messages": [{"role": "user", "content": "<image>"}], "images": ["a", "b"]}, "1 <image> .* but 2 images"),
        ({"messages": [{"role": "system", "content": "s"}], "images": ["a"]}, "no user turn to put them in"),
        ({"messages": [{"role": "user", "content": "s"}], "images": [3]}, "an image is int"),
    ],
)
def test_bad_messages_rows(tmp_path, row, message):
    (tmp_path / "m.jsonl").write_text("{}\n" + json.dumps(row) + "\n")
    with pytest.raises(UnusableRow, match=message) as error:
        one("messages", tmp_path / "m.jsonl")[1]
    assert error.value.cause == "bad_row"


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": "x"},
        {"conversations": [{"from": "robot", "value": "x"}]},
        {"conversations": [{"from": "human", "value": None}]},
        {"conversations": [{"from": "human", "value": "<image> <image>"}], "image": "a.png"},
    ],
)
def test_bad_llava_rows(tmp_path, row):
    (tmp_path / "m.json").write_text(json.dumps([row]))
    with pytest.raises(UnusableRow) as error:
        one("llava", tmp_path / "m.json")[0]
    assert error.value.cause == "bad_row"


def test_a_broken_line_is_one_bad_row(tmp_path):
    good = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    (tmp_path / "m.jsonl").write_text(f'{good}\n{{"messages": [\n{good}\n')
    source = one("messages", tmp_path / "m.jsonl")
    assert len(source) == 3 and source[2].id == "m.jsonl#2" and source[-1].id == "m.jsonl#2"
    with pytest.raises(UnusableRow, match="not JSON") as error:
        source[1]
    assert error.value.cause == "bad_row"
    with pytest.raises(IndexError):
        source[3]


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def check_hf(source):
    assert len(source) == 2
    assert kinds(source[0]) == [("user", [IMAGE, "red?"]), ("assistant", ["yes"])]
    assert kinds(source[1]) == [("user", ["hi"]), ("assistant", ["ho"])] and source[1].images == []
    assert np.asarray(load_image(source[0].images[0]))[0, 0].tolist() == [255, 0, 0]


def hf_rows():
    import datasets

    features = datasets.Features(
        {
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
            "images": datasets.List(datasets.Image()),
        }
    )
    rows = {"messages": [chat("red?", "yes"), chat("hi", "ho")], "images": [[{"bytes": png(), "path": None}], []]}
    return datasets.Dataset.from_dict(rows, features=features)


def test_hf_on_disk(tmp_path):
    import datasets

    hf_rows().save_to_disk(tmp_path / "plain")
    check_hf(one("hf", tmp_path / "plain"))
    datasets.DatasetDict({"test": hf_rows()}).save_to_disk(tmp_path / "splits")
    check_hf(one("hf", tmp_path / "splits", split="test"))
    with pytest.raises(ValueError, match=r"data.train\[0\]: cannot read split 'train'.*splits test"):
        one("hf", tmp_path / "splits")


def test_hf_parquet(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "rows"
    folder.mkdir()
    hf_rows().to_parquet(folder / "train-00000-of-00001.parquet")
    check_hf(one("hf", folder / "train-00000-of-00001.parquet"))
    check_hf(one("hf", folder / "*.parquet"))
    check_hf(one("hf", folder))
    with pytest.raises(ValueError, match="data.train.0..messages_column: no column 'chat'.*messages, images"):
        one("hf", folder, messages_column="chat")
    with pytest.raises(ValueError, match="data.train.0..images_column: no column 'pictures'"):
        one("hf", folder, images_column="pictures")


def test_hf_paths_single_image_and_llava_turns(tmp_path):
    import datasets

    (tmp_path / "red.png").write_bytes(png())
    turns = [[{"from": "human", "value": "<image>\nred?"}, {"from": "gpt", "value": "yes"}]]
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"conversations": turns, "image": ["red.png"]}).save_to_disk(saved)
    sample = one("hf", saved, messages_column="conversations", image_root=str(tmp_path))[0]
    assert kinds(sample) == [("user", [IMAGE, "red?"]), ("assistant", ["yes"])]
    assert load_image(sample.images[0]).size == (8, 6)
    rows = datasets.Dataset.from_dict({"messages": [chat("a", "b")], "image": [str(tmp_path / "red.png")]})
    rows.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "decoded")
    sample = one("hf", tmp_path / "decoded", image_root=str(tmp_path))[0]
    assert kinds(sample)[0] == ("user", [IMAGE, "a"]) and load_image(sample.images[0]).size == (8, 6)


def test_easy_vqa():
    pytest.importorskip("easy_vqa")
    train = build_source([SourceConfig(reader="easy_vqa")])
    test = build_source([SourceConfig(reader="easy_vqa", split="test")])
    assert (len(train), len(test)) == (38575, 9673)
    sample = test[0]
    assert [role for role, _ in kinds(sample)] == ["user", "assistant"]
    assert kinds(sample)[0][1][0] == IMAGE and kinds(sample)[0][1][1].endswith("?")
    assert load_image(sample.images[0]).size == (64, 64)
    assert {train[i].messages[1]["content"][0]["text"] for i in range(200)} <= set(
        "circle rectangle triangle yes no red green blue black gray teal brown yellow".split()
    )


def test_easy_vqa_missing_names_the_install_command(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ImportError, match=r"data.eval\[0\] needs the package easy-vqa: pip install easy-vqa"):
        build_source([SourceConfig(reader="easy_vqa")], field="data.eval")


def test_concatenation_order_limit_and_unique_ids(tmp_path):
    for folder, n in (("a", 3), ("b", 2)):
        (tmp_path / folder).mkdir()
        rows = [{"messages": chat(f"{folder}{i}", "x")} for i in range(n)]
        (tmp_path / folder / "m.json").write_text(json.dumps(rows))
    configs = [
        SourceConfig(reader="messages", path=str(tmp_path / "a" / "m.json"), limit=2),
        SourceConfig(reader="messages", path=str(tmp_path / "b" / "m.json"), limit=50),
    ]
    source = build_source(configs)
    assert [kinds(source[i])[0][1][0] for i in range(len(source))] == ["a0", "a1", "b0", "b1"]
    assert [source.row_id(i) for i in range(4)] == ["0:m.json#0", "0:m.json#1", "1:m.json#0", "1:m.json#1"]
    assert source[3].id == source.row_id(3) == source.row_id(-1)


def test_missing_files_name_field_and_path(tmp_path):
    for reader in ("llava", "messages", "hf"):
        with pytest.raises(FileNotFoundError, match=rf"data.train\[0\].path: {tmp_path}/nothing"):
            one(reader, tmp_path / "nothing")
    (tmp_path / "rows.json").write_text("[{}]")
    with pytest.raises(FileNotFoundError, match=rf"data.train\[0\].image_root: {tmp_path}/pictures"):
        one("llava", tmp_path / "rows.json", image_root=str(tmp_path / "pictures"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1, ", "not valid JSON"), ("id,text\n", "neither a JSON list"), ("", "neither"), ("[]", "has no rows")],
)
def test_files_of_another_format(tmp_path, text, message):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match=rf"data.train\[0\].*{message}"):
        one("llava", tmp_path / "rows.json")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reader": "csv"}, "'llava', 'messages', 'hf' or 'easy_vqa'"),
        ({"reader": "llava"}, "needs path"),
        ({"reader": "hf"}, "needs path"),
        ({"reader": "easy_vqa", "path": "x"}, "remove path"),
        ({"reader": "easy_vqa", "split": "validation"}, "train and test"),
        ({"reader": "llava", "path": "x", "split": "test"}, "split has no meaning"),
        ({"reader": "llava", "path": "x", "images_column": "i"}, "images_column is for reader hf"),
        ({"reader": "llava", "path": "x", "limit": 0}, "greater than or equal to 1"),
        ({"reader": "llava", "path": "x", "folder": "y"}, "Extra inputs are not permitted"),
    ],
)
def test_source_config_errors(fields, message):
    with pytest.raises(ValidationError, match=message):
        SourceConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": []}, "train is empty"),
        ({"min_pixels": 9, "max_pixels": 8}, "min_pixels 9 > max_pixels 8"),
        ({"max_image_pixels": 178956971}, "Pillow itself"),
        ({"max_skipped_share": 1.5}, "less than or equal to 1"),
        ({"max_pixel": 3}, "Extra inputs are not permitted"),
    ],
)
def test_data_config_errors(fields, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(**{"train": [{"reader": "easy_vqa"}], **fields})


def test_config_survives_a_round_trip_and_documents_every_field():
    config = DataConfig(train=[{"reader": "easy_vqa"}], eval=[{"reader": "llava", "path": "x"}])
    assert DataConfig(**config.model_dump()) == config
    for model in (DataConfig, SourceConfig):
        assert all(field.description for field in model.model_fields.values())
