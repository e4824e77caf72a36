"""Translating verbalizers: where they start, what they speak through, and runs with them."""

import json

import pytest
import tiny
import tiny_runs as runs
import torch
import transformers

from vlsi_fast import load_config, run
from vlsi_fast.config import ConfigError, VerbalizerConfig
from vlsi_fast.data import load_processor
from vlsi_fast.hidden_states import Language, VerbalizedBackbone
from vlsi_fast.lineage import read_record
from vlsi_fast.loading import read_head
from vlsi_fast.teacher_cache.build import Chosen, build
from vlsi_fast.translation import final_norm_of, gain_of, start_between, start_map
from vlsi_fast.verbalizer import Verbalizer, Verbalizers, VerbalizerSpec

ARCHITECTURES = ["mlp", "mlp_x2", "verb_ffn", "verb_ffn_x2", "ffn", "ffn_x2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("translation")
    runs.make_models(folder)
    runs.make_rows(folder, 12)
    return folder


def everything(count):
    return torch.arange(count).repeat(2, 1)


# ---- where they start ----


def test_one_head_and_norm_give_the_identity():
    head, gain = torch.randn(300, 24), torch.rand(24) + 0.5
    start = start_map((head, gain), (head.clone(), gain.clone()), everything(300))
    torch.testing.assert_close(start, torch.eye(24), rtol=0, atol=2e-5)


def test_a_head_that_the_student_can_say_is_kept_whole():
    """Logits of the translation are the teacher's, but for one number a token, where such a map exists; rows of tokens
    that the two do not share have no say."""
    student, gain_s, gain = torch.randn(200, 16), torch.rand(16) + 0.5, torch.rand(40) + 0.5
    wanted, order = torch.randn(16, 40), torch.randperm(260)[:200]
    head = torch.randn(260, 40) * 50
    head[order] = (student * gain_s) @ wanted / gain + torch.randn(40)  # the same added to all rows
    start = start_map((head, gain), (student, gain_s), torch.stack([torch.arange(200), order]))
    torch.testing.assert_close(start, wanted, rtol=1e-4, atol=1e-3)


def test_weights_decide_which_tokens_are_kept():
    """Against the weighted least squares of numpy's solver on the rows themselves."""
    student, head = torch.randn(90, 8).double(), torch.randn(90, 20).double()
    weight = torch.rand(90).double() ** 3
    share = (weight / weight.sum())[:, None]
    s, t = student - (share * student).sum(0), head - (share * head).sum(0)
    root = share.sqrt()
    wanted = torch.linalg.lstsq(root * s, root * t).solution
    ones = torch.ones
    start = start_map((head, ones(20)), (student, ones(8)), everything(90), weight)
    torch.testing.assert_close(start.double(), wanted, rtol=1e-4, atol=1e-4)
    unweighted = start_map((head, ones(20)), (student, ones(8)), everything(90))
    assert (unweighted.double() - wanted).norm() > 0.1 * wanted.norm()


def test_few_tokens_in_common():
    with pytest.raises(ValueError, match="1 tokens in common"):
        start_map((torch.randn(9, 4), torch.ones(4)), (torch.randn(9, 4), torch.ones(4)), everything(1))
    start = start_map((torch.randn(9, 8), torch.ones(8)), (torch.randn(9, 6), torch.ones(6)), everything(3))
    assert start.isfinite().all() and start.abs().max() < 1e3  # fewer than d_s: the rest is left at about zero


def test_norm_and_head_of_a_checkpoint(folder):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder / "student")
    norm = final_norm_of(folder / "student", model.config, torch.float32)
    x = torch.randn(5, 32) * 3
    torch.testing.assert_close(norm(x), model.model.language_model.norm(x))
    assert not any(p.requires_grad for p in norm.parameters())
    torch.testing.assert_close(gain_of(norm, 32), model.model.language_model.norm.weight, rtol=1e-5, atol=1e-5)
    assert torch.equal(read_head(folder / "student", model.config), model.lm_head.weight)  # tied


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("norm, residual", [(False, False), (True, True)])
def test_at_the_start_only_the_map_is_heard(architecture, norm, residual):
    spec = VerbalizerSpec(architecture, (1,), 20, 28, 1e-6, norm, residual, output_size=12, translates=True)
    verbalizer, x, start = Verbalizer(spec, 1), torch.randn(7, 20), torch.randn(12, 20)
    verbalizers = Verbalizers(spec)
    verbalizers.layers["1"] = verbalizer
    verbalizers.start_at(start)
    torch.testing.assert_close(verbalizer(x), x @ start.T)
    verbalizer(x).square().sum().backward()
    assert verbalizer.translation.weight.grad.norm() > 0
    inner = [p for n, p in verbalizer.named_parameters() if n.endswith((".down", ".linear"))]
    assert architecture == "mlp" or inner[-1].grad.norm() > 0  # and the blocks can learn


