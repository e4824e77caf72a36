"""Where teacher's and student's image processors agree, a row's images are read and processed once for both."""

import json
import pickle

import pytest
import tiny_families
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vlsi_fast.config_data import DataConfig, SourceConfig
from vlsi_fast.data import dataset as dataset_module
from vlsi_fast.data.collate import Collator
from vlsi_fast.data.dataset import VlsiDataset, equivalent
from vlsi_fast.data.shared_images import same_images
from vlsi_fast.data.sources import build_source
from vlsi_fast.stages.batches import StageCollator, restore_shared

VISION = {"qwen2_vl": {"pixel_values", "image_grid_thw"}, "llava_onevision": {"pixel_values", "image_sizes"}}
PAIRS = [("qwen2_vl", "qwen2_vl"), ("qwen2_vl", "qwen2_5_vl"), ("llava_onevision", "llava_onevision")]


@pytest.fixture
def data(tmp_path):
    """Three rows: text alone, one image, two images."""
    for name, size in (("a", (56, 56)), ("b", (84, 28))):
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / f"{name}.png")
    turns = [
        ([], "Is there a circle?", "yes"),
        (["a.png"], "<image>What?", "red"),
        (["a.png", "b.png"], "<image><image>Which?", "no"),
    ]
    lines = [
        {"images": images, "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for images, q, a in turns
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return DataConfig(train=[SourceConfig(reader="messages", path=str(tmp_path / "rows.jsonl"))])


def processors_of(student, teacher):
    """Two processors with equal image settings and chat templates that differ in the prompt."""
    made = {"student": tiny_families.make_processor(student), "teacher": tiny_families.make_processor(teacher)}
    made["teacher"].chat_template = "{{- '<|im_start|>' -}}" + made["teacher"].chat_template
    assert not equivalent(*made.values())
    return made


def count(monkeypatch, owner, name):
    calls, function = [], getattr(owner, name)

    def counted(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


def batch_of(data, processors, collator=None):
    dataset = VlsiDataset(build_source(data.train), processors, data)
    return (collator or Collator(processors))([dataset[i] for i in range(3)])


@pytest.mark.parametrize("student, teacher", PAIRS)
def test_images_are_processed_once_and_batches_are_the_same(data, monkeypatch, student, teacher):
    processors = processors_of(student, teacher)
    kind = type(processors["student"].image_processor)
    processed = count(monkeypatch, kind, "preprocess")
    opened = count(monkeypatch, dataset_module, "load_image")
    once = batch_of(data, processors)
    assert (len(processed), len(opened)) == (2, 3)  # two rows with images, three images
    monkeypatch.setattr(dataset_module, "share_images", lambda processors: (processors, None))
    apart = batch_of(data, processors)
    assert len(processed) == 2 + 4
    for role in processors:
        assert once[role].keys() == apart[role].keys()
        for name, value in once[role].items():
            assert torch.equal(value, apart[role][name]), (role, name)
    for name in VISION[student]:
        assert once["student"][name] is once["teacher"][name]
        assert apart["student"][name] is not apart["teacher"][name]
    assert once["student"]["input_ids"].shape != once["teacher"]["input_ids"].shape


def test_other_settings_or_bounds_are_worked_on_apart(data):
    one, other = (tiny_families.make_processor("qwen2_vl") for _ in range(2))
    assert same_images(one, other)
    other.image_processor.size = {"shortest_edge": 4096, "longest_edge": 4096}
    assert not same_images(one, other)
    assert not same_images(one, tiny_families.make_processor("llava_onevision"))
    batch = batch_of(data, {"student": one, "teacher": other})
    assert len(batch["teacher"]["pixel_values"]) > len(batch["student"]["pixel_values"])


def test_nothing_is_kept_between_rows_and_processors_are_left_alone(data):
    processors = processors_of("qwen2_vl", "qwen2_vl")
    before = [processor.image_processor for processor in processors.values()]
    dataset = pickle.loads(pickle.dumps(VlsiDataset(build_source(data.train), processors, data)))  # as workers get it
    _ = dataset[2]
    assert dataset.images._asked is None and dataset.images._made is None
    assert dataset.processors["student"].image_processor is dataset.processors["teacher"].image_processor
    assert [processor.image_processor for processor in processors.values()] == before


@pytest.mark.parametrize("workers", [0, 1])
def test_shared_tensors_travel_once(data, workers):
    """The second role's copy is left out of what workers send and the device gets, and put back for the stage."""
    processors = processors_of("qwen2_vl", "qwen2_vl")
    collator = StageCollator(Collator(processors), ("student", "teacher"))
    dataset = VlsiDataset(build_source(data.train), processors, data)
    (sent,) = DataLoader(dataset, batch_size=3, collate_fn=collator, num_workers=workers)
    assert set(sent["facts"]["shared"]["teacher"]) == VISION["qwen2_vl"]
    assert not VISION["qwen2_vl"] & sent["batch"]["teacher"]["inputs"].keys()
    restore_shared(sent["batch"], sent["facts"])
    plain = batch_of(data, processors)
    for role in processors:
        inputs = sent["batch"][role]["inputs"]
        assert inputs.keys() == plain[role].keys() - {"labels"}
        assert all(torch.equal(value, plain[role][name]) for name, value in inputs.items())
    assert sent["batch"]["student"]["inputs"]["pixel_values"] is sent["batch"]["teacher"]["inputs"]["pixel_values"]
