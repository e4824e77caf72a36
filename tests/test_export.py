"""`vlsi-fast export`: what is written loads without this package and is the run's student; the card is true."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_runs as runs
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, Qwen2VLForConditionalGeneration

from vlsi_fast import load_config, run
from vlsi_fast.cli import main
from vlsi_fast.config import ConfigError
from vlsi_fast.data import load_processor
from vlsi_fast.export.checkpoint import _example
from vlsi_fast.export.scores import read_scores
from vlsi_fast.lineage import checkpoint_digest


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of all stages, two steps each, whose sft is LoRA."""
    folder = tmp_path_factory.mktemp("export")
    runs.make_models(folder)
    runs.make_rows(folder, 12)
    (folder / "student" / "README.md").write_text("---\nlicense: bsd-3-clause\n---\n")
    tree = runs.settings(folder, folder / "run", max_steps=2) | {"sft": {"method": "lora"}}
    tree["data"]["eval"] = tree["data"]["train"]
    run(load_config(runs.write_config(tree, folder / "config.json")), "all")
    return folder / "run"


def export(run_folder, out, *words) -> int:
    return main(["export", "--run", str(run_folder), "--out", str(out), *map(str, words)])


ALONE = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.utils import is_torchvision_available
folder, inputs, output = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
if is_torchvision_available():  # without it transformers cannot build the stock processor, for want of its video part
    AutoProcessor.from_pretrained(folder)
image_processor = AutoImageProcessor.from_pretrained(folder)
assert tokenizer.chat_template and model.generation_config.eos_token_id
with torch.inference_mode():
    torch.save(model(**load_file(inputs)).logits, output)
assert "vlsi_fast" not in sys.modules and "vlsi_kernels" not in sys.modules
print(type(model).__name__, len(tokenizer), type(image_processor).__name__)
"""


def test_a_stranger_loads_the_same_student(finished, tmp_path, capsys):
    """Another process, isolated from this repository, and the run's own student by the stock class here."""
    from safetensors.torch import save_file

    assert export(finished, tmp_path / "out") == 0
    source = finished / "sft" / "student"
    processor = load_processor(source)
    inputs = _example(processor)
    save_file({name: value.contiguous() for name, value in inputs.items()}, tmp_path / "inputs.safetensors")
    command = [sys.executable, "-I", "-c", ALONE, "out", "inputs.safetensors", "logits.pt"]
    environment = runs.environment()
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=runs.LIMIT)
    assert done.returncode == 0, done.stderr
    name, tokens, image_processor = done.stdout.split()
    assert name == "Qwen2VLForConditionalGeneration" and int(tokens) == len(processor.tokenizer)
    assert image_processor.startswith("Qwen2VLImageProcessor")
    student = Qwen2VLForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
    with torch.inference_mode():
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), student(**inputs).logits, rtol=1e-6, atol=1e-6)
    said = capsys.readouterr().out
    parameters = sum(p.numel() for p in student.parameters())
    assert f"{parameters / 1e3:.1f}K parameters" in said and "bsd-3-clause" in said and "--base-model" in said


def test_bfloat16_in_shards(finished, tmp_path):
    assert export(finished, tmp_path / "out", "--dtype", "bfloat16", "--max-shard-size", "100KB") == 0
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1 and all(shard.stat().st_size < 130_000 for shard in shards)
    for shard in shards:
        with safe_open(shard, framework="pt") as opened:
            assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {"BF16"}
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    student = AutoModelForImageTextToText.from_pretrained(finished / "sft" / "student").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, student[name].to(torch.bfloat16)), name


def test_a_deleted_student_is_merged_from_its_adapter(finished, tmp_path, capsys):
    """To the very weights that the stage wrote, which the digest of config and weights shows."""
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    for stage in ("sft", "interact"):  # sft's adapter belongs on interact's student
        digest = checkpoint_digest(copy / stage / "student")
        shutil.rmtree(copy / stage / "student")
        assert export(copy, tmp_path / stage, "--stage", stage) == 0
        assert "adapter merged" in capsys.readouterr().out
        assert checkpoint_digest(tmp_path / stage) == digest
    assert export(copy, tmp_path / "again") == 2
    assert "holds no checkpoint; bring it back" in capsys.readouterr().err
    shutil.copytree(finished / "sft" / "student", copy / "interact" / "student")
    assert export(copy, tmp_path / "again") == 2
    assert "was trained on another checkpoint" in capsys.readouterr().err
    shutil.rmtree(copy / "sft" / "adapter")
    assert export(copy, tmp_path / "again") == 2
    assert "run --stage sft again" in capsys.readouterr().err and not (tmp_path / "again").exists()


