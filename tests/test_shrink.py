"""`vlsi-fast shrink`: copies, against stock models with the same decoder layers taken out by hand; `layers: auto`."""

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
import tiny_families as families
import tiny_runs as runs
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from vlsi_fast import load_config, run, shrink
from vlsi_fast.cli import main
from vlsi_fast.config import ConfigError
from vlsi_fast.data.sources import READERS
from vlsi_fast.export.card import license_of
from vlsi_fast.inspection.folders import inspect_folder
from vlsi_fast.lineage import checkpoint_digest
from vlsi_fast.loading import target_layers
from vlsi_fast.planner.build import Models
from vlsi_fast.planner.checks.models import check_models
from vlsi_fast.planner.checks.subject import Subject
from vlsi_fast.runs import open_run
from vlsi_fast.shrinking import arguments, checkpoint
from vlsi_fast.shrinking.layers import even_layers, influential_layers

NAMES = list(families.FAMILIES)


def stock(folder, **options):
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def logits(model, processor):
    """Of a question about a drawn image."""
    turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What shape is in the image?"}]}]
    text = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    image = Image.linear_gradient("L").resize((48, 40)).convert("RGB")
    inputs = processor(text=[text], images=[image], return_tensors="pt").to(dtype=model.dtype)
    return model(**inputs, use_cache=False).logits


def without_layers(model, kept):
    """The stock model with all other decoder layers taken out of its list."""
    language, text = model.get_decoder(), model.config.get_text_config()
    language.layers = nn.ModuleList(language.layers[k - 1] for k in kept)
    kinds = getattr(text, "layer_types", None)
    text.num_hidden_layers = language.config.num_hidden_layers = len(kept)
    if kinds is not None:
        text.layer_types = language.config.layer_types = [kinds[k - 1] for k in kept]
    return model


