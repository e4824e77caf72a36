"""Metrics of one's own: found, checked, scored, told with intervals, and carried into files and pages."""

import json
import math
import random
import statistics
from pathlib import Path

import pytest
from PIL import Image

from vlsi_fast.cli import main
from vlsi_fast.config import ConfigError
from vlsi_fast.config_data import DataConfig, SourceConfig
from vlsi_fast.evaluation.answers import Answer, answer_rows
from vlsi_fast.evaluation.intervals import mean_difference, mean_score, paired_difference, wilson
from vlsi_fast.evaluation.metrics import load_metrics, metrics_of_sources
from vlsi_fast.evaluation.report import print_report, share, summarise
from vlsi_fast.export.scores import read_scores
from vlsi_fast.report.collect import read_results

OWN = """
def half(prediction, answer): return 0.5
def length(prediction, answer): return min(1.0, len(prediction) / 100)
def longer(prediction, answer): return len(prediction) > 3
def breaks(prediction, answer): raise KeyError("no such thing")
def too_much(prediction, answer): return 1.5
def no_number(prediction, answer): return None
def nan(prediction, answer): return float("nan")
def exact_match(prediction, answer): return 0
def answer(prediction, answer): return 0
nothing = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of metrics in the working directory, as a user writes it."""
    name = f"own_metrics_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return name


# ---- names ----


def test_own_functions_are_found_beside_built_in_ones(own):
    found = load_metrics([f"{own}:half", "exact_match"])
    assert [(m.name, m.score("a", " A ", "row#1")) for m in found] == [("half", 0.5), ("exact_match", True)]


def test_wrong_names_say_what_to_do(own):
    (own_file := Path(f"broken_{own}.py")).write_text("1 / 0")
    for names, message in [
        (["exact"], "'exact' is no metric; use exact_match or relaxed_accuracy, or a function"),
        (["a:b:c"], "package.module:function"),
        (["no_such_package:f"], "no_such_package cannot be imported .*ModuleNotFoundError.*start from the folder"),
        ([f"{own_file.stem}:f"], "cannot be imported .ZeroDivisionError"),
        ([f"{own}:absent"], "has no function absent"),
        ([f"{own}:nothing"], "has no function nothing"),
        ([f"{own}:exact_match", "exact_match"], "exact_match is named twice"),
        ([f"{own}:answer"], "answer is a word that result files use"),
    ]:
        with pytest.raises(ConfigError, match=f"data.eval.0.metric: .*{message}"):
            load_metrics(names, "data.eval.0.metric")
    with pytest.raises(ConfigError, match="would be one metric, exact_match"):
        metrics_of_sources([["exact_match"], [f"{own}:exact_match"]], "data.eval")


def test_a_source_names_its_metrics():
    source = {"reader": "qa", "path": "x"}
    assert SourceConfig(**source).metrics == ["exact_match", "relaxed_accuracy"]
    assert SourceConfig(**source, metric="a.b:c").metrics == ["a.b:c"]
    for bad in ("a.b", "a b:c", ["exact_match", "x"], []):
        with pytest.raises(ValueError, match="is no metric|empty list"):
            SourceConfig(**source, metric=bad)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("breaks", "KeyError: 'no such thing'"),
        ("too_much", "returned 1.5"),
        ("no_number", "returned None"),
        ("nan", "returned nan"),
    ],
)
def test_a_metric_that_goes_wrong_names_the_row(own, name, message):
    (metric,) = load_metrics([f"{own}:{name}"])
    with pytest.raises(ConfigError, match=rf"{own}:{name} .*row rows.json#7 .*'red'") as error:
        metric.score("blue", "red", "rows.json#7")
    assert message in str(error.value)


# ---- intervals ----


@pytest.mark.parametrize(("x", "n"), [(0, 20), (3, 20), (81, 263)])
def test_mean_of_zeros_and_ones_is_agresti_and_coulls(x, n):
    share, rows = (x + 2) / (n + 4), n + 4  # their "add two successes and two failures"
    half = 1.959963984540054 * math.sqrt(share * (1 - share) / rows)
    low, high = mean_score([1] * x + [0] * (n - x))
    assert (low, high) == (pytest.approx(max(0, share - half)), pytest.approx(share + half))


def test_paired_mean_of_whole_steps_is_the_paired_share():
    assert mean_difference([-1] * 4 + [1] * 9 + [0] * 30) == pytest.approx(paired_difference(4, 9, 43))
    for function in (mean_score, mean_difference):
        with pytest.raises(ValueError, match="at least one"):
            function([])


@pytest.mark.parametrize("rows", [15, 200])
def test_graded_intervals_cover_the_true_mean(rows):
    """Scores that heap at 0 and 1, as F1 does: 0 with 10%, 1 with 60%, else uniform; 2,000 draws."""
    draw = random.Random(0)

    def score():
        return draw.choices([0.0, 1.0, draw.random()], weights=[0.1, 0.6, 0.3])[0]

    covered = paired = 0
    for _ in range(2000):
        first, second = ([score() for _ in range(rows)] for _ in range(2))
        low, high = mean_score(first)
        covered += low <= 0.75 <= high
        low, high = mean_difference([b - a for a, b in zip(first, second)])
        paired += low <= 0 <= high
    assert 0.935 <= covered / 2000 <= 0.985 and 0.935 <= paired / 2000 <= 0.985


