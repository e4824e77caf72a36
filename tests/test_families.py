"""Small models of every family, and of pairs across families, through all three stages; their data on the way."""

import contextlib
import json
import pickle
import re
from functools import cache

import pytest
import tiny
import tiny_families as families
import tiny_runs as runs
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from vlsi_fast import load_config, run
from vlsi_fast.backbones import FAMILIES, family_of
from vlsi_fast.config import ConfigError, VerbalizerConfig
from vlsi_fast.config_data import DataConfig
from vlsi_fast.data import Collator, VlsiDataset, build_source, load_processor
from vlsi_fast.data.encoding import configure_image_bounds, encode
from vlsi_fast.data.messages import Sample
from vlsi_fast.hidden_states import VerbalizedBackbone, answer_positions
from vlsi_fast.lineage import LineageError, read_record
from vlsi_fast.loading import cut_config, load_backbone
from vlsi_fast.planner.checks.command import look
from vlsi_fast.planner.checks.subject import Subject
from vlsi_fast.ranks import shard_loading
from vlsi_fast.verbalizer import Verbalizers, VerbalizerSpec

NAMES = sorted(FAMILIES)
CONFIG = DataConfig(train=[{"reader": "easy_vqa"}])
# teacher, student; the last two are pairs across families, in both directions
BARE = {"glm4v": "<|endoftext|>"}
"""Families whose template writes nothing behind an answer -> what is learnt behind the last one."""
STUDENTS = {"qwen3_vl_moe": "qwen3_vl"}
"""Whom a family's teacher teaches, where not its own: what has experts is not trained whole."""
PAIRS = [(name, STUDENTS.get(name, name)) for name in NAMES if name != "qwen2_vl"]  # test_stages.py has Qwen2-VL
PAIRS += [("llava_onevision", "qwen2_vl"), ("qwen2_vl", "llava_onevision")]