def tensors(folder):
    """Name -> tensor, of all files."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def edit(path, change):
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


# ---- which layers ----


@pytest.mark.parametrize(
    "depth, count, fixed, wanted",
    [
        (8, 4, 0, [1, 3, 6, 8]),
        (8, 2, 0, [1, 8]),
        (8, 8, 0, [1, 2, 3, 4, 5, 6, 7, 8]),
        (1, 1, 0, [1]),
        (28, 14, 0, [1, 3, 5, 7, 9, 11, 13, 16, 18, 20, 22, 24, 26, 28]),  # 27 / 13 = 2.08 apart
        (64, 5, 3, [1, 2, 3, 34, 64]),  # 33.5, rounded up
        (4, 3, 2, [1, 2, 4]),
    ],
)
def test_even_layers(depth, count, fixed, wanted):
    assert even_layers(depth, count, fixed) == wanted


def test_even_layers_always_keep_both_ends_and_differ():
    for depth in range(2, 40):
        for count in range(2, depth + 1):
            kept = even_layers(depth, count)
            assert (kept[0], kept[-1], len(set(kept))) == (1, depth, count)
            gaps = [b - a for a, b in zip(kept, kept[1:])]
            assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    "depth, count, fixed, said",
    [
        (8, 9, 0, "use 1 .. 8"),
        (8, 0, 0, "use 1 .. 8"),
        (8, 1, 0, "keep at least 2"),
        (8, 3, 3, "keep at least 4"),
        (8, 2, 3, "deepstack.*keep at least 3"),
    ],
)
def test_numbers_that_cannot_be_kept(depth, count, fixed, said):
    with pytest.raises(ConfigError, match=said):
        even_layers(depth, count, fixed)


def test_influential_layers():
    values = [0.1, 0.5, 0.2, 0.5, 0.9]
    assert influential_layers(values, 1) == [5] and influential_layers(values, 2) == [2, 5]
    assert influential_layers(values, 3, fixed=1) == [1, 2, 5]


# ---- the copy ----


@pytest.mark.parametrize("sharded", [False, True])
def test_nothing_left_out(sharded, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", 1000)
    families.save(tmp_path / "a", "qwen2_vl", layers=3)
    if sharded:
        stock(tmp_path / "a").save_pretrained(tmp_path / "a", max_shard_size="40KB")
        (tmp_path / "a" / "model.safetensors").unlink()
    made = shrink(tmp_path / "a", tmp_path / "b", 3)
    assert made.kept_layers == [1, 2, 3] and not list(tmp_path.glob("*.partial"))
    there, here = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert there.keys() == here.keys() and all(torch.equal(there[name], here[name]) for name in there)
    for folder in (tmp_path / "a", tmp_path / "b"):
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="pt") as opened:
                assert opened.metadata() == {"format": "pt"}
    assert json.loads((tmp_path / "a/config.json").read_text()) == json.loads((tmp_path / "b/config.json").read_text())
    assert checkpoint_digest(tmp_path / "b") == checkpoint_digest(tmp_path / "a") or sharded
    processor = families.make_processor("qwen2_vl")
    assert torch.equal(logits(stock(tmp_path / "a"), processor), logits(stock(tmp_path / "b"), processor))


LAYOUTS = {
    "qwen2_vl": "model.layers.3.",
    "qwen2_5_vl": "model.layers.3.",
    "llava_onevision": "language_model.model.layers.3.",
    "qwen3_vl": "model.language_model.layers.3.",
    "internvl": "language_model.model.layers.3.",
    "smolvlm": "model.text_model.layers.3.",
    "gemma3": "language_model.model.layers.3.",
    "qwen3_vl_moe": "model.language_model.layers.3.",
    "qwen3_5": "model.language_model.layers.3.",
    "glm4v": "model.language_model.layers.3.",
}
"""What stock classes write today: the names of the families' own releases."""


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_family(name, tied, tmp_path):
    """Sharded, in bfloat16, with the names of the release and with those of today's modules."""
    source, processor = tmp_path / "source", families.make_processor(name)
    model = families.make_model(name, layers=6, tied=tied, tokenizer=processor.tokenizer).to(torch.bfloat16)
    model.save_pretrained(source, max_shard_size="40KB")
    processor.save_pretrained(source)
    assert any(key.startswith(LAYOUTS[name]) for key in tensors(source)), "save_pretrained writes other names"
    made = shrink(source, tmp_path / "short", 4)
    kept = [1, 2, 4, 6] if name in families.DEEPSTACK else [1, 3, 4, 6]
    assert made.kept_layers == kept and made.depth == 6
    expected = logits(without_layers(stock(source).float(), kept), processor)
    short = stock(tmp_path / "short", dtype="auto")
    assert short.dtype == torch.bfloat16 and torch.equal(logits(short.float(), processor), expected)
    stored = sum(value.numel() for value in tensors(made.folder).values())
    assert made.parameters == stored == sum(p.numel() for p in short.parameters())
    found = inspect_folder(made.folder)
    assert found["problems"] == [] and found["decoder_layers"] == 4 and found["files"] > 1
    # the same weights under today's names, in one file
    new = tmp_path / "new"
    shutil.copytree(source, new, ignore=shutil.ignore_patterns("*.safetensors*"))
    state = {key: value.clone() for key, value in model.state_dict().items() if not (tied and key == "lm_head.weight")}
    assert any(re.match(r"model\.(language|text)_model\.layers\.3\.", key) for key in state)
    save_file(state, new / "model.safetensors", {"format": "pt"})
    shrink(new, tmp_path / "new_short", kept)
    assert torch.equal(logits(stock(tmp_path / "new_short", dtype="auto").float(), processor), expected)