def test_a_model_in_its_own_language_says_what_it_says(folder):
    """The start between a model and itself: its translated last layer is the model's own output."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder / "teacher").eval()
    here = (folder / "teacher", model.config)
    tokens = everything(len(tiny.make_tokenizer("tiny")))
    verbalizers = Verbalizers(
        VerbalizerSpec.of(model.config, [2, 4, 6], VerbalizerConfig(), 48, translates=True)
    ).requires_grad_(False)
    verbalizers.start_at(start_between(here, here, tokens))
    language = Language(final_norm_of(*here, torch.float32), read_head(*here))
    speaking = VerbalizedBackbone(model, [2, 4], verbalizers, False, True, language, last_translated=True)
    inputs = {"input_ids": torch.randint(0, 250, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    index = torch.tensor([3, 4, 12])
    wanted = model(**inputs).logits.flatten(0, 1)[index]
    for parameter in (model.lm_head.weight, model.model.language_model.norm.weight):
        parameter.data.fill_(torch.nan)  # its own are not heard
    layers, last = speaking(inputs, index)
    assert layers.shape == (2, 3, 48)
    torch.testing.assert_close(last @ speaking.head_weight.T, wanted, rtol=1e-3, atol=1e-3)


# ---- runs ----


def start(folder, output, stages="verbalize interact", /, **sections):
    tree = runs.settings(folder, output, max_steps=2)
    tree["verbalizer"] = {"language": "student"}
    for name, fields in sections.items():
        tree[name] = {**tree.get(name, {}), **fields} if isinstance(fields, dict) else fields
    config = load_config(runs.write_config(tree, output.with_suffix(".json")))
    for stage in stages.split():
        run(config, stage)
    return output


def test_stages(folder, tmp_path):
    output = start(folder, tmp_path / "run", "verbalize interact sft")
    names = [f"loss/teacher_layer_{k}" for k in (1, 2, 3, 4, 5, 6)]
    assert [n for n in runs.metrics(output, "verbalize")[-1] if n.startswith("loss/teacher")] == names
    spec = Verbalizers.from_pretrained(output / "verbalize" / "teacher").spec
    assert (spec.layers, spec.output_size, spec.translates) == ((1, 2, 3, 4, 5, 6), 32, True)
    assert spec.made_for["student"]["checkpoint"] and spec.made_for["layers"] == [1, 2, 3, 4, 5]
    first, last = runs.metrics(output, "interact")[0], runs.metrics(output, "interact")[-1]
    assert len(first["kl"]) == 3 and len(first["kl"][0]) == 5 and "loss/last" in first
    assert last["loss"] > 0
    assert read_record(output / "interact")["facts"]["teacher"]["student"] == spec.made_for["student"]


@pytest.mark.parametrize("objective", ["own_output", "both"])
def test_layers_learn_what_the_teacher_itself_says(folder, tmp_path, objective):
    """Against plain log-softmaxes over the tokens that both have."""
    output = start(folder, tmp_path / "run", "verbalize", verbalize={"objective": objective}, training={"max_steps": 1})
    assert runs.losses(output, "verbalize")[0] > 0
    from vlsi_fast.losses import OperatorOptions, OwnHead, OwnOutputLoss

    weight, own = torch.randn(60, 8), torch.randn(70, 12)
    tokens = torch.stack([torch.randperm(60)[:40], torch.randperm(70)[:40]])
    hidden, last, labels = torch.randn(3, 5, 8, requires_grad=True), torch.randn(5, 12), torch.randint(60, (5,))
    loss = OwnOutputLoss(weight, OperatorOptions(60), objective == "both", OwnHead(own, tokens))(hidden, last, labels)
    p = (last @ own[tokens[1]].T).double().log_softmax(-1)
    q = (hidden @ weight[tokens[0]].T).double().log_softmax(-1)
    wanted = (p.exp() * (p - q)).sum(-1).mean(-1)
    if objective == "both":
        wanted = wanted - (hidden @ weight.T).double().log_softmax(-1)[:, torch.arange(5), labels].mean(-1)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-4, atol=1e-4)
    (found,) = torch.autograd.grad(loss.sum(), hidden, retain_graph=True)
    (true,) = torch.autograd.grad(wanted.sum(), hidden)
    torch.testing.assert_close(found, true, rtol=1e-3, atol=1e-4)


# ---- another tokenizer ----


@pytest.fixture(scope="module")
def foreign(folder, tmp_path_factory):
    """The same teacher and rows, and a student whose BPE has fewer merges, and other ids of special tokens."""
    foreign = tmp_path_factory.mktemp("foreign")
    (foreign / "teacher").symlink_to(folder / "teacher")
    runs.make_rows(foreign, 12)
    processor = tiny.make_processor("tiny", patch_size=8, min_pixels=1024, max_pixels=1024)
    processor.tokenizer = other_tokenizer()
    model = tiny.make_model(tokenizer=processor.tokenizer, patch_size=8, hidden=32, layers=4, seed=1)
    model.save_pretrained(foreign / "student")
    processor.save_pretrained(foreign / "student")
    return foreign


def other_tokenizer():
    """Bytes and the merges of a few words only: the answers' words are several tokens, most of them other ones."""
    import tokenizers

    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tiny.make_tokenizer("tiny").backend_tokenizer.pre_tokenizer
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(["circle circle yellow black, a a"] * 9, trainer)
    vocab = json.loads(trained.to_str())["model"]
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab["vocab"], merges=[tuple(m) for m in vocab["merges"]])
    tokenizer.add_special_tokens({"additional_special_tokens": tiny.SPECIAL_TOKENS[1:]})
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    return tokenizer


