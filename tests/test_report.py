"""The report: its numbers against plain ones, the page's safety, and the page in a real browser."""

import base64
import json
import random
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import chromium
import numpy as np
import pytest
import tiny_runs as runs
from PIL import Image

from vlsi_fast.cli import main
from vlsi_fast.config import ConfigError, RunConfig, load_config
from vlsi_fast.evaluation.answers import Answer
from vlsi_fast.evaluation.report import summarise
from vlsi_fast.lineage import write_record
from vlsi_fast.report import charts, collect, headline, samples
from vlsi_fast.report import page as page_of
from vlsi_fast.report.command import write_report
from vlsi_fast.report.headline import Score
from vlsi_fast.runs import Run, open_run
from vlsi_fast.speech import open_speaker
from vlsi_fast.stages import run as run_stages

MODELS = ["base", "distilled", "teacher"]
STUDENTS, TEACHERS, STEPS = [2, 6, 10], [2, 6, 10, 14, 18], 90


def step(stage, number, draw, **more):
    tokens = draw.randrange(50, 200)
    return {
        "stage": stage,
        "step": number,
        "learning_rate": 1e-4,
        "answer_tokens": tokens,
        "rows": 8,
        "skipped_rows": 0,
        "step_seconds": 0.5,
        "tokens_per_second": 1000.0,
        "answer_tokens_per_second": 100.0,
        "data_wait_share": 0.25,
        "peak_memory_bytes": [2**30, 2**31],
        "peak_rss_bytes": [2**30, 2**31],
        **more,
    }