def test_vision_blocks_stay(tmp_path):
    """Towers with more blocks than layers are kept, with equal numbers."""
    families.save(tmp_path / "a", "llava_onevision", layers=2)
    shrink(tmp_path / "a", tmp_path / "b", [2])
    there, here = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    vision = [key for key in there if "vision" in key]
    assert any("layers.0." in key for key in vision) and any("layers.1." in key for key in vision)
    assert all(torch.equal(there[key], here[key]) for key in vision)
    assert sum("language_model.model.layers" in key for key in here) * 2 == sum(
        "language_model.model.layers" in key for key in there
    )


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_per_layer_settings_are_cut(listed, flat, tmp_path):
    """Layers with sliding windows keep them: as a list, or told by max_window_layers; in old flat configs too."""
    families.save(tmp_path / "a", "qwen2_vl", layers=6)

    def slide(tree):
        text = tree["text_config"]
        text |= {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}
        text.pop("layer_types", None)
        if listed:
            text["layer_types"] = ["full_attention"] * 3 + ["sliding_attention"] * 3
        if flat:
            del tree["text_config"], text["model_type"]
            tree |= {name: value for name, value in text.items() if name not in tree}

    edit(tmp_path / "a" / "config.json", slide)
    made = shrink(tmp_path / "a", tmp_path / "b", [1, 2, 4, 6])
    config = AutoConfig.from_pretrained(made.folder).get_text_config()
    assert config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2 and config.max_window_layers == 2
    processor = families.make_processor("qwen2_vl")
    whole = stock(tmp_path / "a")
    assert whole.config.get_text_config().layer_types[3:] == ["sliding_attention"] * 3
    expected = logits(without_layers(whole, [1, 2, 4, 6]), processor)
    assert torch.equal(logits(stock(made.folder), processor), expected)


def test_files_and_record(tmp_path):
    source = tmp_path / "Big-VL"
    families.save(source, "qwen2_vl", layers=4)
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# 99% on everything\n")
    for name in ("LICENSE", "NOTICE.txt", "merges.txt"):
        (source / name).write_text(name)
    for name in ("pytorch_model.bin", "weights.gguf", "trainer_state.json", "vlsi_export.json", ".gitattributes"):
        (source / name).write_text("x")
    made = shrink(source, tmp_path / "short", [2, 4])
    names = {file.name for file in made.folder.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md", "LICENSE", "NOTICE.txt"),
        *("merges.txt", "tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"),
        "vlsi_shrink.json",
    }
    for name in names - {"config.json", "model.safetensors", "README.md", "vlsi_shrink.json"}:
        assert (made.folder / name).read_bytes() == (source / name).read_bytes(), name
    assert license_of(made.folder) == {"license": "apache-2.0"}
    card = ModelCard.load(made.folder / "README.md").text
    assert ModelCard.load(made.folder / "README.md").data.base_model is None  # no folder's name
    assert "layers 2, 4 of the 4 of Big-VL" in card and "99%" not in card and str(tmp_path) not in card
    record = json.loads((made.folder / "vlsi_shrink.json").read_text())
    assert record == made.record and record["kept_layers"] == [2, 4] and record["method"] == "list"
    assert record["source"]["digest"] == checkpoint_digest(source) and record["source"]["decoder_layers"] == 4
    assert record["target_layers"] == {"student": [1], "teacher": [2]}
    assert record["versions"]["torch"] == torch.__version__ and record["influence"] is None


def quantise(folder):
    edit(folder / "config.json", lambda tree: tree.update(quantization_config={"quant_method": "awq"}))


def cut_off(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def bytes_for_floats(folder):
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if "layers.1.mlp.up_proj" in key)
    save_file(weights | {name: weights[name].to(torch.int8)}, folder / "model.safetensors", {"format": "pt"})


def lose_a_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in weights.items() if "layers.1.mlp.up_proj" not in key}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def odd_list(folder):
    edit(folder / "config.json", lambda tree: tree["text_config"].update(mlp_only_layers=[1, 2]))


