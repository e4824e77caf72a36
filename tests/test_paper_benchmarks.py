"""The paper's tables as data, and its benchmarks by lmms-eval: results files, the subprocess, what is refused.

`lmms_results/` holds a results file as lmms-eval 0.7.3 wrote it (a group of two local tasks, the demo's student, 10 of
24 rows each, 3 beams), but for shortened `configs` and paths. Where lmms-eval is installed, it is run too.
"""

import json
import os
import shutil
import textwrap
from pathlib import Path

import pytest
import tiny_demo
import tiny_runs as runs
from PIL import Image

from vlsi_fast.cli import main
from vlsi_fast.evaluation.benchmarks import BENCHMARKS, PAPER_ROWS, chosen, paper_scores
from vlsi_fast.evaluation.lmms import MODEL_CLASSES, read_results
from vlsi_fast.lineage import write_record
from vlsi_fast.paper import FOLDER, load_table

RESULTS = Path(__file__).parent / "lmms_results"


# ---- the paper's tables ----


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.json")))
def test_tables_have_one_value_a_column(name):
    table = load_table(name)
    assert set(table) >= {"title", "source", "columns", "rows"} and table["source"].startswith("arXiv:2412.01822, ")
    names = [row["name"] for row in table["rows"]]
    assert len(set(table["columns"])) == len(table["columns"]) and names
    for row in table["rows"]:
        assert set(row) >= {"name", "values"} and len(row["values"]) == len(table["columns"]), row
        assert all(value is None or isinstance(value, str | int | float) for value in row["values"])


def test_tables_say_what_the_paper_prints():
    cells = {
        ("table_1", "VLsI-7B"): [77.5, 87.3, 86.1, 88.6, 74.2, 2338, 74.7, 86.3, 85.5, 75.2, 69.3],
        ("table_1", "LLaVA-NeXT-7B"): [None, None, None, 86.5, None, 1851, 34.6, 69.6, 63.3, 43.9, 35.1],
        ("table_2", "VLsI-2B"): [72.3, 89.0, 85.8, 87.9, 70.0, 2022, 68.4, 81.7, 78.8, 64.8, 51.4],
        ("table_3a", "Meteor-7B"): [82.9, 53.4, 57.3, 48.3],
        ("table_3b", "GPT-4V (0409)"): [67.5, 66.3, 61.7, 56.0, 78.6, 69.3, 54.7, 58.3, 69.1, 71.5],
        ("appendix_b", "#7"): [7.39, 3.85, 2.02, 1.03, 0.85, 0.79],
    }
    for (table, name), values in cells.items():
        assert [row["values"] for row in load_table(table)["rows"] if row["name"] == name] == [values]
    sizes = {
        name: len(load_table(name)["rows"]) for name in ("table_1", "table_2", "table_3a", "table_3b", "appendix_b")
    }
    assert sizes == {"table_1": 23, "table_2": 19, "table_3a": 9, "table_3b": 19, "appendix_b": 7}
    with pytest.raises(ValueError, match="no table 'table_9'.*appendix_b"):
        load_table("table_9")


def test_every_benchmark_of_tables_1_to_3_is_known():
    columns = {
        column for name in ("table_1", "table_2", "table_3a", "table_3b") for column in load_table(name)["columns"]
    }
    assert {each.column for each in BENCHMARKS} == columns and len(BENCHMARKS) == 17
    assert len({each.name for each in BENCHMARKS}) == len({each.task for each in BENCHMARKS}) == 17


def test_scores_of_the_paper_that_contradict_each_other_are_all_told():
    scores = paper_scores("MM-Vet")
    assert scores["VLsI-7B"] == [75.2, 70.8, 75.8] and scores["Qwen2-VL-72B"] == [73.9] and "MM1-3B" in scores
    assert "LLaVA-OV-72B" not in paper_scores("BLINK"), "a dash is no score"
    assert set(PAPER_ROWS) <= set(paper_scores("MMMU"))


# ---- results files ----