def make_run(folder, seed=0, **changes):
    """A finished run of three stages with invented numbers."""
    draw = random.Random(seed)
    config = RunConfig(
        output_dir=str(folder),
        teacher={"path": "big", "layers": TEACHERS},
        student={"path": "small"},
        data={"train": [{"reader": "qa", "path": "rows.json"}]},
        **changes,
    ).model_dump()
    for stage in ("verbalize", "interact", "sft"):
        record = {"stage": stage, "state": "finished", "config": config, "versions": {"torch": "0"}, "facts": {}}
        record["summary"] = {"seconds": 100.0, "device": "cuda:0", "skipped_rows": {"missing_image": 2}}
        write_record(folder / stage, record)
        lines = []
        for i in range(STEPS):
            if stage == "verbalize":
                more = {
                    f"loss/{r}_layer_{k}": draw.random()
                    for r, ks in (("student", STUDENTS), ("teacher", TEACHERS))
                    for k in ks
                }
            elif stage == "interact":
                more = {f"loss/student_layer_{k}": draw.random() for k in STUDENTS} | {"loss/last": draw.random()}
                more["kl"] = [[draw.random() + 0.01 for _ in TEACHERS] for _ in STUDENTS]
                more["matches"] = np.eye(3, 5, draw.randrange(3), dtype=int).tolist()
                more |= {"student_layers": STUDENTS, "teacher_layers": TEACHERS}
            else:
                more = {"loss/answer": draw.random()}
            more["loss"] = sum(v for k, v in more.items() if k.startswith("loss/"))
            lines.append(json.dumps(step(stage, i + 1, draw, **more)))
        (folder / stage / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    summary = {"teacher_accuracy": 0.99, "student_before_accuracy": 0.5, "student_after_accuracy": 0.9}
    summary |= {"sft_only_accuracy": 0.875, "questions": 1234}
    (folder / "summary.json").write_text(json.dumps(summary))
    return open_run(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("report") / "first")


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    return write_report([run.folder], tmp_path_factory.mktemp("page") / "page.html", samples=0)


@pytest.fixture(scope="module")
def full_page(run, tmp_path_factory):
    """With answers of layers, long ones and one that has no blank, and scores of `vlsi-fast eval`."""

    def column(model, layers):
        texts = ["a red circle", "so " * 900, "x" * 3000, ""]
        cells = [
            {"layer": k, "text": texts[i % 4], "right": i % 2 == 0, "share": i % 3 / 2} for i, k in enumerate(layers)
        ]
        return {"model": model, "cells": [*cells, {"layer": "answer", "text": "red", "right": True, "share": 1.0}]}

    columns = [column("base", STUDENTS), column("distilled", STUDENTS), column("teacher", TEACHERS)]
    dot = samples._thumbnail(Image.new("RGB", (8, 8)))
    row = {"images": [{"src": dot, "small": True}] * 3, "question": "y" * 900, "answer": "no " * 900, "shade": "F1"}
    outcomes = [{"right": {"base": i < 1, "distilled": i < 2, "teacher": True}, "count": 100 * i} for i in range(3)]
    said = {"rows": [row | {"columns": columns}] * 3, "outcomes": outcomes, "reason": ""}
    results = [
        {
            "name": "z" * 90 + str(i),
            "path": None,
            "file": "f",
            "metric": "exact match",
            "mean": i / 3,
            "rows": 9,
            "interval": [i / 4, 1.0],
        }
        for i in range(4)
    ]
    path = tmp_path_factory.mktemp("full") / "page.html"
    path.write_text(page_of.build_page([run], results, {run.folder: said}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished_run(workspace, tmp_path_factory):
    """Three real stages of a step each."""
    folder = tmp_path_factory.mktemp("finished")
    tree = runs.settings(workspace, folder / "run", max_steps=1)
    run_stages(load_config(runs.write_config(tree, folder / "config.yaml")))
    return folder / "run"


class References(HTMLParser):
    """Everything that a page would load."""

    def __init__(self, text):
        super().__init__()
        self.loaded = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        names = ("src", "srcset", "data", "poster") if tag == "a" else ("src", "srcset", "data", "poster", "href")
        self.loaded += [value for name, value in attributes if name in names]


def plain(page):
    return page.replace("\xa0", " ")


# ---- numbers ----


@pytest.mark.parametrize("count", [0, 1, 7, 40, 41, 1000])
def test_windows_hold_every_step_once(count):
    found = collect.windows(count)
    assert [i for window in found for i in window] == list(range(count)) and len(found) <= 40
    assert not found or max(map(len, found)) - min(map(len, found)) <= 1


def test_the_kl_matrix_is_a_mean_over_answer_tokens(run):
    records = run.metrics("interact")
    found = collect.kl_windows(records)
    first = records[: len(collect.windows(STEPS)[0])]
    weights = np.array([r["answer_tokens"] for r in first], dtype=float)
    expected = np.average([r["kl"] for r in first], axis=0, weights=weights)
    np.testing.assert_allclose(found[0]["kl"], expected, rtol=1e-12)
    assert [found[0]["first"], found[-1]["last"]] == [1, STEPS]


def test_shares_and_drift_count_matches(run):
    records = run.metrics("interact")
    matches = np.array([r["matches"] for r in records])
    edges = collect.start_and_end(records)
    for name, part in (("start", matches[:9]), ("end", matches[-9:])):
        total = part.sum(0)
        np.testing.assert_allclose(edges[name], total / total.sum(1, keepdims=True), rtol=1e-12)
    moved = collect.drift(records)
    np.testing.assert_allclose(moved[6], matches[:, 1] @ np.array(TEACHERS), rtol=1e-12)


def test_verbalization_losses_at_the_papers_shares(run):
    layers = collect.losses_of_layers(run.metrics("verbalize"))
    assert list(layers) == ["student", "teacher"] and sorted(layers["teacher"]) == TEACHERS
    values = layers["student"][6]
    row = collect.appendix_b(layers["student"])[1]  # 5% of 90 steps: 4
    assert row["layer"] == 6
    np.testing.assert_allclose(row["losses"], [np.mean(values[e - 4 : e]) for e in (9, 27, 45, 63, 81, 90)])
    assert collect.appendix_b({1: [3.0]})[0]["losses"] == [3.0] * 6


def test_cost_adds_up(run):
    (first, *rest), summary = collect.cost(run), collect.read_summary(run)
    assert first["optimizer_steps"] == STEPS and first["rows"] == 8 * STEPS and first["ranks"] == 2
    assert first["peak_memory_bytes"] == 2**31 and first["skipped_rows"] == 2 and first["device"] == "cuda"
    assert first["tokens_per_second"] == pytest.approx(1000) and first["data_wait_share"] == pytest.approx(0.25)
    whole = collect.totals([first, *rest])
    assert whole["optimizer_steps"] == 3 * STEPS and whole["seconds"] == 300 and whole["ranks"] == 2
    assert whole["answer_tokens"] == sum(r["answer_tokens"] for stage in run.records for r in run.metrics(stage))
    slow = collect.totals([first, first | {"tokens_per_second": 500.0, "step_seconds": 3 * first["step_seconds"]}])
    assert slow["tokens_per_second"] == pytest.approx((1000 + 3 * 500) / 4), "by the time that each stage took"
    unborn = first | dict.fromkeys(("tokens_per_second", "peak_memory_bytes", "ranks"), float("nan"))
    assert collect.totals([unborn, first])["peak_memory_bytes"] == 2**31
    assert np.isnan(collect.totals([])["peak_memory_bytes"]) and summary["questions"] == 1234


def test_accuracies_alone_get_an_interval(run):
    """Wilson's: the bounds p with (share - p)^2 = z^2 p (1 - p) / n."""
    (table,) = collect.demo_scores(collect.read_summary(run))["tables"]
    assert table["metric"] == "exact match" and table["questions"] == 1234
    before = {s.role: s for s in table["scores"]}["before"]
    assert before.mean == 0.5
    for bound in before.interval:
        assert (0.5 - bound) ** 2 == pytest.approx(1.959964**2 * bound * (1 - bound) / 1234, rel=1e-5)
    (unknown,) = collect.demo_scores({"student_after_accuracy": 0.5})["tables"]
    assert unknown["scores"][0].interval is None and collect.demo_scores({})["tables"] == []


# ---- the sentence ----

T, B, A = Score("teacher", "teacher", 0.99), Score("student before", "before", 0.0), Score("VLsI", "after", 0.824)
SFT, MORE_STEPS = Score("sft alone, best steps", "control", 0.653), Score("sft alone, VLsI's steps", "control", 0.6)
KL, PLENTY = Score("last-layer KL", "control", 0.82), Score("VLsI, + pictures", "more", 0.95)
SENTENCES = [
    ([T, B, A, SFT], "went from 0.0% to 82.4% (teacher 99.0%, sft alone on the same labels 65.3%)."),
    (
        [T, B, A, MORE_STEPS, SFT, KL, PLENTY],
        "went from 0.0% to 82.4% (teacher 99.0%; on the same labels, last-layer KL 82.0%, sft alone 65.3%).",
    ),
    ([T, B, A], "went from 0.0% to 82.4% (teacher 99.0%)."),
    ([A], "is at 82.4%."),
    ([B, replace(A, mean=0.0003), T], "stayed at 0.0% (teacher 99.0%)."),
    ([replace(B, mean=0.9), A], "got worse: it went from 90.0% to 82.4%."),
    (
        [T, B, A, SFT, replace(KL, mean=0.84)],
        "went from 0.0% to 82.4%, less than last-layer KL on the same labels 84.0% "
        "(teacher 99.0%, sft alone on the same labels 65.3%).",
    ),
    ([B, A, replace(KL, mean=0.8241)], "went from 0.0% to 82.4% (last-layer KL on the same labels 82.4%)."),
    (
        [replace(B, mean=0.9), A, Score("mine", "other", 0.9)],
        "got worse: it went from 90.0% to 82.4%, less than mine 90.0%.",
    ),
]


@pytest.mark.parametrize("scores,end", SENTENCES)
def test_the_sentence_says_what_the_numbers_say(scores, end):
    for order in (scores, scores[::-1]):
        assert headline.of_scores(order) == f"The student {end}"


def test_without_scores_the_sentence_is_of_losses(run, tmp_path):
    assert headline.of_scores([T, B]) is None
    records = run.metrics("sft")
    first, last = (
        np.average([r["loss"] for r in part], weights=[r["answer_tokens"] for r in part])
        for part in (records[:4], records[-4:])
    )
    found = collect.sentence(run, [])
    verb = "fell" if last < first else "rose"
    assert (
        found
        == f"The loss of sft {verb} from {first:.3g} to {last:.3g} nats a token in 90 steps; no answers were scored."
    )
    assert "rose from 1 to 2" in headline.of_losses("interact", 1.0, 2.0, 7)
    assert "stayed at 1 " in headline.of_losses("interact", 1.0, 1.0001, 7)
    assert headline.of_losses("interact", 1.0, 2.0, 1).startswith("One step of interact")
    assert collect.sentence(Run(tmp_path, {"verbalize": {}}), []) == headline.NOTHING


def test_scores_of_eval_know_the_runs_models(run, tmp_path):
    def row(name, path, mean, file="a.json"):
        found = {"name": name, "path": str(path), "file": file, "metric": "F1", "mean": mean}
        return found | {"rows": 9, "interval": [0, 1]}

    rows = [row("x/mine", run.student, 0.8), row("big", "/cache/big", 0.9), row("b", Path("small").resolve(), 0.1)]
    rows += [row("x/y", "/x/y", 0.3), row("x/y", "/x/y", 0.2, "b.json")]
    tables = collect.eval_scores([run], rows)
    known = [("student after", "after"), ("teacher", "teacher"), ("student before", "before"), ("y", "other")]
    assert [[(s.label, s.role) for s in table["scores"]] for table in tables] == [known, known[-1:]]
    assert collect.sentence(run, tables) == "The student went from 10.0% to 80.0% (teacher 90.0%, y 30.0%)."
    assert [s.label for s in collect.eval_scores([run, run], rows)[0]["scores"]][:2] == ["mine", "big"]


def test_a_flow_keeps_every_match():
    """Ribbons leave a student's bar and fill a teacher's, edge to edge, none over another."""
    shares = [[0.25, 0.75, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]
    found = charts.flow(shares, [2, 4, 6], [3, 5, 9])
    assert {(r["student"], r["teacher"]): r["share"] for r in found["ribbons"]} == {
        (2, 3): 0.25,
        (2, 5): 0.75,
        (4, 5): 0.5,
        (4, 9): 0.5,
        (6, 9): 1.0,
    }
    unit = found["students"][0].height
    assert [bar.height / unit for bar in found["teachers"]] == pytest.approx([0.25, 1.25, 1.5])
    assert [bar.height for bar in found["students"]] == [unit] * 3
    for bars in (found["students"], found["teachers"]):
        assert bars[0].y == 0 and bars[-1].y + bars[-1].height == pytest.approx(found["height"])
        assert all(a.y + a.height < b.y for a, b in zip(bars, bars[1:]))
    for bar, side in [(b, "student") for b in found["students"]] + [(b, "teacher") for b in found["teachers"]]:
        edges = []
        for ribbon in found["ribbons"]:
            if ribbon[side] == bar.layer:
                numbers = [float(n) for n in re.findall(r"[-\d.]+", ribbon["path"])]
                top, bottom = (numbers[1], numbers[-1]) if side == "student" else (numbers[7], numbers[8])
                edges += [top, bottom]
        assert edges[0] == pytest.approx(bar.y, abs=0.06) and edges[-1] == pytest.approx(bar.y + bar.height, abs=0.06)
        assert edges[1:-1:2] == edges[2::2], "the next begins where the last one ends"
    alone = charts.flow([[0.0]], [1], [1])
    assert alone["ribbons"] == [] and alone["students"][0].height == alone["teachers"][0].height == charts.LEAST


def test_settings_tell_what_differs(run, tmp_path):
    other = make_run(tmp_path / "second", seed=1, interact={"temperature": 2.0})
    table = {name: changed for name, _, changed in collect.settings(other.records["sft"]["config"])}
    assert table["interact.temperature"] and not table["interact.headless"]
    configs = [r.records["sft"]["config"] for r in (run, other)]
    assert [n for n, _ in collect.differing_settings(configs)] == ["output_dir", "interact.temperature"]


def test_results_of_eval(run, tmp_path):
    answers = [
        Answer(
            id=str(i),
            question="?",
            answer="red",
            prediction="red" if i < 3 else "blue",
            type="other",
            source="rows",
            scores={"exact_match": i < 3},
        )
        for i in range(4)
    ]
    (tmp_path / "a.json").write_text(json.dumps(summarise({"mine": answers}, {"mine": {}})))
    (found,) = collect.read_results(tmp_path / "a.json")
    assert (found["name"], found["mean"], found["rows"]) == ("mine", 0.75, 4)
    text = write_report([run.folder], tmp_path / "page.html", [tmp_path / "a.json"], samples=0).read_text()
    assert "75.0%" in text and f"{100 * found['interval'][0]:.1f}% to" in text
    for bad in ("{}", "no json", "[1]", '{"models": {"mine": {}}}'):
        (tmp_path / "b.json").write_text(bad)
        with pytest.raises(ConfigError, match="vlsi-fast eval --json"):
            collect.read_results(tmp_path / "b.json")


def test_curves_have_no_colour_that_is_unseen_by_night():
    """Every colour of a chart is a line's, of middling lightness, or has another one by night; nothing is opaque."""
    series = {f"layer {k}": ([1.0, 2.0], [0.1, 1.0 + k]) for k in range(9)}
    for log in (False, True):
        svg = base64.b64decode(charts.lines(series, "title", "unit", log=log).split(",")[1]).decode()
        style, drawn = svg[svg.index("<style>@media") : svg.index("<defs>")], svg[svg.index("<defs>") :]
        used = set(re.findall(r"(?:fill|stroke): (#\w+)", drawn))
        assert used == {*charts.colours(9), *charts.NIGHT} and "background" not in drawn
        assert all(f'[style*="fill: {day}"] {{ fill: {night}' in style for day, night in charts.NIGHT.items())
    for colour in charts.colours(30):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        light = float(np.dot([0.2126, 0.7152, 0.0722], linear))
        assert 1.05 / (light + 0.05) > 2.5 and (light + 0.05) / (0.012 + 0.05) > 2.5, "on white, and on the dark card"


# ---- the page ----


def test_page_loads_nothing_and_escapes_everything(tmp_path):
    run = make_run(tmp_path / "<img src=x onerror=alert(1)>", dtype="float32")
    page = write_report([run.folder], samples=0)
    text = page.read_text()
    assert page == run.folder / "report.html"
    assert "<img src=x" not in text and "&lt;img src=x" in text
    assert all(reference.startswith("data:") for reference in References(text).loaded)
    assert "99.0%" in text and "87.5%" in text and "1,234" in text
    assert "The student went from 50.0% to 90.0% (teacher 99.0%, sft alone on the same labels 87.5%)." in plain(text)


def test_the_same_run_gives_the_same_page(run, page, tmp_path):
    assert write_report([run.folder], tmp_path / "again.html", samples=0).read_bytes() == page.read_bytes()


def test_a_run_that_has_only_begun(tmp_path):
    folder = tmp_path / "young"
    make_run(folder)
    for path in ((folder / "summary.json"), *(folder / "sft").iterdir(), *(folder / "interact").iterdir()):
        path.unlink()
    (folder / "verbalize" / "metrics.jsonl").write_text("")
    text = write_report([folder], samples=0).read_text()
    assert "No accuracies" in text and headline.NOTHING in text


def test_command(run, tmp_path, capsys):
    assert main(["report", str(run.folder), "--samples", "0", "--out", str(tmp_path / "deep" / "page.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "deep" / "page.html")
    assert main(["report", str(tmp_path)]) == 2 and "holds no run" in capsys.readouterr().err
    assert main(["report", str(run.folder), "--samples", "-1"]) == 2


# ---- in a browser ----

needs_browser = pytest.mark.skipif(chromium.find() is None, reason="no Chromium on this machine")
READ = """
const box = document.querySelector(".kl"), slider = box.querySelector("input");
const cells = () => [...box.querySelectorAll("tbody td")].map(td => td.firstChild.data);
const frames = {};
for (const at of [slider.max, 0]) {
  slider.value = at;
  slider.dispatchEvent(new Event("input"));
  const framed = box.querySelectorAll(".most").length;
  frames[at] = { cells: cells(), steps: box.querySelector("output").value, framed };
}
const images = [...document.images].every(i => i.complete && i.naturalWidth > 0);
return { frames, images, overflow: document.documentElement.scrollWidth - window.innerWidth };
"""


@needs_browser
@pytest.mark.parametrize("width", [390, 1100])
def test_slider_moves_in_a_browser(run, page, tmp_path, width):
    found, console = chromium.run(page, READ, tmp_path, width)
    windows = collect.kl_windows(run.metrics("interact"))
    assert console == [] and found["images"] and found["overflow"] <= 0
    for at, window in ((0, windows[0]), (39, windows[-1])):
        frame = found["frames"][str(at)]
        assert [float(c) for c in frame["cells"]] == pytest.approx(np.ravel(window["kl"]), rel=0.06)
        assert frame["steps"] == f"{window['first']} to {window['last']}" and frame["framed"] == len(STUDENTS)
    assert found["frames"]["0"]["cells"] != found["frames"]["39"]["cells"]


LAYOUT = """
document.querySelectorAll("details").forEach(d => d.open = true);
const wide = [...document.querySelectorAll(".scroll")].filter(s => s.scrollWidth > s.clientWidth + 1);
const out = [...document.querySelectorAll("section.card *")].filter(e => {
  const card = e.closest("section.card").getBoundingClientRect(), box = e.getBoundingClientRect();
  return !e.closest(".scroll") && box.width && box.right > card.right + 1;
});
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const rgb = (...colours) => {  // painted one over another
  canvas.clearRect(0, 0, 1, 1);
  for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const light = values => {
  const [r, g, b] = values.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
let faint = [];
for (const e of document.querySelectorAll("body *")) {
  if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || !e.getClientRects().length) continue;
  const backs = [];
  for (let up = e; up; up = up.parentElement) backs.unshift(getComputedStyle(up).backgroundColor);
  const back = rgb("#fff", ...backs), [a, b] = [light(back), light(rgb(getComputedStyle(e).color))];
  if ((Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 3) faint.push(e.outerHTML.slice(0, 100));
}
const dark = light(rgb("#fff", getComputedStyle(document.body).backgroundColor)) < 0.1;
const overflow = document.documentElement.scrollWidth - innerWidth;
const shown = [wide.map(s => s.innerText.slice(0, 60)), out.map(e => e.outerHTML.slice(0, 100))];
return { overflow, width: innerWidth, wide: shown[0], out: shown[1], faint, dark };
"""


@needs_browser
@pytest.mark.parametrize("width,dark", [(390, False), (390, True), (800, False), (1400, True), (1400, False)])
def test_nothing_is_cut_and_all_is_readable(full_page, tmp_path, width, dark):
    """By day and by night, on a phone too; tables of settings may be wider than a narrow window, and scroll."""
    found, console = chromium.run(full_page, LAYOUT, tmp_path, width, dark)
    assert found["width"] == width and found["overflow"] <= 0
    assert console == [] and found["dark"] == dark and found["out"] == [] and found["faint"] == []
    assert [text for text in found["wide"] if "output_dir" not in text and "torch" not in text] == []


@needs_browser
def test_two_runs_compared_in_a_browser(run, tmp_path):
    other = make_run(tmp_path / "second", seed=1, interact={"temperature": 2.0})
    page = write_report([run.folder, other.folder], tmp_path / "page.html", samples=0)
    script = "return [document.querySelector('#compared').innerText, document.querySelectorAll('.kl').length]"
    (text, sliders), console = chromium.run(page, script, tmp_path)
    assert console == [] and sliders == 2 and "interact.temperature" in text and "2.0" in text


@needs_browser
def test_a_broken_script_is_noticed(page, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("const draw", "undefinedFunction(); const draw"))
    _, console = chromium.run(broken, "return 1", tmp_path)
    assert any("undefinedFunction" in line for line in console)


# ---- what layers say ----


def test_samples_are_the_speakers_words(workspace, finished_run, monkeypatch):
    run = open_run(finished_run)
    monkeypatch.setattr(samples, "CANDIDATES", 1)  # the rows themselves, none chosen
    found = samples.what_layers_say(run, 2, max_new_tokens=3)
    assert found["reason"] == "" and found["outcomes"] == []
    assert [[column["model"] for column in r["columns"]] for r in found["rows"]] == [MODELS] * 2
    speaker = open_speaker(run.student, run.verbalizers("student"))
    row = json.loads((workspace / "rows.jsonl").read_text().splitlines()[0])
    question = row["messages"][0]["content"].removeprefix("<image>")
    assert found["rows"][0]["question"] == question
    said = speaker.speak([workspace / row["images"][0]], question, max_new_tokens=3)
    cells = found["rows"][0]["columns"][1]["cells"]
    assert [(s.layer or "answer", s.text) for s in said] == [(c["layer"], c["text"]) for c in cells]


def test_the_telling_rows_are_chosen(workspace, finished_run, monkeypatch):
    """Each outcome in turn, the frequent first; within it by scores, then words; those in which all are alike last."""
    told = {  # of each model: right, score, words
        "image 2?": [(0, 0.0, "a"), (1, 1.0, "b"), (1, 1.0, "b")],
        "image 8?": [(0, 0.0, "a"), (1, 1.0, "b c"), (1, 1.0, "d e")],
        "image 20?": [(0, 0.2, "a"), (1, 1.0, "d"), (1, 1.0, "e")],
        "image 10?": [(0, 0.0, "a"), (0, 0.0, "a"), (1, 1.0, "b")],
        "image 12?": [(0, 0.5, "a"), (0, 0.5, "a"), (0, 0.6, "b")],
    }
    asked, opened = [], samples._open

    def invented(speaker, questions, _):
        found = [told.get(q["question"].removeprefix("What is in "), [(0, 0.0, "")] * 3) for q in questions]
        of_model = [each[MODELS.index(asked[-1])] for each in found]
        return [{"right": bool(right), "share": share, "text": text} for right, share, text in of_model]

    monkeypatch.setattr(samples, "_open", lambda run, name: asked.append(name) or opened(run, name))
    monkeypatch.setattr(samples, "_own_answers", invented)
    monkeypatch.setattr(samples, "CANDIDATES", 6)
    found = samples.what_layers_say(open_run(finished_run), 4, max_new_tokens=1)
    names = [row["question"].removeprefix("What is in ").strip() for row in found["rows"]]
    assert names == ["image 8?", "image 10?", "image 2?", "image 20?"]
    assert [(list(each["right"].values()), each["count"]) for each in found["outcomes"]] == [
        ([False] * 3, 20),
        ([False, True, True], 3),
        ([False, False, True], 1),
    ]
    monkeypatch.setattr(samples, "CANDIDATES", 4)
    found = samples.what_layers_say(open_run(finished_run), 6, max_new_tokens=1)
    names = [row["question"].removeprefix("What is in ").strip() for row in found["rows"]]
    assert names[:5] == ["image 8?", "image 10?", "image 2?", "image 20?", "image 12?"]
    shares = [cell for column in found["rows"][0]["columns"] for cell in column["cells"]]
    assert all(0 <= cell["share"] <= 1 and cell["right"] is False for cell in shares)
    assert found["rows"][0]["shade"] == "relaxed accuracy (numbers may be 5% off)"


def test_a_models_own_answers(workspace, finished_run):
    run = open_run(finished_run)
    questions = samples._questions(run, 3)
    speaker = samples._open(run, "distilled")
    said = []
    for question in questions:
        (speech,) = speaker.speak(question["images"], question["question"], layers=[None], max_new_tokens=3)
        said.append(speech.text)
    for question, text in zip(questions[:2], said):
        question["answer"] = text
    found = samples._own_answers(speaker, questions, 3)
    assert [(each["text"], each["right"], each["share"]) for each in found] == list(
        zip(said, [True, True, False], [1.0, 1.0, 0.0])
    )


def test_layers_stand_at_their_depth():
    """A row a layer of the deepest model; others' layers fill the same rows, and the own answers share the last one."""

    def column(model, layers):
        cells = [{"layer": k, "text": "", "right": False, "share": 0.0} for k in (*layers, "answer")]
        return {"model": model, "cells": cells}

    found = page_of._figure(
        {"columns": [column("base", [1, 2, 3]), column("teacher", range(1, 8)), column("bare", [])]}
    )
    places = {(c["model"], c["layer"]): (c["row"], c["span"]) for c in found["cells"]}
    assert [places["base", k] for k in (1, 2, 3, "answer")] == [(1, 2), (3, 2), (5, 3), (8, 1)]
    assert [places["teacher", k] for k in range(1, 8)] == [(k, 1) for k in range(1, 8)]
    assert places["teacher", "answer"] == places["bare", "answer"] == (8, 1) and found["depth"] == 7
    assert found["own"] == {"base": False, "teacher": False, "bare": False}


def test_a_model_that_does_not_fit_is_left_out(finished_run, monkeypatch):
    teacher = samples.read_weights(Path(open_run(finished_run).base("teacher"))).parameters * 4
    monkeypatch.setattr(samples, "free_memory_bytes", lambda: teacher)
    found = samples.what_layers_say(open_run(finished_run), 1, max_new_tokens=1)
    assert [c["model"] for c in found["rows"][0]["columns"]] == MODELS[:2] and "--samples 0" in found["reason"]


def test_samples_say_what_is_missing(workspace, finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "verbalize" / "teacher")
    found = samples.what_layers_say(open_run(tmp_path / "run"), 1, max_new_tokens=1)
    assert [c["model"] for c in found["rows"][0]["columns"]] == MODELS[:2] and "teacher is missing" in found["reason"]
    (tmp_path / "rows").mkdir()
    record = json.loads((tmp_path / "run" / "sft" / "vlsi_stage.json").read_text())
    record["config"]["data"]["train"][0]["path"] = str(tmp_path / "rows.jsonl")
    write_record(tmp_path / "run" / "sft", record)
    page = write_report([tmp_path / "run"], tmp_path / "page.html", samples=1)
    assert "No samples" in page.read_text()
