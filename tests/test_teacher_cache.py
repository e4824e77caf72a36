"""The teacher's cache itself: what is stored of a token, what a row is called, shards that are found, lost, damaged."""

import json
import pickle

import pytest
import torch
from safetensors import safe_open

from vlsi_fast.data.images import ImageRef
from vlsi_fast.data.messages import Sample
from vlsi_fast.data.skipped import UnusableRow
from vlsi_fast.teacher_cache.forms import NUMBERS, bytes_a_token_and_layer, pack_targets, unpack_targets
from vlsi_fast.teacher_cache.rows import answers_digest, row_key
from vlsi_fast.teacher_cache.store import CacheError, CacheReader, Refused, ShardWriter, forget_lost, shards_of
from vlsi_kernels import TeacherTargets, layer_kl_matrix, teacher_targets

# ---- what is stored ----


def targets_of(layers, tokens, width, vocab=257, seed=0):
    """Targets of random states, with the head and student states that they are compared with."""
    draw = torch.Generator().manual_seed(seed)
    teacher_head, head = (torch.randn(vocab, d, generator=draw) * d**-0.5 for d in (width + 8, width))
    states = torch.randn(layers, tokens, width + 8, generator=draw) * 4
    student = (torch.randn(2, tokens, width, generator=draw) * 4).requires_grad_()
    return teacher_targets(states, teacher_head, head), student, head


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_float32_comes_back_to_the_bit(temperature):
    targets, _, _ = targets_of(3, 5, 24)
    targets = targets._replace(temperature=temperature)
    found = unpack_targets(pack_targets(targets, "float32"), targets.vocab_size, temperature)
    assert torch.equal(found.neg_entropy, targets.neg_entropy) and torch.equal(found.expectation, targets.expectation)
    assert found[2:] == targets[2:]


@pytest.mark.parametrize(
    ("numbers", "kl_bar", "gradient_bar"), [("float16", 2e-3, 5e-4), ("bfloat16", 2e-2, 4e-3), ("int8", 1e-1, 2e-2)]
)
def test_rounding_costs_what_is_said(numbers, kl_bar, gradient_bar):
    """Against the exact targets, by the operator that trains. float16 has 11 bits, bfloat16 8: relative errors of 2^-12
    and 2^-9 each; int8 has 1/254 of the largest of the token and layer. Independent ones average out in a sum."""
    targets, student, head = targets_of(4, 64, 96)
    stored = unpack_targets(pack_targets(targets, numbers), targets.vocab_size, 1.0)
    results = []
    for each in (targets, stored):
        student.grad = None
        kl = layer_kl_matrix(student, head, each)
        kl.sum().backward()
        results.append((kl.detach(), student.grad.clone()))
    (kl, gradient), (rounded_kl, rounded_gradient) = results
    assert 0 < (kl - rounded_kl).abs().max() < kl_bar * kl.max()
    assert 0 < (gradient - rounded_gradient).norm() / gradient.norm() < gradient_bar


@pytest.mark.parametrize("numbers", NUMBERS)
def test_bytes_are_those_that_are_counted(numbers):
    targets, _, _ = targets_of(3, 7, 40)
    stored = pack_targets(targets, numbers)
    held = sum(value.numel() * value.element_size() for value in stored.values())
    assert held == 3 * 7 * bytes_a_token_and_layer("targets", numbers, 40)


def test_published_bytes():
    """DESIGN's: d_s 1536 and 3584; a hidden state of width 8192."""
    assert [bytes_a_token_and_layer("targets", n, 1536) for n in ("float16", "bfloat16", "int8")] == [3076, 3076, 1542]
    assert bytes_a_token_and_layer("targets", "int8", 3584) == 3590
    assert bytes_a_token_and_layer("hidden", "bfloat16", 8192) == 16384


@pytest.mark.parametrize("value", [0.0, 1e-30, 3e4])
def test_int8_of_extreme_rows(value):
    """A row of zeros, of tiny and of large numbers: finite, and within half a level."""
    targets = TeacherTargets(torch.zeros(1, 2), torch.full((1, 2, 8), value), 10, 1.0)
    found = unpack_targets(pack_targets(targets, "int8"), 10, 1.0).expectation
    assert torch.isfinite(found).all() and (found - value).abs().max() <= value / 100


# ---- what a row is called ----


def sample(tmp_path, text="what is it?", answer="a cat", image=b"pixels", name="rows#1", folder="a"):
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "x.png").write_bytes(image)
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    return Sample(name, turns, [ImageRef("x.png", str(tmp_path / folder))])


def test_a_row_is_what_it_says_and_shows(tmp_path):
    """Not its name, nor where its image lies; but each word, the image's bytes, who speaks, and where images stand."""
    key = row_key(sample(tmp_path))
    assert key == row_key(sample(tmp_path, name="other#7", folder="b"))
    as_bytes = sample(tmp_path)
    as_bytes.images = [ImageRef(data=b"pixels")]
    assert key == row_key(as_bytes)
    others = [
        sample(tmp_path, folder=f"{i}", **{name: b"other" if name == "image" else "other"})
        for i, name in enumerate(("text", "answer", "image"))
    ]
    swapped = sample(tmp_path)
    swapped.messages[0]["content"].reverse()
    roles = sample(tmp_path)
    roles.messages[0]["role"] = "system"
    split = sample(tmp_path)
    split.messages[1]["content"] = [{"type": "text", "text": "a "}, {"type": "text", "text": "cat"}]
    keys = {row_key(each) for each in (*others, swapped, roles, split)}
    assert len(keys) == 6 and key not in keys