def test_results_of_lmms_eval_are_read_by_model_and_task():
    (found,) = read_results([RESULTS]).values()
    assert found["shapes_a"] == {"metrics": {"shape_acc,none": 1.0}, "rows": 10, "all_rows": 24, "parts": []}
    assert found["shapes"]["parts"] == ["shapes_b", "shapes_a"]
    assert (found["shapes"]["rows"], found["shapes"]["all_rows"]) == (20, 48)


def write_results(
    folder, results: dict, date="20261122_130000", rows=(100, 100), model="runs/mine/sft/student"
) -> None:
    """A results file of lmms-eval with other tasks and numbers."""
    content = json.loads(next(RESULTS.iterdir()).read_text())
    content |= {"results": results, "groups": {}, "group_subtasks": {}, "model_name": model, "date": date}
    content["n-samples"] = {task: {"original": rows[1], "effective": rows[0]} for task in results}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{date}_results.json").write_text(json.dumps(content))


def show(capsys, *words) -> dict:
    assert main(["eval", *map(str, words), "--json"]) == 0
    return {row["benchmark"]: row for row in json.loads(capsys.readouterr().out)["benchmarks"]}


def test_results_stand_beside_the_papers_in_its_unit(tmp_path, capsys):
    model = "runs/mine/sft/student"
    write_results(
        tmp_path / "a",
        {
            "mmmu_val": {"alias": "mmmu_val", "mmmu_acc,none": 0.5, "mmmu_acc_stderr,none": "N/A"},
            "mme": {"mme_cognition_score,none": 600.5, "mme_perception_score,none": 1400.0},
            "ai2d": {"exact_match,flexible-extract": 0.25, "exact_match,none": 0.9},
            "mmvet": {"gpt_eval_score,none": 41.5},
            "mathvista_testmini_format": {"llm_as_judge_eval,none": None},
        },
    )
    write_results(
        tmp_path / "b",
        {"mmmu_val": {"mmmu_acc,none": 0.75}, "gqa": {"exact_match,none": 0.125}},
        "20261123_0",
        (9, 100),
    )
    found = show(capsys, "--results", tmp_path)
    scores = {name: row["scores"][model] for name, row in found.items()}
    assert scores == {
        "MMMU": 75.0,
        "MME": 2000.5,
        "AI2D": 25.0,
        "MM-Vet": 41.5,
        "MathVista": None,
        "gqa": {"exact_match,none": 0.125},
    }
    assert found["MMMU"]["paper"]["VLsI-7B"] == [69.3] and found["MMMU"]["limited"] == {model: [9, 100]}
    assert main(["eval", "--results", str(tmp_path), "--benchmarks", "mmmu,blink"]) == 0
    text = capsys.readouterr().out
    assert "75.0" in text and "69.3" in text and "only 9 of 100 rows" in text and "41.5" not in text
    assert [line for line in text.splitlines() if "BLINK" in line and " - " in line], "not run is told as a dash"


def test_the_list_names_tasks_judges_and_gaps(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["eval", "--benchmarks", "list"]) == 0
    text = capsys.readouterr().out
    assert "mmbench_en_dev_static" in text and "needed" in text and "dev split" in text


# ---- the subprocess ----

FAKE = """
import json, sys
from pathlib import Path
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
print("tables of lmms-eval")
if words["--tasks"] == "mmstar":
    raise SystemExit(0)  # as lmms-eval does after an error
task = {"mmmu_val": {"mmmu_acc,none": 0.5}, "gqa": {"exact_match,none": 0.25}}[words["--tasks"]]
out = Path(words["--output_path"]) / "sft__student"
out.mkdir()
content = {"results": {words["--tasks"]: task}, "n-samples": {words["--tasks"]: {"original": 9, "effective": 9}},
           "model_name": "x", "model_source": "qwen2_vl", "words": words}
(out / "20261122_000000_results.json").write_text(json.dumps(content))
"""


