"""Rows dealt into micro-batches by cost: nothing lost, nothing too large, little waited for; sizes told in advance."""

import io
import itertools
import json
import sys

import numpy as np
import pytest
import tiny_families as families
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from PIL import Image
from tiny_runs import ROOT
from torch.utils.data import BatchSampler, DataLoader

from vlsi_fast.backbones import FAMILIES
from vlsi_fast.config import load_config
from vlsi_fast.config_data import DataConfig
from vlsi_fast.data import VlsiDataset, build_source, row_sizes
from vlsi_fast.data.balancing import Load, cost_of, deal
from vlsi_fast.data.encoding import IGNORED, encode
from vlsi_fast.data.images import ImageRef
from vlsi_fast.data.messages import Sample
from vlsi_fast.data.row_sizes import RowSizer, SizeTable
from vlsi_fast.planner.build import Models, step_of
from vlsi_fast.planner.memory import Batch, Setup
from vlsi_fast.planner.rows import RowOperations, row_operations
from vlsi_fast.planner.shapes import read_config
from vlsi_fast.planner.speed import operations
from vlsi_fast.stages.sampling import ContinuingSampler, RowCosts, StepBatches

# ---- dealing ----


def lengths(n, seed=0):
    """Tokens with a heavy tail: lognormal, mean 743, cut at 4096."""
    drawn = np.random.default_rng(seed).lognormal(np.log(743) - 0.75**2 / 2, 0.75, n)
    return drawn.clip(16, 4096).astype(np.int64)