SPOILT = {
    "quantised config": (quantise, "is quantised; shrink the model that it was quantised from"),
    "quantised tensor": (bytes_for_floats, "up_proj.weight is I8, quantised"),
    "gptq": (lambda f: (f / "quantize_config.json").write_text("{}"), "is quantised"),
    "cut off": (cut_off, "is damaged or cut off"),
    "lost": (lose_a_tensor, r"missing: .*layers\.1\.mlp\.up_proj\.weight \(1\)"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "config.json or \\*.safetensors is missing"),
    "family": (lambda f: edit(f / "config.json", lambda t: t.update(model_type="llama")), "known families: gemma3"),
    "odd list": (odd_list, "mlp_only_layers has 2 entries for 4 layers"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_checkpoints_that_cannot_be_shrunk(name, tmp_path, capsys):
    spoil, said = SPOILT[name]
    families.save(tmp_path / "a", "qwen2_vl", layers=4)
    spoil(tmp_path / "a")
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        shrink(tmp_path / "a", tmp_path / "b", 2)
    assert [each.name for each in tmp_path.iterdir()] == ["a"]
    assert main(["shrink", "--model", str(tmp_path / "a"), "--keep-layers", "2", "--out", str(tmp_path / "b")]) == 2
    assert "vlsi-fast: " in capsys.readouterr().err


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A Qwen3-VL with vision features added behind two of its four layers."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    families.save(folder, "qwen3_vl", layers=4)
    return folder


@pytest.mark.parametrize("keep", [[1, 3, 4], [2, 4], [3], 1])
def test_deepstack_layers_must_stay(keep, deep, tmp_path):
    with pytest.raises(ConfigError, match="deepstack"):
        shrink(deep, tmp_path / "out", keep)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"keep_layers": 7}, "7 of a model of 6 decoder layers; use 1 .. 6"),
        ({"keep_layers": 1}, "keep at least 2"),
        ({"keep_layers": [1, 7]}, r"\[7\] out of range; the model has 6 layers"),
        ({"keep_layers": [0, 1]}, r"\[0\] out of range"),
        ({"keep_layers": [3, 1]}, "strictly rising list"),
        ({"keep_layers": []}, "non-empty"),
        ({"keep_layers": "4"}, "give a number, or a list"),
        ({"method": "odd"}, "use one of even, influence"),
        ({"method": "influence"}, "give --config FILE, or --data FILE"),
        ({"method": "influence", "rows": {"train": []}}, "data.train"),
        ({"method": "influence", "keep_layers": [1], "rows": {}}, "give a number there"),
        ({"method": "influence", "rows": {}, "limit": 0}, "at least 1 row"),
        ({"rows": {"train": []}}, "for method influence, not for even"),
        ({"out": "teacher/inside"}, "in the model's own folder"),
        ({"out": "rows.jsonl"}, "is a file"),
        ({"out": "student"}, "is not empty"),
        ({"model": "nowhere"}, "--model: folder .*nowhere does not exist"),
    ],
)
def test_bad_options(changes, said, workspace, tmp_path):
    options = {"model": "teacher", "out": tmp_path / "out", "keep_layers": 3} | changes
    options |= {name: workspace / options[name] for name in ("model", "out") if isinstance(options[name], str)}
    with pytest.raises((ConfigError, FileNotFoundError), match=said):
        shrink(**options)
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_where_writing_fails(workspace, tmp_path, monkeypatch):
    from vlsi_fast.shrinking import student

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(student, "write_card", full)
    with pytest.raises(OSError, match="No space"):
        shrink(workspace / "teacher", tmp_path / "out", 3)
    assert not list(tmp_path.iterdir())
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(student.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match="the copy needs .* KiB, .* has 1000 B free; make room"):
        shrink(workspace / "teacher", tmp_path / "out", 3)


# ---- influence ----


def rows_of(workspace):
    return {"train": [{"reader": "messages", "path": str(workspace / "rows.jsonl")}]}


@torch.no_grad()
def test_influence_of_a_model(workspace, tmp_path):
    """A layer that changes nothing has none and goes first; the others' are those of the stock hidden states."""
    source = shutil.copytree(workspace / "teacher", tmp_path / "source")
    model = stock(source)
    layer = model.model.language_model.layers[2]
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(source)
    made = shrink(source, tmp_path / "short", 5, "influence", rows_of(workspace), limit=3)
    assert made.kept_layers == [1, 2, 4, 5, 6] and made.influence[2] == pytest.approx(0, abs=1e-6)
    measured = made.record["influence"]
    assert (measured["values"], measured["rows"], measured["skipped"]) == (made.influence, 3, {})
    # rows 0, 16, 32 of 48, by the stock model's own hidden states
    processor = tiny.make_processor("tiny", patch_size=8, min_pixels=1024, max_pixels=1024)
    cosines, lines = [[] for _ in range(5)], (workspace / "rows.jsonl").read_text().splitlines()
    for line in (lines[0], lines[16], lines[32]):
        row = json.loads(line)
        text = processor.apply_chat_template(row["messages"], tokenize=False)
        text = text.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
        image = Image.open(workspace / row["images"][0])
        inputs = processor(text=[text], images=[image], return_tensors="pt")
        states = model(**inputs, output_hidden_states=True).hidden_states
        for k in range(5):  # the last state is behind the final norm
            x, y = (states[j][0].double() for j in (k, k + 1))
            cosines[k] += ((x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)).tolist()
    assert measured["tokens"] == len(cosines[0])
    assert made.influence[:5] == pytest.approx([1 - sum(c) / len(c) for c in cosines], abs=1e-6)
    expected = logits(without_layers(model, made.kept_layers), processor)
    assert torch.equal(logits(stock(made.folder), processor), expected)