@cache
def processor(name):
    return families.make_processor(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small teacher and student (tied head) of every family, and rows with images of several shapes."""
    folder = tmp_path_factory.mktemp("families")
    for name in NAMES:
        families.save(folder / f"teacher_{name}", name, hidden=48, layers=6, seed=1)
        families.save(folder / f"student_{name}", name, hidden=32, layers=4, seed=2, tied=True)
    path = runs.make_rows(folder)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i, size in enumerate([(64, 20), (20, 64), (48, 40)]):
        image = Image.open(folder / rows[i]["images"][0]).resize(size)
        image.save(folder / rows[i]["images"][0])
    rows[3]["images"] *= 2
    rows[3]["messages"][0]["content"] = "<image><image>Which of the two?"
    rows[4] = {"messages": rows[4]["messages"][1:]}  # no image
    rows[4]["messages"].insert(0, {"role": "user", "content": "What?"})
    path.write_text("\n".join(map(json.dumps, rows[:12])))
    return folder


def start(folder, output, teacher, student, stage="all", /, **sections):
    tree = runs.settings(folder, output, max_steps=2, gradient_checkpointing=True)
    tree["teacher"]["path"] = str(folder / f"teacher_{teacher}")
    tree["student"]["path"] = str(folder / f"student_{student}")
    for name, value in sections.items():
        tree[name] = tree.get(name, {}) | value if isinstance(value, dict) else value
    return run(load_config(runs.write_config(tree, output.parent / f"{output.name}.yaml")), stage)


def sample(text, *sizes, answer="a red circle"):
    content = [{"type": "image"} for _ in sizes] + [{"type": "text", "text": text}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return Sample("row", [{"role": "user", "content": content}, answer], list(sizes))


def picture(size):
    return Image.effect_noise(size, 90).convert("RGB")


# ---- the three stages ----


@pytest.mark.parametrize("teacher, student", PAIRS, ids=lambda name: name)
def test_three_stages(folder, tmp_path, teacher, student):
    """Every stage learns what it should; the result is a stock checkpoint that generates from an image."""
    start(folder, tmp_path / "run", teacher, student)
    output = tmp_path / "run"
    for stage in ("verbalize", "interact", "sft"):
        assert read_record(output / stage)["state"] == "finished"
        assert all(0 < loss < 60 for loss in runs.losses(output, stage))
    record = runs.metrics(output, "interact")[-1]
    assert len(record["kl"]) == 3 and len(record["kl"][0]) == 5 and sum(map(sum, record["matches"])) == 6

    base = dict(load_backbone(folder / f"student_{student}", "float32").named_parameters())
    distilled = load_backbone(output / "interact" / "student", "float32")
    final, info = AutoModelForImageTextToText.from_pretrained(output / "sft" / "student", output_loading_info=True)
    assert not any(info.values()), info
    assert final.lm_head.weight is final.get_input_embeddings().weight, "tied before, tied after"
    vision = {id(p) for part in family_of(final.config).vision(final) for p in _parameters(part)}
    changed = {"interact": set(), "sft": set()}
    for (name, after), before in zip(final.named_parameters(), distilled.parameters(), strict=True):
        assert torch.equal(after, before) == (id(after) in vision), f"sft trains the language model alone: {name}"
        if not torch.equal(before, base[name]):
            changed["interact"].add(name)
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    linears += ("in_proj_qkv", "in_proj_z", "out_proj", "gate_up_proj")  # of linear attention; GLM's FFN
    inside = re.compile(r"\.(language|text)_model\.layers\..*\.(" + "|".join(linears) + r")\.weight")
    assert changed["interact"] == {n for n in base if inside.search(n)}

    stock = load_processor(output / "sft" / "student")
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    prompt = stock.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    inputs = stock(text=[prompt], images=[[picture((64, 40))]], return_tensors="pt")
    assert final.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def _parameters(part):
    return [part] if isinstance(part, torch.nn.Parameter) else list(part.parameters())


def test_what_differs_between_the_tokenizers_is_recorded(folder, tmp_path):
    start(folder, tmp_path / "run", "llava_onevision", "qwen2_vl", "verbalize")
    found = read_record(tmp_path / "run" / "verbalize")["tokens"]
    first, differing = processor("llava_onevision").image_token_id, found["differing"]
    assert found["first_differing_id"] == first
    assert differing["<image>"] == [None, first] and differing["<|object_ref_start|>"] == [first, None]


def test_a_student_with_experts_learns_by_its_attention(folder, tmp_path):
    """Of its language model, stage interact and sft by LoRA change the projections of attention alone."""
    start(folder, tmp_path / "run", "qwen3_vl_moe", "qwen3_vl_moe", sft={"method": "lora"})
    before = dict(load_backbone(folder / "student_qwen3_vl_moe", "float32").named_parameters())
    for stage in ("interact", "sft"):
        after = load_backbone(tmp_path / "run" / stage / "student", "float32")
        changed = {name for name, value in after.named_parameters() if not torch.equal(value, before[name])}
        assert changed == {n for n in before if "language_model" in n and n.split(".")[-2][1:] == "_proj"}
        before = dict(after.named_parameters())


def test_a_student_with_experts_is_not_trained_whole(folder, tmp_path):
    """Said by the first stage, not when sft begins, and by `check`; a config without that stage goes on."""
    options = {"match": "sft.method is full, but qwen3_vl_moe routes tokens to experts.* set sft.method to lora"}
    with pytest.raises(ConfigError, **options):
        start(folder, tmp_path / "run", "qwen3_vl_moe", "qwen3_vl_moe", "verbalize")
    with pytest.raises(ConfigError, **options):
        sections = {"stages": ["verbalize"], "sft": {"start_from": "base"}}
        start(folder, tmp_path / "run", "qwen3_vl_moe", "qwen3_vl_moe", "sft", **sections)
    (line,) = look(Subject(load_config(tmp_path / "run.yaml"), ("sft",)), ("models",))
    assert (line.status, line.fix) == ("FAILURE", "set sft.method to lora")


def test_a_sharded_loads_experts_are_gathered_with_their_router(folder, monkeypatch):
    """Of every layer that is loaded, DeepSpeed is told so; the loader's partitioning is left out here."""
    from deepspeed.utils import get_z3_leaf_modules

    monkeypatch.setattr(shard_loading, "_partitioning", lambda zero: contextlib.nullcontext())
    for name, count in ("qwen3_vl_moe", 3), ("qwen3_vl", 0):
        path = folder / f"teacher_{name}"
        full, config = (AutoConfig.from_pretrained(path) for _ in range(2))
        cut_config(config, 3)
        model = shard_loading.load_sharded(path, config, full, torch.float32, "sdpa", {})
        assert get_z3_leaf_modules(model) == [layer.mlp for layer in model.get_decoder().layers][:count]
        stock = load_backbone(path, "float32", depth=3).state_dict()
        assert all(torch.equal(value, stock[key]) for key, value in model.state_dict().items())


def test_a_layer_of_experts_is_no_verbalizer(folder, tmp_path):
    with pytest.raises(ConfigError, match="qwen3_vl_moe has experts .* use verbalizer.architecture verb_ffn"):
        verbalizer = {"architecture": "decoder"}
        start(folder, tmp_path / "run", "qwen3_vl_moe", "qwen3_vl", "verbalize", verbalizer=verbalizer)
    assert not (tmp_path / "run" / "verbalize").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoder_verbalizers_across_families(folder, tmp_path, dtype):
    for stage in ("verbalize", "interact"):
        start(
            folder,
            tmp_path / "run",
            "qwen3_vl",
            "llava_onevision",
            stage,
            dtype=dtype,
            verbalizer={"architecture": "decoder", "norm": True},
        )
    assert all(0 < loss < 60 for loss in runs.losses(tmp_path / "run", "interact"))


@pytest.mark.parametrize("name", NAMES)
def test_first_sft_loss_is_the_stock_models(folder, tmp_path, name):
    """A batch of several images, none, and images of several shapes, against the stock model row by row."""
    training = {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1, "max_steps": 1}
    sft = {"start_from": "base", "method": "full" if FAMILIES[name].sparse_block is None else "lora"}
    start(folder, tmp_path / "run", name, name, "sft", training=training, sft=sft)
    record = runs.metrics(tmp_path / "run", "sft")[0]
    config = load_config(tmp_path / "run.yaml")
    dataset = VlsiDataset(build_source(config.data.train), {"student": processor(name)}, config.data)
    model = load_backbone(folder / f"student_{name}", "float32")
    total = count = 0
    for i in range(12):
        row = dataset[i]["student"]
        tokens = int((row["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(**row).loss) * tokens
        count += tokens
    assert record["answer_tokens"] == count
    assert record["loss"] == pytest.approx(total / count, rel=1e-5)


# ---- backbones ----


@pytest.mark.parametrize("name", NAMES)
def test_loading_draws_no_random_numbers(folder, monkeypatch, name):
    """As under ZeRO-3, where the model is built for real and not on the meta device."""

    def built(path, **_):
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path)), {"missing_keys": set()}

    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", built)
    before = torch.random.get_rng_state()
    load_backbone(folder / f"student_{name}", "float32")
    assert torch.equal(before, torch.random.get_rng_state())


def record_states(name, architecture):
    """States at target layers 1, 2 and 4 as verbalizers get them, with the batch's inputs and the model."""
    model = families.make_model(name, tokenizer=processor(name).tokenizer)
    settings = type("Settings", (), {"architecture": architecture, "norm": False, "residual": False})
    verbalizers = Verbalizers(VerbalizerSpec.of(model.config, [1, 2, 4], settings))
    row = encode(sample("What?", (48, 40)), processor(name), CONFIG, picture)
    index, _ = answer_positions(row.pop("labels"))
    seen = []
    verbalizers.register_forward_pre_hook(lambda _, arguments: seen.extend(arguments[0]))
    with torch.no_grad():
        VerbalizedBackbone(model, [1, 2, 4], verbalizers, False)(row, index)
    return seen, row, index, model


@pytest.mark.parametrize(
    "name, architecture", [(n, a) for a in ("mlp", "decoder") for n in (families.DECODERS if a == "decoder" else NAMES)]
)
def test_a_target_layers_state_is_what_the_next_layer_reads(name, architecture):
    """Also where vision features are added between two layers (Qwen3-VL's deepstack)."""
    seen, row, index, model = record_states(name, architecture)
    layers = FAMILIES[name].decoder_layers(model)
    reads, leaves = {}, {}
    for k, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda _, arguments, k=k: reads.__setitem__(k, arguments[0]))
        layer.register_forward_hook(lambda _, arguments, output, k=k: leaves.__setitem__(k + 1, output))
    with torch.no_grad():
        model(**row)
    wanted = [reads[1], reads[2], leaves[4]]
    for state, whole in zip(seen, wanted, strict=True):
        torch.testing.assert_close(state, whole if architecture == "decoder" else whole[0, index], rtol=0, atol=0)
    added = (reads[1] != leaves[1]).any(-1)
    image = row["input_ids"] == model.config.image_token_id
    assert torch.equal(added, image if name in families.DEEPSTACK else torch.zeros_like(image))


def test_smolvlm_sees_the_tiles_that_the_stock_model_sees():
    """Joined rows against the stock model's own padding, row by row."""
    made, wanted = processor("smolvlm"), []
    model = families.make_model("smolvlm", tokenizer=made.tokenizer)
    samples = [sample("What?", (64, 60)), sample("a?"), sample("b?", (40, 30), (20, 64))]
    rows = [encode(each, made, CONFIG, picture) for each in samples]
    for row in rows:
        inputs = {name: value for name, value in row.items() if name != "labels"}
        with torch.no_grad():
            hidden = model.model(**inputs, use_cache=False).last_hidden_state
        wanted.append(hidden[0, answer_positions(row["labels"])[0]])
    batch = Collator({"student": made})([{"id": str(i), "skipped": [], "student": r} for i, r in enumerate(rows)])
    batch = batch["student"]
    index, _ = answer_positions(batch.pop("labels"))
    assert batch["pixel_values"].shape[:2] == (1, 5 + 5 + 3) and "pixel_attention_mask" not in batch
    backbone = VerbalizedBackbone(model, [], None, train_backbone=False)
    torch.testing.assert_close(backbone(batch, index)[1], torch.cat(wanted), rtol=1e-5, atol=2e-5)
    # the language model alone in float32, as it is trained without DeepSpeed in a bfloat16 run
    for part in family_of(model.config).vision(model):
        part.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = backbone(batch, index)[1]
    torch.testing.assert_close(mixed.float(), torch.cat(wanted), rtol=0.1, atol=0.1)


def test_internvl_with_qwen3():
    """InternVL3.5: norms of queries and keys, a head width of its own; a copy of the next layer says what that says."""
    config = families._config("internvl", 32, 3, True, processor("internvl").tokenizer)
    fields = config.to_dict()
    fields["text_config"] |= {"model_type": "qwen3", "head_dim": 24}
    config = type(config)(**fields)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    assert type(model.get_decoder()).__name__ == "Qwen3Model"
    for name, parameter in model.get_decoder().named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    verbalizers = Verbalizers(VerbalizerSpec.of(config, [1], VerbalizerConfig(architecture="decoder", norm=True)))
    following = family_of(config).decoder_layers(model)[1]
    verbalizers.layers["1"].blocks[0].load_state_dict(following.state_dict())
    row = encode(sample("What?", (48, 40), (20, 20)), processor("internvl"), CONFIG, picture)
    index, _ = answer_positions(row.pop("labels"))
    with torch.no_grad():
        spoken, _ = VerbalizedBackbone(model, [1], verbalizers, train_backbone=False)(row, index)
        states = model(**row, output_hidden_states=True).hidden_states
        expected = model.get_decoder().norm(states[2])[0, index]
    torch.testing.assert_close(spoken[0], expected, rtol=1e-4, atol=1e-5)
    targets = family_of(config).lora_targets
    assert sum(bool(re.fullmatch(targets, name)) for name, _ in model.named_modules()) == 7 * 3


# ---- data ----


@pytest.mark.parametrize("name", NAMES)
def test_processor_saves_a_stock_checkpoint(name, tmp_path):
    made = processor(name)
    made.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    kind = FAMILIES[name].processor.removesuffix("Processor").replace("2_5_", "2")  # Qwen2.5-VL has Qwen2-VL's
    video = f"{kind}VideoProcessor"
    assert saved["processor_class"] == FAMILIES[name].processor
    again = load_processor(tmp_path)
    assert type(again) is type(made) and _as_json(again) == _as_json(made)
    assert type(pickle.loads(pickle.dumps(again))) is type(made), "data workers may be spawned"
    if name == "gemma3":  # no videos
        assert "video_processor" not in saved
        return
    assert saved["video_processor"]["video_processor_type"] == video
    # checkpoints from the Hub may keep the video part in a file of its own
    del saved["video_processor"]
    (tmp_path / "processor_config.json").write_text(json.dumps(saved))
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({"video_processor_type": video, "fps": 7}))
    assert load_processor(tmp_path).to_dict()["video_processor"] == {"video_processor_type": video, "fps": 7}