def load_of(tokens, packed, padded=0):
    """Rows of these tokens in `packed` and `padded` models; in further padded models they are a bit longer."""
    cost = 1000 * tokens + tokens**2 // 10
    none = np.zeros((0, len(tokens)), np.int64)
    many = [tokens + 7 * i * (tokens % 3) for i in range(padded)]
    return Load(
        packed * cost,
        np.array([1000 * each + each**2 // 10 for each in many]) if padded else none,
        np.array(many) if padded else none,
        np.stack([tokens] * packed) if packed else none,
    )


def waited(load, parts, ranks):
    """Cost of the step: the costliest micro-batch of each round."""
    costs = [cost_of(load, part) for part in parts]
    return sum(max(costs[at : at + ranks]) for at in range(0, len(costs), ranks))


MODES = {"packed": (1, 0), "both packed": (2, 0), "padded": (0, 1), "both padded": (0, 2), "mixed": (1, 1)}
ODD = {
    "heavy tail": lengths(96),
    "not a multiple": lengths(53, 1),
    "equal": np.full(64, 9),
    "unknown": np.zeros(48, np.int64),
    "one is huge": np.array([100_000, *lengths(47, 2)]),
    "a row each": lengths(24, 3),
}


@pytest.mark.parametrize("tokens", ODD.values(), ids=ODD)
@pytest.mark.parametrize("mode", MODES)
def test_every_row_is_dealt_once_and_nothing_is_too_large(mode, tokens):
    load, count = load_of(tokens, *MODES[mode]), 24
    parts = deal(load, count)
    assert sorted(itertools.chain(*parts)) == list(range(len(tokens))) and len(parts) == count and all(parts)
    costs = [cost_of(load, part) for part in parts]
    assert costs == sorted(costs, reverse=True), "neighbours, which are of one round, are alike"
    most = -(-len(tokens) // count)
    for sizes in load.sizes:
        assert max(sizes[part].sum() for part in parts) <= np.sort(sizes)[-most:].sum()
    for longest in load.lengths:
        assert max(len(part) * longest[part].max() for part in parts) <= most * longest.max()


def test_cheap_rows_do_not_fill_a_micro_batch():
    """Rows that cost next to nothing would all go to few micro-batches, which would not fit in memory."""
    none = np.zeros((0, 48), np.int64)
    dear, size = np.repeat([1_000_000, 1], [12, 36]), np.repeat([10, 100], [12, 36])
    packed = deal(Load(dear, none, none, size[None]), 24)
    assert max(size[part].sum() for part in packed) == 200
    dear, length = np.repeat([1_000_000, 1], [14, 18])[None], np.repeat([100, 50], [14, 18])
    padded = deal(Load(np.zeros(32, np.int64), dear, length[None], np.zeros((0, 32), np.int64)), 16)
    assert max(len(part) * length[part].max() for part in padded) == 200 and max(map(len, padded)) == 4
    filled = deal(Load(np.zeros(32, np.int64), dear, np.ones((1, 32), np.int64), length[None]), 16)
    assert max(length[part].sum() for part in filled) <= 200


def test_cost_counts_padding():
    load = load_of(np.array([10, 20, 30]), 1, 1)
    text = [1000 * t + t**2 // 10 for t in (10, 20, 30)]
    assert cost_of(load, [0, 2]) == text[0] + text[2] + 2 * text[2]
    with pytest.raises(ValueError, match="3 rows cannot be dealt into 4 micro-batches"):
        deal(load, 4)


@pytest.mark.parametrize("seed", range(5))
def test_padded_stretches_are_the_best_there_are(seed):
    """Against all ways to cut 9 rows, longest first, into 4 stretches that fill no more than they may."""
    tokens = np.sort(lengths(9, seed))[::-1]
    load = load_of(tokens, 0, 1)
    best = min(
        max(cost_of(load, list(range(a, b))) for a, b in zip((0, *cuts), (*cuts, 9)))
        for cuts in itertools.combinations(range(1, 9), 3)
        if all((b - a) * tokens[a] <= 3 * tokens[0] for a, b in zip((0, *cuts), (*cuts, 9)))
    )
    assert max(cost_of(load, part) for part in deal(load, 4)) <= 1.006 * best


@pytest.mark.parametrize("seed", range(5))
def test_packed_micro_batches_are_near_the_best_there_are(seed):
    """Graham's bound, against all ways to deal 8 rows into 3 micro-batches."""
    load = load_of(lengths(8, seed), 1)
    ways = ([[i for i in range(8) if way[i] == k] for k in range(3)] for way in itertools.product(range(3), repeat=8))
    best = min(max(cost_of(load, part) for part in parts) for parts in ways if all(parts))
    assert max(cost_of(load, part) for part in deal(load, 3)) <= (4 / 3 - 1 / 9) * best


@pytest.mark.parametrize("ranks, bar", [(8, 1.15), (64, 1.25)])
def test_ranks_wait_little(ranks, bar):
    """2 rows x 16 micro-batches; by place, ranks wait for as long again."""
    ratios = {"packed": [], "padded": [], "by place": []}
    for seed in range(3):
        tokens = lengths(32 * ranks, seed)
        ideal = load_of(tokens, 1).alone.sum() / ranks
        for mode in ("packed", "padded"):
            load = load_of(tokens, *MODES[mode])
            ratios[mode].append(waited(load, deal(load, 16 * ranks), ranks) / ideal)
        load = load_of(tokens, 1)
        place = [[i, i + 1] for i in range(0, len(tokens), 2)]
        ratios["by place"].append(waited(load, place, ranks) / ideal)
    assert max(ratios["packed"]) < bar and max(ratios["padded"]) < bar < min(ratios["by place"])


def test_the_benchmark_meets_its_bars(tmp_path, monkeypatch, capsys):
    """On lengths measured in files of each source's layout, too."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import balance

    arguments = ["--config", "configs/qwen2vl_7b_to_2b.yaml", "--stage", "sft", "--ranks", "8", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["balance.py", *arguments, "--out", str(tmp_path)])
    assert balance.main() == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "balance.json").read_text())
    mix = {source.name: source.weight for source in DataConfig(train="configs/data/vlsi_mix.yaml").train}
    assert mix == {source.name: source.weight for source in balance.SOURCES}
    for name in ("assumed", "files"):
        found = result["cost_over_ideal"][name]["8"]
        assert found["balanced packed"] < 1.15 < found["packed by place"] < found["padded by place"]
        assert found["balanced padded"] < found["padded, sorted on each rank"] < found["padded by place"]
        assert 600 < result["lengths"][name]["mean"] < 850


# ---- batches of a rank ----


def costs_of(n, packed=True):
    sizes = np.zeros((n, 4), np.int32)
    sizes[:, 0] = lengths(n, 5)
    return RowCosts({"student": sizes}, {"student": RowOperations(1e3, 0.1, 0, 0, 0)}, {"student": packed})


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("rows", [3, 40, 48])
@pytest.mark.parametrize("drop_last", [False, True])
def test_rows_by_place_are_those_that_accelerate_deals(ranks, rows, drop_last):
    """Also rows that come again in a last round, and fewer rows than a round has."""
    order = ContinuingSampler(rows, seed=1, start=5)
    for rank in range(ranks):
        own = StepBatches(order, 2, 4, ranks, rank, drop_last=drop_last)
        stock = BatchSampler(order, 2, drop_last)
        stock = BatchSamplerShard(stock, ranks, rank) if ranks > 1 else stock
        assert list(own) == list(stock) and len(own) == len(stock)


def steps_of(ranks, accumulation, n=44, costs=None, epoch=0):
    """[step][micro-batch over all ranks] -> rows."""
    order = ContinuingSampler(n, seed=1)
    order.epoch = epoch
    shards = [list(StepBatches(order, 2, accumulation, ranks, rank, costs)) for rank in range(ranks)]
    rounds = list(zip(*shards, strict=True))
    return [list(itertools.chain(*rounds[at : at + accumulation])) for at in range(0, len(rounds), accumulation)]


@pytest.mark.parametrize("packed", [True, False])
def test_steps_keep_their_rows_and_ranks_change_nothing(packed):
    """Steps of 16 rows in 8 micro-batches; the last one, of 12 rows, is filled up where ranks need it."""
    costs = costs_of(44, packed)
    for epoch in (0, 1):
        one = steps_of(1, 8, costs=costs, epoch=epoch)
        for ranks in (1, 2, 4):
            dealt, place = (steps_of(ranks, 8 // ranks, costs=c, epoch=epoch) for c in (costs, None))
            assert dealt[:2] == one[:2] and dealt != place
            assert [sorted(sum(step, [])) for step in dealt] == [sorted(sum(step, [])) for step in place]
            assert [len(step) for step in dealt] == [len(step) for step in place] and len(dealt) == 3


def test_a_resumed_loader_gives_the_batches_that_are_left():
    batches = StepBatches(ContinuingSampler(48, seed=1), 2, 4, 2, 1, costs_of(48))
    loader = DataLoader(list(range(48)), batch_sampler=batches, collate_fn=list)
    assert list(skip_first_batches(loader, 5)) == list(loader)[5:] and len(list(loader)) == 12


def test_costs_of_rows_by_hand():
    """Tokens 10, 2 answers, 8 patches of 2 pictures in the student; in the teacher 20, 2, none."""
    sizes = {"student": np.array([[10, 2, 8, 2]] * 2, np.int32), "teacher": np.array([[20, 2, 0, 0]] * 2, np.int32)}
    flops = {"student": RowOperations(5, 3, 7, 11, 13), "teacher": RowOperations(2, 1, 7, 11, 0)}
    load = RowCosts(sizes, flops, {"student": True, "teacher": False}).load([1, 0])
    assert load.alone.tolist() == [7 * 8 + 11 * 64 // 2 + 13 * 2 + 5 * 10 + 3 * 100] * 2
    assert load.padded.tolist() == [[2 * 20 + 400] * 2] and load.lengths.tolist() == [[20, 20]]
    assert sorted(map(tuple, load.sizes.tolist())) == sorted([(8, 8), (2, 2), (10, 10), (0, 0), (2, 2)])


@pytest.mark.parametrize("stage", ["verbalize", "interact", "sft"])
def test_operations_of_a_row_are_the_planners(stage):
    config = load_config("configs/qwen2vl_7b_to_2b.yaml")
    roles = ("student",) if stage == "sft" else ("student", "teacher")
    configs = {role: read_config(getattr(config, role), role) for role in roles}
    found = row_operations(config, stage, configs)
    setup = Setup(8, None, 2, 16, config.stage_training(stage).gradient_checkpointing)
    row = Batch(1, 700, 90, 1200)
    whole = sum(operations(step_of(Models(config, configs=configs), stage, setup, lambda shape: row)).values())
    told = sum(
        f.token * 700 + f.token_pair * 700**2 + f.patch * 1200 + f.patch_pair * 1200**2 + f.answer * 90
        for f in found.values()
    )
    assert told == pytest.approx(whole, rel=1e-9)


# ---- sizes ----

ROWS = [  # question, images, answer
    ("What shape is in the image?", [(64, 20)], "a red circle"),
    ("yes or no?", [], "no"),
    ("Which of the two?", [(20, 64), (48, 40)], "yes, a blue rectangle"),
    ("Is it red?", [(300, 40)], "yes"),
    ("Is it red?", [(64, 64)], "no"),
]


def png(size):
    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_sizes_are_those_of_the_encoded_row(name):
    """Tokens, answers and patches; one image, several, none; several turns."""
    processor, config = families.make_processor(name), DataConfig(train=[{"reader": "easy_vqa"}])
    for question, images, answer in ROWS:
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}, text("assistant", answer)]
        turns += [text("user", "And now?"), text("assistant", "still yes")]
        sample = Sample("row", turns, [ImageRef(data=png(size)) for size in images])
        row = encode(sample, processor, config, lambda ref: Image.open(io.BytesIO(ref.data)).convert("RGB"))
        tokens, answers, patches, pictures = RowSizer(processor, config)(sample, images)
        assert (tokens, answers) == (row["input_ids"].shape[1], int((row["labels"] != IGNORED).sum()))
        pixels = row.get("pixel_values")
        if pixels is None:
            assert patches == pictures == 0
        elif name not in families.GRIDS:  # of a tile 16 patches, which InternVL and SmolVLM make 4 tokens
            assert pictures == pixels.shape[:-3].numel()
            assert patches == pictures * (16 if name == "llava_onevision" else 4)
        else:
            assert patches == len(pixels) and pictures == len(images)


def text(role, words):
    return {"role": role, "content": [{"type": "text", "text": words}]}


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """8 rows: the image of row 1 is missing, row 3 is too long, rows 6 and 7 have no answer."""
    monkeypatch.setenv("VLSI_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(row_sizes, "KEPT_FROM_ROWS", 1)
    rows = []
    for i in range(8):
        words = "why? " * (200 if i == 3 else i + 1)
        answer = "" if i > 5 else "yes"
        turns = [{"role": "user", "content": f"<image>{words}"}, {"role": "assistant", "content": answer}]
        rows.append({"images": [f"{i}.png"], "messages": turns})
        if i != 1:
            (tmp_path / f"{i}.png").write_bytes(png((20 + 8 * i, 32)))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(train=[{"reader": "messages", "path": str(tmp_path / "rows.jsonl")}], max_length=128)
    return open_dataset(config)


def open_dataset(config, student="qwen3_vl"):
    processors = {"student": families.make_processor(student), "teacher": families.make_processor("llava_onevision")}
    return VlsiDataset(build_source(config.train), processors, config)


ALL = np.arange(8)


def test_a_row_that_cannot_be_used_has_the_sizes_of_the_one_in_its_place(dataset, monkeypatch):
    found = SizeTable(dataset).measure(ALL, 0)
    assert found.shape == (2, 8, 4) and found.dtype == np.int32
    usable = {role: [dataset[i][role]["input_ids"].shape[1] for i in range(8)] for role in ("student", "teacher")}
    assert found[:, :, 0].tolist() == [usable["student"], usable["teacher"]]
    for row, place in ((1, 2), (3, 4), (6, 0), (7, 0)):
        assert (found[:, row] == found[:, place]).all()
    assert (SizeTable(dataset).measure(ALL, 2) == found).all(), "workers change nothing"
    monkeypatch.setattr(row_sizes, "TRIES", 1)
    assert (SizeTable(dataset).measure(ALL, 0)[:, [1, 3, 6, 7]] == 0).all()


def kept(dataset):
    table = SizeTable(dataset)
    table.load()
    return table


def test_sizes_are_kept(dataset, tmp_path):
    table = kept(dataset)
    assert table.unknown(ALL).tolist() == list(range(8))
    table.sizes[:, :4] = table.measure(ALL[:4], 0)
    table.save()
    assert kept(dataset).unknown(ALL).tolist() == [4, 5, 6, 7]
    other = SizeTable(dataset)  # of another run: what both know stays
    other.sizes[:, 4:6] = other.measure(ALL[4:6], 0)
    other.save()
    assert kept(dataset).unknown(ALL).tolist() == [6, 7] and (kept(dataset).sizes[:, :4] == table.sizes[:, :4]).all()
    # other bounds, processors or files are other sizes; the teacher's are found again
    shorter = dataset.data_config.model_copy(update={"max_length": 100})
    assert len(kept(open_dataset(shorter)).unknown(ALL)) == 8
    changed = kept(open_dataset(dataset.data_config.model_copy(update={"min_pixels": None}), "llava_onevision"))
    assert changed.dataset.shared and changed.unknown(ALL).tolist() == [6, 7]
    with (tmp_path / "rows.jsonl").open("a") as rows:
        rows.write("\n")
    assert len(kept(dataset).unknown(ALL)) == 8


def test_a_damaged_or_forbidden_file_is_no_error(dataset, tmp_path, monkeypatch, capsys):
    table = SizeTable(dataset)
    table.sizes = table.measure(ALL, 0)
    table.save()
    for file in (tmp_path / "cache" / "sizes").glob("*.npy"):
        file.write_bytes(file.read_bytes()[:50])
    assert len(kept(dataset).unknown(ALL)) == 8
    monkeypatch.setenv("VLSI_FAST_CACHE", str(tmp_path / "rows.jsonl"))  # no folder
    table.save()
    assert "sizes of rows cannot be kept" in capsys.readouterr().err
    assert not list((tmp_path / "cache" / "sizes").glob("*.partial"))


def test_equal_processors_are_measured_once(dataset):
    both = {role: families.make_processor("qwen2_vl") for role in ("student", "teacher")}
    shared = SizeTable(VlsiDataset(dataset.sources, both, dataset.data_config))
    assert shared.roles == {"student": 0, "teacher": 0} and shared.sizes.shape[0] == 1
    assert shared.measure(ALL[:3], 0).shape == (1, 3, 4)