def test_influence_that_is_no_number(workspace, tmp_path):
    source = shutil.copytree(workspace / "teacher", tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    name = next(key for key in weights if "layers.2.mlp.up_proj" in key)
    save_file(weights | {name: weights[name] * float("nan")}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="decoder layer 3 gives no finite numbers"):
        shrink(source, tmp_path / "out", 3, "influence", rows_of(workspace), limit=1)


def test_rows_that_cannot_be_used(workspace, tmp_path):
    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "a red circle"}]
    rows.write_text(json.dumps({"images": ["none.png"], "messages": turns}) + "\n")
    data = {"train": [{"reader": "messages", "path": str(rows)}]}
    with pytest.raises(ConfigError, match=r"no row can be used \(missing_image 1\)"):
        shrink(workspace / "teacher", tmp_path / "out", 3, "influence", data)
    with rows.open("a") as file:
        file.write(json.dumps({"images": [], "messages": [{**turns[0], "content": "What?"}, turns[1]]}) + "\n")
    made = shrink(workspace / "teacher", tmp_path / "out", 3, "influence", data, device="auto")
    assert (made.record["influence"]["rows"], made.record["influence"]["skipped"]) == (1, {"missing_image": 1})


# ---- the command ----


def test_command(workspace, tmp_path, capsys):
    words = ["shrink", "--model", str(workspace / "teacher"), "--out"]
    assert main([*words, str(tmp_path / "a"), "--keep-layers", "3"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "3 of 6 decoder layers (1, 4, 6)" in said and f"student.path: {tmp_path / 'a'}, student.layers: auto" in said
    assert main([*words, str(tmp_path / "a"), "--keep-layers", "3"]) == 2
    assert "is not empty; choose another folder" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "b"), "--keep-layers", "5,", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept_layers"] == [5]
    config = runs.write_config(runs.settings(workspace, tmp_path / "run"), tmp_path / "config.json")
    influence = ["--keep-layers", "4", "--by", "influence", "--limit", "2"]
    assert main([*words, str(tmp_path / "c"), *influence, "--config", str(config)]) == 0
    said = capsys.readouterr().out
    assert said.count("kept") == 4 and "2 rows" in said
    rows = ["--data", str(workspace / "rows.jsonl"), "--reader", "messages"]
    assert main([*words, str(tmp_path / "d"), *influence, *rows, "--data.max_pixels", "2048"]) == 0
    records = [json.loads((tmp_path / name / "vlsi_shrink.json").read_text()) for name in "cd"]
    assert records[0]["influence"] == records[1]["influence"] and records[0]["kept_layers"] == records[1]["kept_layers"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--keep-layers", "3", "--limit", "4"], "--limit is for --by influence"),
        (["--keep-layers", "3", "--data.max_length", "4"], "--data.max_length is for --by influence"),
        (["--keep-layers", "1,2", "--by", "influence", "--reader", "easy_vqa"], "give a number there"),
        (["--keep-layers", "3", "--by", "influence"], "say which rows to measure on"),
        (["--keep-layers", "3", "--by", "influence", "--data", "x"], "go together; give both"),
        (["--keep-layers", "3", "--by", "influence", "--config", "x", "--reader", "easy_vqa"], "remove one"),
        (["--keep-layers", "3", "--by", "influence", "--reader", "easy_vqa", "--seed", "1"], "only --data.FIELD"),
        (["--keep-layers", "3", "--by", "influence", "--data", "/none.jsonl", "--reader", "llava"], "/none.jsonl"),
    ],
)
def test_bad_words(words, said, workspace, tmp_path, capsys):
    assert main(["shrink", "--model", str(workspace / "teacher"), "--out", str(tmp_path / "out"), *words]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["0", "1,x", "", "-3", "1,,2", "3.5"])