def _as_json(each):
    return json.loads(json.dumps(each.to_dict()))  # tuples are lists in a file


def test_answers_are_the_same_tokens_in_every_family():
    """Other templates, other numbers of image tokens, the same answer."""
    row = sample("What?", (64, 20), answer="yes, a red circle.\n It is")
    answers, lengths = {}, {}
    for name in families.QWEN_TOKENS:
        encoded = encode(row, processor(name), CONFIG, picture)
        answers[name] = encoded["labels"][encoded["labels"] != -100].tolist()
        lengths[name] = encoded["input_ids"].shape[1]
    assert len({tuple(ids) for ids in answers.values()}) == 1 and len(answers["qwen2_vl"]) > 5
    assert processor("qwen2_vl").tokenizer.decode(answers["llava_onevision"]) == "yes, a red circle.\n It is<|im_end|>"
    assert lengths["llava_onevision"] != lengths["qwen2_vl"]


def test_smolvlm_answers_begin_with_a_space():
    """What follows the generation prompt: the template has the space behind the colon in front of an answer alone. The
    rows of tiles in front of it, and their line breaks, are no answer."""
    made, turns = processor("smolvlm"), sample("What 12?", (64, 60), (64, 20), answer="yes, a red circle.\n It is 27")
    turns.messages += [{"role": "user", "content": [{"type": "text", "text": "Sure?"}]}]
    turns.messages += [{"role": "assistant", "content": [{"type": "text", "text": "no"}]}]
    encoded = encode(turns, made, CONFIG, picture)
    ids, labels = encoded["input_ids"][0], encoded["labels"][0]
    learnt = made.tokenizer.decode(labels[labels != -100])
    assert learnt == " yes, a red circle.\n It is 27<end_of_utterance> no<end_of_utterance>"
    assert torch.equal(ids[labels != -100], labels[labels != -100])
    assert made.tokenizer.convert_ids_to_tokens(labels[labels != -100].tolist())[-5:-1] != ["27"], "digits are alone"
    prompt = made.apply_chat_template(turns.messages[:1], add_generation_prompt=True)
    images = [[picture((64, 60)), picture((64, 20))]]
    asked = made(text=[prompt], images=images, return_tensors="pt")["input_ids"][0]
    first = int((labels != -100).nonzero()[0])
    assert torch.equal(ids[:first], asked), "an answer goes on where a prompt ends"
    stock = made(text=[made.apply_chat_template(turns.messages)], images=images, return_tensors="pt")
    assert torch.equal(stock["input_ids"][0], ids) and int((ids == made.tokenizer.bos_token_id).sum()) == 1