@pytest.fixture
def fake_lmms(tmp_path, monkeypatch):
    """A package that takes lmms-eval's options and writes results as it does."""
    package = tmp_path / "packages"
    (package / "lmms_eval").mkdir(parents=True)
    (package / "lmms_eval" / "__init__.py").touch()
    (package / "lmms_eval" / "__main__.py").write_text(textwrap.dedent(FAKE))
    (package / "decord.py").touch()
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")]))


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    (folder / "sft").mkdir(parents=True)
    (folder / "sft" / "student").symlink_to(tiny_demo.TEACHER)
    write_record(folder / "sft", {"stage": "sft", "state": "finished", "config": {}})
    return folder


def test_benchmarks_of_a_run(fake_lmms, run_folder, capfd):
    words = ["--run", run_folder, "--benchmarks", "mmmu", "--tasks", "gqa", "--limit", 9, "--num-beams", 5]
    words += ["--model-args", "max_pixels=9", "--include-path", "mine", "--device", "cpu"]
    found = show(capfd, *words)
    assert found["MMMU"]["scores"] == {str(run_folder): 50.0} and found["MMMU"]["paper"]["VLsI-2B"] == [51.4]
    assert found["gqa"]["scores"] == {str(run_folder): {"exact_match,none": 0.25}}
    (file,) = (run_folder / "benchmarks").glob("mmmu-*/sft__student/*_results.json")
    student = run_folder / "sft" / "student"
    assert json.loads(file.read_text())["words"] == {
        "--model": "qwen2_vl",
        "--model_args": f"pretrained={student},device_map=cpu,max_pixels=9",
        "--tasks": "mmmu_val",
        "--device": "cpu",
        "--batch_size": "1",
        "--output_path": str(file.parent.parent),
        "--limit": "9",
        "--gen_kwargs": "num_beams=5",
        "--include_path": "mine",
    }
    assert show(capfd, "--results", run_folder / "benchmarks")["MMMU"]["scores"] == {"x": 50.0}


def test_a_benchmark_that_fails_is_named_and_the_others_go_on(fake_lmms, run_folder, capfd):
    assert main(["eval", "--run", str(run_folder), "--benchmarks", "mmstar,mmmu", "--json"]) == 1
    told, words = capfd.readouterr()
    found = json.loads(told)
    assert found["failed"] == [f"{run_folder}: mmstar"] and "mmstar failed" in words and "tables of lmms-eval" in words
    assert [list(row["scores"].values()) for row in found["benchmarks"]] == [[None], [50.0]]


def test_bad_input_says_what_to_do(fake_lmms, run_folder, tmp_path, capsys, monkeypatch):
    for key in ("OPENAI_API_KEY", "AZURE_API_KEY", "API_TYPE"):
        monkeypatch.delenv(key, raising=False)
    other, comma = tmp_path / "other", tmp_path / "a,b"
    for folder in (other, comma):
        shutil.copytree(tiny_demo.TEACHER, folder)
    (other / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "1_results.json").write_text("{}")
    run = ("--run", str(run_folder))
    for words, message in [
        ((*run, "--benchmarks", "mmm"), "did you mean mmmu?"),
        (
            (*run, "--benchmarks", "all"),
            "hallb, mathvista, mmb-cn, mm-vet, mm-vet-v2, llava-wilder: answers are graded",
        ),
        (
            (*run, "--benchmarks", "all"),
            "--benchmarks qbench,ai2d,chartqa,pope,mme,mmb,mmmu,mmstar,seed-2-plus,blink,cv-bench",
        ),
        ((*run, "--benchmarks", "mmmu", "--config", "c.yaml"), "--config has no meaning with benchmarks"),
        ((*run, "--benchmarks", "mmmu", "--data.max_pixels", "9"), "--data.max_pixels has no meaning"),
        ((*run, "--results", str(tmp_path)), "remove --run and --model"),
        (("--benchmarks", "mmmu"), "name a model"),
        (("--model", str(tiny_demo.TEACHER), "--benchmarks", "mmmu"), "--out FOLDER"),
        (("--model", str(other), "--benchmarks", "mmmu", "--out", "o"), "no lmms-eval model is known for llama"),
        (("--model", str(comma), "--benchmarks", "mmmu", "--out", "o"), "no path with a comma"),
        (("--results", str(tmp_path / "odd")), "no results file of lmms-eval"),
        (("--results", str(other)), "holds no *_results.json"),
    ]:
        assert main(["eval", *words]) == 2, words
        assert message in capsys.readouterr().err, words
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["eval", *run, "--benchmarks", "mmmu"]) == 2
    assert 'pip install -e ".[lmms-eval]"' in capsys.readouterr().err