def test_many_rows_have_the_usual_interval():
    draw = random.Random(1)
    scores = [draw.random() for _ in range(20_000)]
    half = 1.959963984540054 * statistics.stdev(scores) / math.sqrt(len(scores))
    low, high = mean_score(scores)
    assert (high - low) / 2 == pytest.approx(half, rel=1e-3)
    assert (high + low) / 2 == pytest.approx(statistics.fmean(scores), abs=1e-4)


# ---- what is told ----


def rows_of(scores, source="rows"):
    return [
        Answer(id=f"{source}#{i}", source=source, type="other", question="?", answer="a", prediction="b", scores=each)
        for i, each in enumerate(scores)
    ]


def test_shares_by_kind_of_metric():
    assert share([True, 0.0, 1]) == {
        "mean": 2 / 3,
        "accuracy": 2 / 3,
        "correct": 2,
        "rows": 3,
        "interval": list(wilson(2, 3)),
    }
    assert share([1.0, 0.5], graded=True) == {"mean": 0.75, "rows": 2, "interval": list(mean_score([1.0, 0.5]))}


def test_sources_with_their_own_metrics(capsys):
    """Each metric is told of its own rows; over all rows stands each source's first."""
    first = rows_of([{"f1": 0.5, "exact": 0}, {"f1": 1.0, "exact": 1}], "a") + rows_of([{"exact": 1}], "b")
    second = rows_of([{"f1": 0.75, "exact": 0}, {"f1": 0.5, "exact": 0}], "a") + rows_of([{"exact": 0}], "c")
    found = summarise({"x": first, "y": second}, {"x": {}, "y": {}})
    assert found["metrics"] == ["headline", "f1", "exact"]
    scores = found["models"]["x"]
    assert [(scores[m]["mean"], scores[m]["rows"]) for m in found["metrics"]] == [(2.5 / 3, 3), (0.75, 2), (2 / 3, 3)]
    assert "correct" not in scores["f1"] and scores["exact"]["correct"] == 2
    differences = {each["metric"]: each for each in found["differences"]}
    assert differences["f1"]["difference"] == -0.125 and differences["f1"]["rows"] == 2
    assert differences["f1"]["interval"] == list(mean_difference([0.25, -0.5])) and "p" not in differences["f1"]
    assert (differences["exact"]["only_first"], differences["exact"]["only_second"]) == (1, 0)
    print_report(found)
    text = capsys.readouterr().out
    assert "each source's first metric" in text and "F1" in text and "75.00%" in text and "p = 1 (McNemar" in text
    alone = summarise({"x": first, "y": rows_of([{"exact": 1}], "d")}, {"x": {}, "y": {}})
    assert "f1" not in alone["models"]["y"] and alone["differences"] == []
    print_report(alone)


def test_eval_carries_metrics_everywhere(own, workspace, tmp_path, capsys):
    """From the option to tables, JSON, predictions, the report's headline and a model card."""
    rows = [{"instruction": f"red {i}?", "output": "no", "image": "0.png"} for i in range(3)]
    Image.new("RGB", (64, 64), "red").save(tmp_path / "0.png")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = ["eval", "--model", str(workspace / "student"), "--data", "rows.json", "--reader", "qa"]
    words += ["--max-new-tokens", "6"]
    own_metrics = ["--metric", f"{own}:length", f"{own}:longer"]
    assert main([*words, *own_metrics, "--json", "--predictions", "answers.jsonl"]) == 0
    found = json.loads(capsys.readouterr().out)
    told = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    lengths = [min(1.0, len(each["prediction"]) / 100) for each in told]
    assert [each["length"] for each in told] == lengths and "scores" not in told[0]
    (scores,) = found["models"].values()
    assert found["metrics"] == ["length", "longer"] and "exact_match" not in scores
    assert scores["length"]["mean"] == pytest.approx(statistics.fmean(lengths))
    assert scores["longer"]["correct"] == sum(len(each["prediction"]) > 3 for each in told)
    (tmp_path / "found.json").write_text(json.dumps(found))
    (headline,) = read_results(tmp_path / "found.json")
    assert headline["metric"] == "length" and headline["mean"] == scores["length"]["mean"]
    assert {each.metric for each in read_scores(tmp_path / "found.json", [])} == {"length", "longer"}
    option = ["--data.eval.0.metric", f"{own}:breaks"]
    assert main([*words, *option]) == 2 and "rows.json#0" in capsys.readouterr().err
    assert main([*words, "--metric", "exact"]) == 2 and "--metric: 'exact' is no metric" in capsys.readouterr().err
    assert main(["eval", "--benchmarks", "list", "--metric", "exact_match"]) == 2


def test_metrics_are_imported_before_a_model_is_loaded(tmp_path):
    source = {"reader": "qa", "path": str(tmp_path / "gone.json")}
    data = DataConfig(train=[source], eval=[source | {"metric": "no_such_package:f"}])
    with pytest.raises(ConfigError, match="no_such_package cannot be imported"):
        next(answer_rows(tmp_path / "gone", data, skipped={}))