def test_tokenizers_of_other_families_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="give [0-9]+ tokens different ids.*choose models of one family"):
        start(folder, tmp_path / "run", "qwen2_vl", "smolvlm", "verbalize")


def test_answers_of_a_tokenizer_with_pieces_bytes_and_a_beginning():
    """Gemma 3: one <bos>, line breaks around images that merge with the text's, spaces in front of words, bytes."""
    made, answer = processor("gemma3"), "yes, a  red\n\ncircle é犬"
    row = encode(sample("\nWhat?", (64, 20), (20, 20), answer=f" {answer}\n"), made, CONFIG, picture)
    ids, labels = row["input_ids"][0], row["labels"][0]
    assert int((ids == made.tokenizer.bos_token_id).sum()) == 1 and ids[0] == made.tokenizer.bos_token_id
    assert made.tokenizer.decode(labels[labels != -100]) == answer + "<end_of_turn>"
    assert int((ids == made.tokenizer.image_token_id).sum()) == 2 * families.GEMMA_TOKENS
    assert torch.equal(row["token_type_ids"][0], (ids == made.tokenizer.image_token_id).long())
    plain = made.tokenizer.convert_ids_to_tokens(ids.tolist())
    assert "\n\n\n" in plain, "the template's line break and the processor's are one token"
    words = made.tokenizer.convert_ids_to_tokens(labels[labels != -100].tolist())
    assert "▁red" in words and "<0xE7>" in words


