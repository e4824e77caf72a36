"""Whatever a row or a file of rows holds: it is used, or skipped with a known cause. Made up by Hypothesis."""

import base64
import contextlib
import io
import json

import pyarrow
import pytest
import tiny
import tiny_families
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vlsi_fast.config_data import DataConfig
from vlsi_fast.data.build import _convert
from vlsi_fast.data.dataset import NoUsableRowError, VlsiDataset
from vlsi_fast.data.encoding import IGNORED, encode
from vlsi_fast.data.images import ImageRef, load_image
from vlsi_fast.data.messages import Sample
from vlsi_fast.data.plaintext import special_tokens
from vlsi_fast.data.skipped import CAUSES, UnusableRow
from vlsi_fast.data.sources import build_source

# the same examples in every run, so that a change that breaks nothing fails nothing
quick = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
TINY = tiny.make_processor(min_pixels=784, max_pixels=3136)


def png(**options):
    buffer = io.BytesIO()
    Image.effect_noise((30, 20), 90).save(buffer, "PNG", **options)
    return buffer.getvalue()


PNG = png()
URI = "data:image/png;base64," + base64.b64encode(PNG).decode()
WORDS = ["<image>", *tiny.SPECIAL_TOKENS, "<|im_", "end|>", "\n", " ", "red", "\ud800", "\0", "犬", "{{ 7 }}", "\ue000"]
text = st.one_of(st.lists(st.sampled_from(WORDS), max_size=6).map("".join), st.text(st.characters(), max_size=8))
names = ["role", "content", "from", "value", "type", "text", "image", "images", "url", "path", "bytes", "image_url"]
names += ["messages", "conversations", "instruction", "output", "options", "kind"]
plain = [
    "user",
    "assistant",
    "human",
    "gpt",
    "system",
    "text",
    "image",
    URI,
    "data:,x",
    "data:;base64,é",
    "../x",
    "a.png",
]
leaf = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), text, st.sampled_from(plain))
values = st.recursive(
    leaf,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(names), inner, max_size=5)),
    max_leaves=20,
)
part = st.one_of(
    st.builds(lambda t: {"type": "text", "text": t}, text), st.just({"type": "image", "image": URI}), values
)
content = st.one_of(text, st.lists(part, max_size=4), values)
role = st.one_of(st.sampled_from(["user", "assistant", "system"]), values)
turns = st.lists(st.builds(lambda r, c: {"role": r, "content": c}, role, content), max_size=5)
said = st.lists(
    st.builds(lambda r, c: {"from": r, "value": c}, st.one_of(st.sampled_from(["human", "gpt"]), values), content)
)
image = st.one_of(st.none(), st.sampled_from([URI, [URI, URI], "a.png"]), values)
rows = st.one_of(
    st.builds(lambda m, i: {"messages": m, "images": i}, turns, image),
    st.builds(lambda m, i: {"conversations": m, "image": i}, said, image),
    st.builds(
        lambda q, a, o, i, k: {"instruction": q, "output": a, "options": o, "image": i, "kind": k},
        content,
        content,
        values,
        image,
        values,
    ),
    values,
)
READERS = [{"reader": "messages"}, {"reader": "llava"}, {"reader": "qa", "options_column": "options"}]


def check(config: DataConfig) -> None:
    """Every row of the source, in training and in `data build`."""
    source, bounds = build_source(config.train), (config.max_image_pixels, config.max_row_pixels)
    for i in range(len(source)):
        try:
            row = encode(source[i], TINY, config, load_image)
            assert (row["labels"] != IGNORED).any()
        except UnusableRow as error:
            # nothing that Hypothesis makes may reach the catch-all: each has a cause that says more
            assert error.cause in CAUSES and error.cause != "unexpected_error", error
            json.dumps(source.skip_record(i, error), ensure_ascii=False).encode()
        made = _convert(source, bounds, i)
        assert made.get("cause") != "unexpected_error"
        pyarrow.Table.from_pylist([made])
    dataset = VlsiDataset(source, {"student": TINY}, config)
    with contextlib.suppress(NoUsableRowError):
        assert len(dataset[0]["skipped"]) < len(source)


@pytest.mark.parametrize("reader", READERS, ids=lambda each: each["reader"])
@quick
@given(st.lists(rows, min_size=1, max_size=3))
def test_any_rows(tmp_path, reader, found):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [found[0], {}, *found[1:]]))
    source = reader | {"path": str(path), "type_column": "kind"}
    check(DataConfig(train=[source], max_length=300))


@quick
@given(st.lists(rows, min_size=1, max_size=3), st.data())
def test_any_bytes(tmp_path, found, data):
    whole = bytearray(
        json.dumps(found).encode() if data.draw(st.booleans()) else "\n".join(map(json.dumps, found)).encode()
    )
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(whole)))
        whole[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    (tmp_path / "rows.json").write_bytes(whole)
    config = DataConfig(train=[{"reader": "messages", "path": str(tmp_path / "rows.json")}], max_length=300)
    try:
        build_source(config.train)
    except ValueError as error:  # no file of rows: said at load, with its path
        assert "rows.json" in str(error)
        return
    check(config)


@quick
@given(st.data(), st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "ICO", "TGA", "PCX"]))
def test_any_image(data, kind):
    buffer = io.BytesIO()
    Image.effect_noise((30, 20), 90).save(buffer, kind)
    whole = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(0, 6))):
        at = data.draw(st.integers(0, min(len(whole), 200)))
        whole[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    try:
        assert load_image(ImageRef(data=bytes(whole) or b"\0"), 10**5).mode == "RGB"
    except UnusableRow as error:
        assert error.cause in ("truncated_image", "decompression_bomb")


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_onevision"])
@quick
@given(st.lists(st.tuples(st.lists(text, max_size=3), st.lists(text, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_no_text_makes_a_special_token(family, said):
    """The special tokens of a row are those of the same conversation in harmless words."""
    processor = PROCESSORS[family]

    def sample(change):
        turns = []
        for question, answer in said:
            for role, texts in (("user", question), ("assistant", answer)):
                turns.append({"role": role, "content": [{"type": "text", "text": change(t)} for t in texts]})
        return Sample("r", turns)

    config = DataConfig(train=[{"reader": "easy_vqa"}])
    try:
        row = encode(sample(lambda t: t), processor, config, None)
    except UnusableRow as error:
        assert error.cause in ("empty_answer", "bad_row", "too_long")
        return
    harmless = encode(sample(lambda t: "x" if t.strip() else t), processor, config, None)
    special = set(special_tokens(processor).values())
    for name in ("input_ids", "labels"):
        made, expected = ([i for i in each[name][0].tolist() if i in special] for each in (row, harmless))
        assert made == expected


PROCESSORS = {name: tiny_families.make_processor(name) for name in ("qwen2_vl", "llava_onevision")}