def test_names_are_chosen_once_each():
    assert [each.name for each in chosen("mmmu, mmb,mmmu", "gqa")] == ["mmmu", "mmb", "gqa"]
    assert chosen("all", None) == list(BENCHMARKS)


# ---- lmms-eval itself, where it is installed ----


def test_tasks_metrics_and_models_are_lmms_evals():
    pytest.importorskip("lmms_eval")
    from lmms_eval.models import AVAILABLE_SIMPLE_MODELS
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import load_yaml_config

    assert set(MODEL_CLASSES.values()) <= set(AVAILABLE_SIMPLE_MODELS)
    index = TaskManager().task_index
    for each in BENCHMARKS:
        config = load_yaml_config(index[each.task]["yaml_path"], mode="simple")
        filters = [found["name"] for found in config.get("filter_list") or [{"name": "none"}]]
        metrics = [found["metric"] for found in config.get("metric_list") or config["aggregate_metric_list"]]
        known = {f"{metric},{name}" for metric in metrics for name in filters}
        assert set(each.metrics) <= known, (each.task, known)


TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
task: shapes
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: output
process_results: !function utils.score
generation_kwargs: {{max_new_tokens: 64, temperature: 0, do_sample: false}}
metric_list: [{{metric: right, aggregation: mean, higher_is_better: true}}]
"""
UTILS = """
from PIL import Image
def visual(doc): return [Image.open(doc["image"]).convert("RGB")]
def text(doc, lmms_eval_specific_kwargs=None): return doc["instruction"]
def score(doc, results):
    from vlsi_fast.demo.pictures import facts_f1
    return {"right": facts_f1(results[0], doc["output"])}
"""


@pytest.mark.slow
def test_a_local_task_by_lmms_eval_scores_as_we_do(tmp_path, capfd, monkeypatch):
    """The whole path: lmms-eval on the demo's teacher and 24 drawings gives our own score.

    Images are enlarged to 112 x 112, which neither side resizes: lmms-eval cuts to multiples of 28, the demo's model
    takes multiples of 16 (and, made for 64 x 64, sees little). It also sends them through JPEG, so a row or two may
    come out otherwise.
    """
    pytest.importorskip("lmms_eval")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(runs.ROOT), os.environ.get("PYTHONPATH", "")]))
    source = tiny_demo.write_drawings(tmp_path / "drawn", 24)
    rows = []
    for line in Path(source["path"]).read_text().splitlines():
        row = json.loads(line)
        file, (asked, said) = tmp_path / row["images"][0], row["messages"]
        Image.open(tmp_path / "drawn" / row["images"][0]).resize((112, 112)).save(file)
        question = asked["content"].removeprefix("<image>")
        rows.append({"instruction": question, "output": said["content"], "image": str(file)})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "shapes.yaml").write_text(TASK.format(folder=tmp_path))
    (tmp_path / "utils.py").write_text(UTILS)
    model, bounds = ("--model", tiny_demo.TEACHER, "--device", "cpu"), "min_pixels=12544,max_pixels=12544"
    words = ["--tasks", "shapes", "--include-path", tmp_path, "--out", tmp_path / "out", "--model-args", bounds]
    found = show(capfd, *model, *words)
    words = ["--data", tmp_path / "rows.jsonl", "--reader", "qa"]
    words += ["--data.min_pixels", 12544, "--data.max_pixels", 12544, "--max-new-tokens", 64]
    words += ["--metric", tiny_demo.METRIC[1]]
    assert main(["eval", *map(str, (*model, *words)), "--json"]) == 0
    ours = json.loads(capfd.readouterr().out)["models"][str(tiny_demo.TEACHER)]["facts_f1"]["mean"]
    score = found["shapes"]["scores"][str(tiny_demo.TEACHER)]["right,none"]
    assert ours > 0.05 and abs(score - ours) <= 1.5 / 24