@pytest.mark.parametrize("turns", [1, 2, 3, 5])
@pytest.mark.parametrize("name", NAMES)
def test_every_answer_of_a_conversation_is_found(name, turns):
    """Also where the template writes the last one otherwise (an empty thought in front), and so in no other's place."""
    messages = []
    for i in range(turns):
        messages += sample(f"what is {i}?", answer=f"yes, {i} is red").messages
    row = encode(Sample("row", messages, []), processor(name), CONFIG, picture)
    learnt = row["labels"][0][row["labels"][0] != -100]
    end = {"glm4v": "", "smolvlm": "<end_of_utterance>", "gemma3": "<end_of_turn>"}.get(name, "<|im_end|>")
    before = " " if name == "smolvlm" else ""
    wanted = "".join(f"{before}yes, {i} is red{end}" for i in range(turns)) + BARE.get(name, "")
    assert processor(name).tokenizer.decode(learnt) == wanted


def test_true_vocabulary_gives_the_same_answers():
    made = [families.make_processor(name, "qwen") for name in ("llava_onevision", "qwen2_vl")]
    row = sample("What?", (64, 20), answer="naïve 犬 12.5%\n\n- done")
    one, other = (encode(row, each, CONFIG, picture) for each in made)
    assert one["labels"][one["labels"] != -100].tolist() == other["labels"][other["labels"] != -100].tolist()