def test_what_is_written_wrong_is_found_and_removed(finished, tmp_path, capsys, monkeypatch):
    stock = Qwen2VLForConditionalGeneration.save_pretrained

    def spoilt(model, folder, **options):
        next(p for name, p in model.named_parameters() if name.endswith("layers.0.mlp.up_proj.weight")).data.mul_(1.01)
        stock(model, folder, **options)

    monkeypatch.setattr(Qwen2VLForConditionalGeneration, "save_pretrained", spoilt)
    assert export(finished, tmp_path / "out") == 1
    assert "gives other logits" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_may_be_overwritten(finished, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    assert export(finished, tmp_path / "mine", "--overwrite") == 2
    assert "choose another folder" in capsys.readouterr().err and (tmp_path / "mine" / "thesis.txt").is_file()
    for inside in (finished, finished.parent, finished / "sft" / "student", finished / "sft" / "new"):
        assert export(finished, inside, "--overwrite") == 2
        assert "is a part of the run" in capsys.readouterr().err
    assert export(finished, tmp_path / "out", "--stage", "interact") == 0
    (tmp_path / "out" / "model-00007-of-00009.safetensors").write_text("of an earlier export")
    assert export(finished, tmp_path / "out") == 2 and "--overwrite" in capsys.readouterr().err
    assert export(finished, tmp_path / "out", "--overwrite") == 0
    assert not (tmp_path / "out" / "model-00007-of-00009.safetensors").exists()
    assert json.loads((tmp_path / "out" / "vlsi_export.json").read_text())["stage"] == "sft"
    assert export(tmp_path, tmp_path / "out2") == 2 and "holds no run" in capsys.readouterr().err


# ---- the card ----


def test_the_card_says_what_is_known_and_no_more(finished, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    summary = {"teacher_accuracy": 0.99, "student_after_accuracy": 0.75, "sft_best_accuracy": 0.5}
    summary |= {"sft_only_accuracy": None, "questions": 40}
    (copy / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "eval.json").write_text(json.dumps(EVAL | {"models": {"one": EVAL["models"]["distilled"]}}))
    words = ["--base-model", "org/small", "--teacher-model", "org/big", "--datasets", "org/rows"]
    assert export(copy, tmp_path / "my-model", *words, "--results", tmp_path / "eval.json") == 0
    card = ModelCard.load(tmp_path / "my-model" / "README.md")
    assert card.data.base_model == ["org/small", "org/big"] and card.data.base_model_relation == "finetune"
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-text-to-text"
    assert card.data.license == "bsd-3-clause" and card.data.datasets == ["org/rows"]
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found == {
        ("rows", "exact_match"): 0.5,
        ("rows", "relaxed_accuracy"): 0.75,
        ("rows.jsonl", "exact_match"): 0.75,
    }
    text = " ".join(card.text.split())
    assert "| rows.jsonl | messages | 12 | **[to be filled in]** |" in text  # source, format, rows found, licence
    assert "| target layers of the teacher | 1, 2, 3, 4, 5 |" in text and "rank 8, alpha 8" in text
    assert "| this model | rows | exact_match | 50.00% | 40.00% to 60.00% | 100 |" in text
    assert "| teacher | 99.00% |" in text and "its best number of optimizer steps | 50.00% |" in text
    assert "equally many optimizer steps" not in text
    assert "| sft | LoRA (rank 8, alpha 8): cross-entropy of the answers | 2 | 8 |" in text
    assert "Teacher, `org/big`: **[to be filled in]**" in text and "bsd-3-clause (its model card)" in text
    assert text.count("[to be filled in]") == 5
    for file in ("README.md", "vlsi_export.json", "config.json"):  # what is published names no folder of this machine
        assert str(tmp_path.parent) not in (tmp_path / "my-model" / file).read_text(), file


def test_without_a_licence_it_is_left_to_fill_in(finished, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    record = json.loads((copy / "interact" / "vlsi_stage.json").read_text())
    record["facts"]["student"]["path"] = str(tmp_path / "gone")
    (copy / "interact" / "vlsi_stage.json").write_text(json.dumps(record))
    (copy / "sft").rename(tmp_path / "sft")
    assert export(copy, tmp_path / "out", "--model-name", "Mine") == 0
    assert "notice: no licence is known" in capsys.readouterr().out
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "other" and card.data.base_model is None and "# Mine" in card.text
    assert "This model: **[to be filled in]**" in card.text and "fine-tuned on the answers" not in card.text
    assert export(copy, tmp_path / "out", "--overwrite", "--license", "mit") == 0
    assert ModelCard.load(tmp_path / "out" / "README.md").data.license == "mit"


def share(accuracy, rows=100, **parts):
    return {"accuracy": accuracy, "rows": rows, "interval": [accuracy - 0.1, accuracy + 0.1]} | parts


EVAL = {
    "models": {
        "base": {"path": "/base", "exact_match": share(0.3, by_source={"rows": share(0.3)})},
        "distilled": {
            "path": "/out/student",
            "skipped": {},
            "exact_match": share(0.5, by_type={"yes/no": share(0.6, 10)}, by_source={"rows": share(0.5)}),
            "relaxed_accuracy": share(0.75, by_source={"rows": share(0.75)}),
        },
    },
    "differences": [{"metric": "exact_match", "difference": 0.2, "rows": 100}],
}


def test_scores_of_eval(tmp_path):
    path = tmp_path / "mmbench.json"
    path.write_text(json.dumps(EVAL))
    found = [(s.model, s.name, s.metric, s.value, s.rows, s.whole) for s in read_scores(path, [Path("/out/student")])]
    assert found == [
        ("base", "rows", "exact_match", 0.3, 100, True),
        ("this model", "rows", "exact_match", 0.5, 100, True),
        ("this model", "rows: yes/no", "exact_match", 0.6, 10, False),
        ("this model", "rows", "relaxed_accuracy", 0.75, 100, True),
    ]
    for text, said in (("{", "not valid JSON"), ('{"accuracy": 0.5}', "holds no score"), ("[1]", "holds no score")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_scores(path, [])
    with pytest.raises(FileNotFoundError, match="vlsi-fast eval"):
        read_scores(tmp_path / "none", [])