def test_layers_that_cannot_be_read(text, capsys):
    with pytest.raises(SystemExit):
        main(["shrink", "--model", "m", "--out", "o", f"--keep-layers={text}"])
    assert "give a number such as 14" in capsys.readouterr().err


def test_readers_are_those_of_the_config():
    assert set(arguments.READERS) == set(READERS)


# ---- layers: auto ----


@pytest.fixture(scope="module")
def shrunk(workspace, tmp_path_factory):
    """The tiny teacher with four of its six layers, [1, 2, 5, 6]."""
    return shrink(workspace / "teacher", tmp_path_factory.mktemp("shrunk") / "short", [1, 2, 5, 6]).folder


def config_of(workspace, shrunk, tmp_path, changes=None, **training):
    tree = runs.settings(workspace, tmp_path / "run", **training)
    tree["student"] = {"path": str(shrunk), "layers": "auto"}
    tree["teacher"]["layers"] = "auto"
    return load_config(runs.write_config(tree, tmp_path / "config.json"), changes or {})


def resolve(config):
    return {
        role: target_layers(
            getattr(config, role),
            AutoConfig.from_pretrained(getattr(config, role).path),
            role,
            config,
            Path(getattr(config, role).path),
        )
        for role in ("student", "teacher")
    }


def test_auto_layers(workspace, shrunk, tmp_path):
    for changes, student, teacher in (
        ({}, [1, 2, 3], [1, 2, 5]),
        ({"student.layers": [2, 4]}, [2, 4], [2, 6]),
        ({"student.layers": None}, [2], [2]),
        ({"teacher.layers": None}, [1, 2, 3], [2]),
        ({"teacher.layers": [1, 3, 4, 5]}, [1, 2, 3], [1, 3, 4, 5]),
    ):
        assert resolve(config_of(workspace, shrunk, tmp_path, changes)) == {"student": student, "teacher": teacher}


def test_auto_layers_of_deeper_students_are_the_papers(tmp_path):
    families.save(tmp_path / "big", "qwen2_vl", layers=12)
    shrink(tmp_path / "big", tmp_path / "short", [1, 2, 3, 4, 5, 6, 8, 10, 12])
    runs.make_rows(tmp_path, 2)
    tree = runs.settings(tmp_path, tmp_path / "run")
    tree["student"] = {"path": str(tmp_path / "short"), "layers": "auto"}
    tree["teacher"] = {"path": str(tmp_path / "big"), "layers": "auto"}
    config = load_config(runs.write_config(tree, tmp_path / "config.json"))
    assert resolve(config) == {"student": [2, 6], "teacher": [2, 6]}
    tree["student"]["layers"] = [6, 7, 9]
    assert resolve(load_config(runs.write_config(tree, tmp_path / "config.json")))["teacher"] == [6, 8, 12]