def test_llava_patches_are_padded_and_left_out_again():
    """One image is cut into tiles, several of a row are not; a batch of both gives each row its own result."""
    name = "llava_onevision"
    samples = [sample("What?", (64, 60)), sample("a?", (30, 20)), sample("b?", (40, 30), (20, 20)), sample("c?")]
    rows = [
        {"id": str(i), "skipped": [], "student": encode(s, processor(name), CONFIG, picture)}
        for i, s in enumerate(samples)
    ]
    shapes = [tuple(row["student"]["pixel_values"].shape[:2]) for row in rows[:3]]
    assert shapes == [(1, 5), (1, 2), (2, 1)]
    batch = Collator({"student": processor(name)})(rows)["student"]
    assert tuple(batch["pixel_values"].shape[:2]) == (4, 5) and batch["batch_num_images"].tolist() == [1, 1, 2]
    assert not batch["pixel_values"][1, 2:].any() and not batch["pixel_values"][2:, 1:].any()
    model = families.make_model(name, tokenizer=processor(name).tokenizer)
    labels = batch.pop("labels")
    with torch.no_grad():
        together = model(**batch).logits
        for i, row in enumerate(rows):
            inputs = {key: value for key, value in row["student"].items() if key != "labels"}
            alone = model(**inputs).logits[0]
            torch.testing.assert_close(together[i, : alone.shape[0]], alone, rtol=1e-4, atol=1e-4)
    assert labels.shape == batch["input_ids"].shape


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_images_gets_a_masked_one(name):
    rows = [{"id": "0", "skipped": [], "student": encode(sample("c?"), processor(name), CONFIG, picture)}]
    plain = Collator({"student": processor(name)})(rows)["student"]
    batch = Collator({"student": processor(name)}, always_image=True)(rows)["student"]
    length = plain["input_ids"].shape[1]
    assert batch["pixel_values"].numel() and int(batch["attention_mask"].sum()) == length
    model = families.make_model(name, tokenizer=processor(name).tokenizer)
    logits = []
    for inputs in (plain, batch):
        del inputs["labels"]
        with torch.no_grad():
            logits.append(model(**inputs).logits[:, :length])
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