def test_a_row_whose_image_is_gone_has_no_name(tmp_path):
    lost = sample(tmp_path)
    lost.images = [ImageRef("gone.png", str(tmp_path))]
    with pytest.raises(UnusableRow, match="gone"):
        row_key(lost)


def test_answers_are_those_that_are_predicted():
    """The first token of a row is predicted by nothing; where answers stand does not matter, their order does."""
    labels = torch.tensor([[-100, -100, 5, 6, -100, 7]])
    assert answers_digest(labels) == answers_digest(torch.tensor([[9, 5, 6, 7, -100]]))
    assert answers_digest(labels) != answers_digest(torch.tensor([[-100, 5, 7, 6]]))
    assert answers_digest(labels) != answers_digest(torch.tensor([[-100, 5, 6]]))


# ---- shards ----


def key_of(number):
    return number.to_bytes(16)


def values_of(number, tokens, layers=2, width=4):
    draw = torch.Generator().manual_seed(number)
    return {
        "neg_entropy": torch.randn(tokens, layers, generator=draw),
        "expectation": torch.randn(tokens, layers, width, generator=draw).to(torch.bfloat16),
    }


COUNTS = [3, 1, 0, 7, 2, 5]
"""Answer tokens of rows 0, 1, ..; a row without any is a row."""


def write(folder, numbers=range(6), shard_rows=2, data="d", close=True):
    writer = ShardWriter(folder, 2**20, shard_rows, data)
    for number in numbers:
        tokens = COUNTS[number % len(COUNTS)]
        writer.add(key_of(number), number.to_bytes(8), (number, number), values_of(number, tokens))
    if close:
        writer.flush()
    return writer


def test_rows_come_back_by_key_whatever_the_shard(tmp_path):
    write(tmp_path, range(0, 6, 2))
    write(tmp_path, range(1, 6, 2), shard_rows=None)
    reader = CacheReader(tmp_path)
    assert len(reader) == 6
    for number, tokens in enumerate(COUNTS):
        entry = reader.find(key_of(number))
        assert entry.answers == number.to_bytes(8)
        for name, value in values_of(number, tokens).items():
            assert torch.equal(reader.read(entry)[name], value) and value.shape[0] == tokens
    assert reader.find(key_of(99)) is None


def test_keys_that_begin_alike(tmp_path):
    """The first half of the key is what is sorted."""
    writer = ShardWriter(tmp_path, 2**20, None, "d")
    keys = [b"same 8 b" + bytes([i] * 8) for i in range(5)]
    for i, key in enumerate(keys):
        writer.add(key, bytes(8), (i, i), values_of(i, i + 1))
    writer.flush()
    reader = CacheReader(tmp_path)
    assert [reader.read(reader.find(key))["neg_entropy"].shape[0] for key in keys] == [1, 2, 3, 4, 5]
    assert reader.find(b"same 8 b" + b"\xff" * 8) is None


def test_refused_rows_are_kept_with_their_cause(tmp_path):
    writer = write(tmp_path, [0], close=False)
    writer.refuse(key_of(50), "too_long", "3000 tokens")
    writer.flush()
    assert CacheReader(tmp_path).find(key_of(50)) == Refused("too_long", "3000 tokens")


def test_a_reader_goes_to_another_process(tmp_path):
    write(tmp_path)
    reader = CacheReader(tmp_path)
    reader.read(reader.find(key_of(3)))
    other = pickle.loads(pickle.dumps(reader))
    assert torch.equal(other.read(other.find(key_of(3)))["neg_entropy"], values_of(3, 7)["neg_entropy"])


def test_shards_that_come_later_are_taken_in(tmp_path):
    write(tmp_path, [0, 1])
    reader = CacheReader(tmp_path)
    assert reader.find(key_of(4)) is None and not reader.refresh()
    write(tmp_path, [4])
    assert reader.refresh() and torch.equal(
        reader.read(reader.find(key_of(4)))["expectation"], values_of(4, 2)["expectation"]
    )


def test_what_was_not_finished_is_not_there(tmp_path):
    """A shard without its line, and a line cut short, as a writer that was killed leaves them."""
    writer = write(tmp_path, [0, 1, 2, 3])
    path = tmp_path / "shards" / f"{writer.name}.jsonl"
    lines = path.read_text().splitlines()
    path.write_text(lines[0] + "\n" + lines[1][:20])
    reader = CacheReader(tmp_path)
    assert len(reader) == 2 and reader.find(key_of(2)) is None


def test_a_lost_or_cut_shard_is_said_and_forgotten(tmp_path):
    write(tmp_path)
    reader = CacheReader(tmp_path)
    first, second, _ = sorted(shards_of(tmp_path))
    (tmp_path / "shards" / first).unlink()
    with pytest.raises(CacheError, match="teacher verify.*teacher build"):
        reader.read(reader.find(key_of(0)))
    path = tmp_path / "shards" / second
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CacheError, match="damaged"):
        CacheReader(tmp_path)
    assert sorted(forget_lost(tmp_path)) == [first, second] and len(shards_of(tmp_path)) == 1
    left = CacheReader(tmp_path)
    assert left.find(key_of(0)) is None and left.find(key_of(5)) is not None
    assert forget_lost(tmp_path) == []


def test_a_row_is_one_stretch_of_the_file(tmp_path):
    """Tokens come first, so that reading a row reads its bytes alone."""
    write(tmp_path, [3], shard_rows=None)
    (name,) = shards_of(tmp_path)
    with safe_open(tmp_path / "shards" / name, framework="pt") as shard:
        assert shard.get_slice("expectation").get_shape() == [7, 2, 4]
        assert json.loads(shard.metadata()["refused"]) == []
        assert shard.get_tensor("numbers").tolist() == [3]