def test_auto_without_a_shrunk_student_of_this_teacher(workspace, shrunk, tmp_path):
    plain = config_of(workspace, workspace / "student", tmp_path)
    for role in ("student", "teacher"):
        model = AutoConfig.from_pretrained(workspace / role)
        with pytest.raises(ConfigError, match=rf"{role}.layers is auto, but .* is no shrunk copy. Make one with `vlsi"):
            target_layers(getattr(plain, role), model, role, plain)
    other = shutil.copytree(workspace / "teacher", tmp_path / "other")  # of the same depth, with other weights
    tiny.make_model(patch_size=8, hidden=48, layers=6, seed=5).save_pretrained(other)
    strange = config_of(workspace, shrunk, tmp_path, {"teacher.path": str(other)})
    said = rf"copy of {workspace / 'teacher'}, not of .*other.* \(here it was \[1, 2, 5\]\)"
    with pytest.raises(ConfigError, match=said):
        resolve(strange)
    with pytest.raises(Exception, match="change teacher.layers|not of teacher.path"):
        check_models(Subject(strange))
    with pytest.raises(ConfigError, match="not of teacher.path"):  # without weights: another depth
        target_layers(strange.teacher, AutoConfig.from_pretrained(workspace / "student"), "teacher", strange)
    damaged = shutil.copytree(shrunk, tmp_path / "damaged")
    for text, said in (("{", "is damaged"), ('{"format": 1}', "is damaged"), (None, "update vlsi-fast")):
        record = json.loads((shrunk / "vlsi_shrink.json").read_text()) | {"format": 2}
        (damaged / "vlsi_shrink.json").write_text(text or json.dumps(record))
        with pytest.raises(ConfigError, match=said):
            resolve(config_of(workspace, damaged, tmp_path))
    record = json.loads((shrunk / "vlsi_shrink.json").read_text()) | {"kept_layers": [1, 2]}
    (damaged / "vlsi_shrink.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="has 4 decoder layers and its vlsi_shrink.json tells of 2"):
        resolve(config_of(workspace, damaged, tmp_path))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"student.layers": "all"}, r"student.layers: use a list of whole numbers .* auto or null \(found 'all'\)"),
        ({"student.layers": [1, "2"]}, "student.layers: use a list of whole numbers"),
        ({"student.layers": [1, 2], "matching.strategy": "bottom", "matching.k": 3}, "matching.k is 3, .* 2 target"),
    ],
)
def test_config_with_auto(changes, said, workspace, shrunk, tmp_path):
    with pytest.raises(ConfigError, match=said):
        config_of(workspace, shrunk, tmp_path, changes)


def test_a_run_with_auto_layers(workspace, shrunk, tmp_path, capsys):
    """Stages, their records, and everything that reads a run's config."""
    config = config_of(workspace, shrunk, tmp_path, max_steps=1)
    assert Models(config).layers == {"student": [1, 2, 3], "teacher": [1, 2, 5]}
    assert "student: qwen2_vl, 3 target layers; teacher: qwen2_vl, 3 target layers" in check_models(Subject(config))
    folder = tmp_path / "run"
    for stage in ("verbalize", "interact"):
        facts = run(config, stage)[stage]["facts"]
        assert {role: fact["layers"] for role, fact in facts.items()} == {"student": [1, 2, 3], "teacher": [1, 2, 5]}
    trained = inspect_folder(folder / "interact" / "student")
    assert "layers 1, 2, 5, 6 of the 6 of teacher" in trained["shrunk_copy_of"] and trained["problems"] == []
    assert main(["inspect", str(shrunk)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "shrunk copy of decoder layers 1, 2, 5, 6 of the 6 of teacher" in said and "there, the same" in said
    assert main(["inspect", str(folder)]) == 0 and "student.layers auto" in " ".join(capsys.readouterr().out.split())
    assert main(["export", "--run", str(folder), "--out", str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "started as a shrunk copy: decoder layers 1, 2, 5, 6 of the 6 of teacher." in card
    assert not (tmp_path / "out" / "vlsi_shrink.json").exists()  # it holds a path
    capsys.readouterr()
    assert open_run(folder).config.teacher.layers == "auto"  # as report and viewer read it
    assert main(["plan", "--config", str(tmp_path / "config.json"), "--json"]) == 0
    # a run that starts from what this one made still knows the layers; a matching that needs more of them is refused
    again = config_of(workspace, folder / "interact" / "student", tmp_path)
    assert resolve(again) == {"student": [1, 2, 3], "teacher": [1, 2, 5]}
    changes = {"matching.strategy": "bottom", "matching.k": 4, "output_dir": str(folder)}
    shutil.rmtree(folder / "interact")
    with pytest.raises(ConfigError, match="matching.k is 4, but the teacher has 3 target layers"):
        run(config_of(workspace, shrunk, tmp_path, changes), "interact")