def test_answers_that_spell_a_token_of_one_family(folder, tmp_path):
    """As text both models read the same; a run that refuses such rows skips them."""
    words = ["yes", "the <|box_start|> is red", "no <video>"]
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": w}]} for w in words]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"reader": "messages", "path": str(tmp_path / "rows.jsonl")}
    pair = {"student": processor("qwen2_vl"), "teacher": processor("llava_onevision")}
    config = DataConfig(train=[source])
    found = VlsiDataset(build_source(config.train), pair, config)[1]
    assert found["id"].endswith("#1") and not found["skipped"]
    labels = [found[role]["labels"][found[role]["labels"] != -100].tolist() for role in pair]
    assert labels[0] == labels[1]
    assert not {"<|box_start|>"} & set(pair["student"].tokenizer.convert_ids_to_tokens(labels[0]))
    config = DataConfig(train=[source], special_tokens="skip")
    found = VlsiDataset(build_source(config.train), pair, config)[1]
    assert found["id"].endswith("#0") and [s["cause"] for s in found["skipped"]] == ["special_token"] * 2


# ---- pixel bounds of one model ----


def test_pixel_bounds_of_one_model(folder, tmp_path):
    bounded = {"min_pixels": 4096, "max_pixels": 4096}
    start(folder, tmp_path / "plain", "llava_onevision", "qwen2_vl", "verbalize")
    start(folder, tmp_path / "run", "llava_onevision", "qwen2_vl", "verbalize", student=bounded)
    one, other = runs.metrics(tmp_path / "plain", "verbalize")[0], runs.metrics(tmp_path / "run", "verbalize")[0]
    assert one["loss/student_layer_2"] != pytest.approx(other["loss/student_layer_2"], rel=1e-5)
    assert one["loss/teacher_layer_2"] == pytest.approx(other["loss/teacher_layer_2"], rel=1e-5)
    tree = load_config(tmp_path / "run.yaml", {"student.max_pixels": 8192})
    with pytest.raises(LineageError, match="student.max_pixels: there 4096, now 8192"):
        run(tree, "verbalize", resume=True)


def test_llava_has_no_pixel_bounds(folder, tmp_path):
    with pytest.raises(ConfigError, match="no bounds on the number of pixels; remove teacher.min_pixels"):
        start(folder, tmp_path / "run", "llava_onevision", "qwen2_vl", "verbalize", teacher={"min_pixels": 100})
    tree = {"min_pixels": 1024, "train": [{"reader": "messages", "path": str(folder / "rows.jsonl")}]}
    with pytest.raises(ConfigError, match="remove data.min_pixels .*; to bound the other model's images alone"):
        start(folder, tmp_path / "run", "llava_onevision", "qwen2_vl", "verbalize", data=tree)


@pytest.mark.parametrize("name", families.GRIDS)
def test_pixel_bounds_are_of_one_image(name):
    """Whatever the processor counts them over (GLM's: two frames that it makes of an image)."""
    made = families.make_processor(name)
    side = families.PATCH * 2
    for bound in (16, 36):
        configure_image_bounds(made, bound * side**2, bound * side**2)
        row = encode(sample("What?", (200, 200)), made, CONFIG, picture)
        assert int((row["input_ids"] == made.image_token_id).sum()) == bound


def test_processors_of_one_tokenizer_kind_only():
    """The tiny LLaVA tokenizer is Qwen2-VL's up to the special tokens, as the true ones are."""
    llava, qwen = (processor(name).tokenizer.get_vocab() for name in ("llava_onevision", "qwen2_vl"))
    shared = llava.keys() & qwen.keys()
    assert all(llava[token] == qwen[token] for token in shared)
    assert qwen.keys() - shared == set(tiny.SPECIAL_TOKENS[3:]) and llava.keys() - shared == {"<image>", "<video>"}
