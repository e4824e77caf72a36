"""The report: its numbers against plain ones, the page's safety, and the page in a real browser."""

import json
import random
import shutil
from html.parser import HTMLParser
from pathlib import Path

import chromium
import numpy as np
import pytest
import tiny_runs as runs

from vlsi_fast.cli import main
from vlsi_fast.config import ConfigError, RunConfig, load_config
from vlsi_fast.evaluation.answers import Answer
from vlsi_fast.evaluation.report import summarise
from vlsi_fast.lineage import write_record
from vlsi_fast.report import collect, samples
from vlsi_fast.report.command import write_report
from vlsi_fast.runs import open_run
from vlsi_fast.speech import open_speaker
from vlsi_fast.stages import run as run_stages

MODELS = ["base", "distilled", "teacher"]
STUDENTS, TEACHERS, STEPS = [2, 6, 10], [2, 6, 10, 14, 18], 90


def step(stage, number, draw, **more):
    tokens = draw.randrange(50, 200)
    return {
        "stage": stage, "step": number, "learning_rate": 1e-4, "answer_tokens": tokens, "rows": 8, "skipped_rows": 0,
        "step_seconds": 0.5, "tokens_per_second": 1000.0, "answer_tokens_per_second": 100.0, "data_wait_share": 0.25,
        "peak_memory_bytes": [2**30, 2**31], "peak_rss_bytes": [2**30, 2**31], **more,
    }  # fmt: skip


def make_run(folder, seed=0, **changes):
    """A finished run of three stages with invented numbers."""
    draw = random.Random(seed)
    config = RunConfig(
        output_dir=str(folder), teacher={"path": "big", "layers": TEACHERS}, student={"path": "small"},
        data={"train": [{"reader": "qa", "path": "rows.json"}]}, **changes,
    ).model_dump()  # fmt: skip
    for stage in ("verbalize", "interact", "sft"):
        record = {"stage": stage, "state": "finished", "config": config, "versions": {"torch": "0"}, "facts": {}}
        record["summary"] = {"seconds": 100.0, "device": "cuda:0", "skipped_rows": {"missing_image": 2}}
        write_record(folder / stage, record)
        lines = []
        for i in range(STEPS):
            if stage == "verbalize":
                more = {f"loss/{r}_layer_{k}": draw.random() for r, ks in (("student", STUDENTS), ("teacher", TEACHERS))
                        for k in ks}  # fmt: skip
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
    (first, *_), old = collect.cost(run), collect.demo_scores(run)
    assert first["optimizer_steps"] == STEPS and first["rows"] == 8 * STEPS and first["ranks"] == 2
    assert first["peak_memory_bytes"] == 2**31 and first["skipped_rows"] == 2 and first["device"] == "cuda"
    assert first["tokens_per_second"] == pytest.approx(1000) and first["data_wait_share"] == pytest.approx(0.25)
    assert old["scores"]["student after sft alone (control)"] == [{"mean": 0.875, "interval": None}]
    assert old["metrics"] == ["exact match"] and old["questions"] == 1234


def test_settings_tell_what_differs(run, tmp_path):
    other = make_run(tmp_path / "second", seed=1, interact={"temperature": 2.0})
    table = {name: changed for name, _, changed in collect.settings(other.records["sft"]["config"])}
    assert table["interact.temperature"] and not table["interact.headless"]
    configs = [r.records["sft"]["config"] for r in (run, other)]
    assert [n for n, _ in collect.differing_settings(configs)] == ["output_dir", "interact.temperature"]


def test_results_of_eval(run, tmp_path):
    answers = [Answer(id=str(i), question="?", answer="red", prediction="red" if i < 3 else "blue", type="other",
                      source="rows", scores={"exact_match": i < 3}) for i in range(4)]  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(summarise({"mine": answers}, {"mine": {}})))
    (found,) = collect.read_results(tmp_path / "a.json")
    assert (found["name"], found["mean"], found["rows"]) == ("mine", 0.75, 4)
    text = write_report([run.folder], tmp_path / "page.html", [tmp_path / "a.json"], samples=0).read_text()
    assert "75.00%" in text and f"{100 * found['interval'][0]:.2f}% to" in text
    for bad in ("{}", "no json", "[1]", '{"models": {"mine": {}}}'):
        (tmp_path / "b.json").write_text(bad)
        with pytest.raises(ConfigError, match="vlsi-fast eval --json"):
            collect.read_results(tmp_path / "b.json")


# ---- the page ----


def test_page_loads_nothing_and_escapes_everything(tmp_path):
    run = make_run(tmp_path / "<img src=x onerror=alert(1)>", dtype="float32")
    page = write_report([run.folder], samples=0)
    text = page.read_text()
    assert page == run.folder / "report.html"
    assert "<img src=x" not in text and "&lt;img src=x" in text
    assert all(reference.startswith("data:") for reference in References(text).loaded)
    assert "99.00%" in text and "87.50%" in text and "1,234" in text