def test_own_language_takes_one_tokenizer(foreign, tmp_path):
    with pytest.raises(ConfigError, match="verbalizer.language"):
        start(foreign, tmp_path / "run", verbalizer={"language": "own"})


def test_own_output_of_another_tokenizer_is_warned_of(foreign, folder, tmp_path, capsys):
    start(foreign, tmp_path / "run", "verbalize", verbalize={"objective": "both", "models": ["teacher"]})
    said = capsys.readouterr()
    assert "verbalize.objective both with another tokenizer" in said.out + said.err
    start(folder, tmp_path / "same", "verbalize", verbalize={"objective": "both", "models": ["teacher"]})
    said = capsys.readouterr()
    assert "another tokenizer" not in said.out + said.err


def test_a_teacher_of_another_tokenizer(foreign, tmp_path):
    """All stages; and from a cache to the last bit what the teacher in the job teaches."""
    output = start(foreign, tmp_path / "live", "verbalize interact sft")
    for stage in ("verbalize", "interact"):
        record = read_record(output / stage)
        assert record["summary"]["unaligned_tokens"] > 0, "else this shows nothing"
        assert record["summary"]["answer_tokens"] > record["summary"]["unaligned_tokens"]
    live = load_config(tmp_path / "live.json")
    build(live, Chosen(tmp_path / "cache", numbers="float32", rows=12, progress=False))
    speakers = {r: str(output / "verbalize" / r) for r in ("student", "teacher")}
    cached = {"mode": "cached", "cache": str(tmp_path / "cache"), "verbalizers": speakers["teacher"]}
    here = {"student": {"verbalizers": speakers["student"]}}
    start(foreign, tmp_path / "run", "interact", teacher=cached, **here)
    start(foreign, tmp_path / "again", "interact", teacher={"verbalizers": speakers["teacher"]}, **here)
    for name in ("loss", "kl", "answer_tokens", "unaligned_tokens"):
        values = [[r[name] for r in runs.metrics(tmp_path / f, "interact")] for f in ("run", "again")]
        assert values[0] == values[1], name


def shuffled(order):
    """The tiny tokenizer with other ids for its first tokens."""
    vocab, merges = tiny._vocab_and_merges("tiny")
    vocab = {token: int(order[i]) if i < len(order) else i for token, i in vocab.items()}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=list(merges))
    tokenizer.add_special_tokens({"additional_special_tokens": tiny.SPECIAL_TOKENS[1:]})
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", tiny.CHAT_TEMPLATE
    return tokenizer


def test_the_start_is_heard_across_tokenizers(folder, tmp_path):
    """A teacher whose tokens are the student's in another order, and whose head's rows follow: what stage verbalize
    starts from is the student's own loss, before any training."""
    student = transformers.AutoModelForImageTextToText.from_pretrained(folder / "student")
    processor = load_processor(folder / "student")
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    processor.tokenizer = shuffled(order)
    weight = student.lm_head.weight.data
    weight[:256] = weight[:256][order.argsort()]
    (tmp_path / "student").symlink_to(folder / "student")
    runs.make_rows(tmp_path, 12)
    student.save_pretrained(tmp_path / "teacher")
    processor.save_pretrained(tmp_path / "teacher")
    layers = {"teacher": {"layers": [1, 2, 3]}}
    own = start(folder, tmp_path / "own", "verbalize", verbalizer={"language": "own", "residual": True})
    other = start(tmp_path, tmp_path / "other", "verbalize", **layers)
    wanted, found = (runs.metrics(output, "verbalize")[0] for output in (own, other))
    assert read_record(other / "verbalize")["summary"]["unaligned_tokens"] == 0
    for k in (1, 2, 3):
        assert found[f"loss/teacher_layer_{k}"] == pytest.approx(wanted[f"loss/student_layer_{k}"], rel=1e-3)