def test_the_same_run_gives_the_same_page(run, page, tmp_path):
    assert write_report([run.folder], tmp_path / "again.html", samples=0).read_bytes() == page.read_bytes()


def test_a_run_that_has_only_begun(tmp_path):
    folder = tmp_path / "young"
    make_run(folder)
    for path in ((folder / "summary.json"), *(folder / "sft").iterdir(), *(folder / "interact").iterdir()):
        path.unlink()
    (folder / "verbalize" / "metrics.jsonl").write_text("")
    assert "No accuracies" in write_report([folder], samples=0).read_text()


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
@pytest.mark.parametrize("width", [500, 1100])
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
return { wide: wide.map(s => s.innerText.slice(0, 60)), out: out.map(e => e.outerHTML.slice(0, 100)), faint, dark };
"""


@needs_browser
@pytest.mark.parametrize("width,dark", [(500, True), (800, False), (1400, True), (1400, False)])
def test_nothing_is_cut_and_all_is_readable(page, tmp_path, width, dark):
    """By day and by night; tables of settings may be wider than a narrow window, and scroll."""
    found, console = chromium.run(page, LAYOUT, tmp_path, width, dark)
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
    assert found["reason"] == "" and [r["models"] for r in found["rows"]] == [MODELS] * 2
    speaker = open_speaker(run.student, run.verbalizers("student"))
    row = json.loads((workspace / "rows.jsonl").read_text().splitlines()[0])
    question = row["messages"][0]["content"].removeprefix("<image>")
    assert found["rows"][0]["question"] == question
    said = speaker.speak([workspace / row["images"][0]], question, max_new_tokens=3)
    column = {r["layer"]: r["cells"][1] for r in found["rows"][0]["rows"]}
    assert {s.layer or "answer": s.text for s in said} == {k: c["text"] for k, c in column.items() if c}
    assert column[5] is None, "the student has no target layer 5"


def test_the_telling_rows_are_chosen(workspace, finished_run, monkeypatch):
    """Of many questions those where the distilled student gains most over the base student; ties: the second score."""
    gains = {"image 2?": (0.0, 0.2), "image 8?": (1.0, 0.1), "image 20?": (0.0, 0.9)}

    def invented(speaker, questions, _):
        found = [gains.get(q["question"].removeprefix("What is in "), (0.0, 0.0)) for q in questions]
        return found if "distilled" in asked else [(0.0, 0.0)] * len(questions)

    asked, opened = [], samples._open
    monkeypatch.setattr(samples, "_open", lambda run, name: asked.append(name) or opened(run, name))
    monkeypatch.setattr(samples, "_own_scores", invented)
    found = samples.what_layers_say(open_run(finished_run), 2, max_new_tokens=1)
    assert [row["question"][-9:].strip() for row in found["rows"]] == ["image 8?", "image 20?"]
    assert found["chosen_of"] == 24
    shares = [cell for row in found["rows"][0]["rows"] for cell in row["cells"] if cell]
    assert all(0 <= cell["share"] <= 1 and cell["right"] is False for cell in shares)
    assert found["rows"][0]["shade"] == "relaxed accuracy (numbers may be 5% off)"


def test_a_models_own_scores_are_its_answers(workspace, finished_run):
    run = open_run(finished_run)
    questions = samples._questions(run, 3)
    speaker = samples._open(run, "distilled")
    for question in questions[:2]:
        (speech,) = speaker.speak(question["images"], question["question"], layers=[None], max_new_tokens=3)
        question["answer"] = speech.text
    assert samples._own_scores(speaker, questions, 3) == [(1.0, 1.0), (1.0, 1.0), (0.0, 0.0)]


def test_a_model_that_does_not_fit_is_left_out(finished_run, monkeypatch):
    teacher = samples.read_weights(Path(open_run(finished_run).base("teacher"))).parameters * 4
    monkeypatch.setattr(samples, "free_memory_bytes", lambda: teacher)
    found = samples.what_layers_say(open_run(finished_run), 1, max_new_tokens=1)
    assert found["rows"][0]["models"] == MODELS[:2] and "--samples 0" in found["reason"]


def test_samples_say_what_is_missing(workspace, finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "verbalize" / "teacher")
    found = samples.what_layers_say(open_run(tmp_path / "run"), 1, max_new_tokens=1)
    assert found["rows"][0]["models"] == MODELS[:2] and "teacher is missing" in found["reason"]
    (tmp_path / "rows").mkdir()
    record = json.loads((tmp_path / "run" / "sft" / "vlsi_stage.json").read_text())
    record["config"]["data"]["train"][0]["path"] = str(tmp_path / "rows.jsonl")
    write_record(tmp_path / "run" / "sft", record)
    page = write_report([tmp_path / "run"], tmp_path / "page.html", samples=1)
    assert "No samples" in page.read_text()
