"""`vlsi-fast verbalize` and `app`: which models speak through what, JSON, page, terminal, errors that name the fix."""

import argparse
import json
import re
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import chromium
import pytest
import torch
from PIL import Image

from vlsi_fast.cli import main
from vlsi_fast.config import ConfigError
from vlsi_fast.demo import example, pictures
from vlsi_fast.lineage import checkpoint_digest, write_record
from vlsi_fast.loading import load_backbone
from vlsi_fast.runs import open_run
from vlsi_fast.speech import Speech, open_speaker
from vlsi_fast.verbalizer import Verbalizers, VerbalizerSpec
from vlsi_fast.viewer.columns import Column, Source, hear, sources_of
from vlsi_fast.viewer.options import add_app_arguments
from vlsi_fast.viewer.page import render
from vlsi_fast.viewer.terminal import aligned, print_table, visible

LAYERS = {"teacher": [1, 2, 3, 5], "student": [1, 3]}


@pytest.fixture(scope="module")
def run(workspace, tmp_path_factory):
    """A run's folder as the three stages leave it: random verbalizers, a student of other weights than its base."""
    folder = tmp_path_factory.mktemp("viewer") / "run"
    settings = SimpleNamespace(architecture="mlp", norm=False, residual=False)
    for role, layers in LAYERS.items():
        model = load_backbone(workspace / role, "float32")
        facts = {"checkpoint": checkpoint_digest(workspace / role)}
        torch.manual_seed(0)
        Verbalizers(VerbalizerSpec.of(model.config, layers, settings, made_for=facts)).save_pretrained(
            folder / "verbalize" / role
        )
    student = open_speaker(workspace / "student")
    torch.manual_seed(1)
    for parameter in student.model.model.language_model.layers.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    student.model.save_pretrained(folder / "sft" / "student")
    student.processor.save_pretrained(folder / "sft" / "student")
    config = {"output_dir": str(folder), "dtype": "float32", "data": {"train": [{"reader": "easy_vqa"}]}}
    config |= {role: {"path": str(workspace / role), "layers": LAYERS[role]} for role in LAYERS}
    for stage in ("verbalize", "interact", "sft"):
        write_record(folder / stage, {"stage": stage, "state": "finished", "config": config})
    return folder


@pytest.fixture
def asked(workspace):
    image = str(workspace / "images" / "3.png")
    return ["--image", image, "--question", "what is <b>this</b>?", "--max-new-tokens", "4"]


def test_three_models_through_their_verbalizers(run, workspace, asked, capsys):
    assert main(["verbalize", "--run", str(run), *asked, "--json", "--probabilities"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert [m["name"] for m in tree["models"]] == ["base", "distilled", "teacher"]
    found = {m["name"]: m for m in tree["models"]}
    assert found["distilled"]["checkpoint"] == str(run / "sft" / "student")
    assert found["distilled"]["verbalizers"] == found["base"]["verbalizers"] == str(run / "verbalize" / "student")
    for name, model in found.items():
        role = "teacher" if name == "teacher" else "student"
        speaker = open_speaker(model["checkpoint"], run / "verbalize" / role)
        wanted = speaker.speak(asked[1:2], asked[3], max_new_tokens=4)
        assert [layer["layer"] for layer in model["layers"]] == [*LAYERS[role], None]
        assert [layer["token_ids"] for layer in model["layers"]] == [speech.token_ids for speech in wanted]
        assert all(len(step) == 3 for layer in model["layers"] for step in layer["alternatives"])
    assert found["base"]["layers"] != found["distilled"]["layers"]


def test_layers_beams_table_and_page(run, workspace, asked, capsys, tmp_path):
    page = tmp_path / "page.html"
    words = ["--layers", "3", "last", "--teacher-layers", "2", "--num-beams", "2", "--html", str(page)]
    assert main(["verbalize", "--run", str(run), *asked, *words, "--probabilities"]) == 0
    table = capsys.readouterr().out
    assert "layer 3" in table and "last layer" in table and "layer 2" in table and "layer 1" not in table
    text = page.read_text()
    assert text.count('class="model"') == 3 and text.count('class="answer"') == 5 and "2 beams" in text
    assert text.count("<details>") == 5 and "data:image/png;base64," in text
    assert str(run.parent) not in text and "sft/student" in text, "a page to be shown names no machine's folders"
    assert len(re.findall(r"(?:layer \d|last layer) · \d+%", text)) == 5 and 'class="small"' in text
    assert "&lt;b&gt;this" in text and "<b>" not in text and "http" not in text.replace("http-equiv", "")


def test_right_and_wrong_are_marked(run, asked, capsys, tmp_path):
    page = tmp_path / "page.html"
    assert main(["verbalize", "--run", str(run), *asked, "--json"]) == 0
    texts = [layer["text"] for m in json.loads(capsys.readouterr().out)["models"] for layer in m["layers"]]
    words = ["--answer", f" {texts[0].upper()} ", "--html", str(page), "--json"]
    assert main(["verbalize", "--run", str(run), *asked, *words]) == 0
    layers = [layer for m in json.loads(capsys.readouterr().out)["models"] for layer in m["layers"]]
    right = [" ".join(text.split()).lower() == " ".join(texts[0].split()).lower() for text in texts]
    assert [layer["right"] for layer in layers] == right and 0 < sum(right) < len(right)
    assert not any(layer["alternatives"] for layer in layers), "as asked for: the page alone has them"
    text = page.read_text()
    assert text.count('class="answer right"') == sum(right)
    assert text.count('class="answer wrong"') == len(right) - sum(right) and text.count("<details>") == len(right)
    for kind in ("good", "bad"):
        assert text.count(f"--{kind}:") == 3, "by day, by night, and in the app by night"
    assert main(["verbalize", "--run", str(run), *asked, "--answer", texts[0]]) == 0
    table = capsys.readouterr().out
    assert table.count("✓") == sum(right) and "right answer: " in table


def test_only_the_distilled_student_or_another_checkpoint(run, workspace, asked, capsys, monkeypatch):
    def noisy(*arguments, **options):
        print("a library's greeting")
        return hear(*arguments, **options)

    monkeypatch.setattr("vlsi_fast.viewer.columns.hear", noisy)
    assert main(["verbalize", "--run", str(run), "--json", *asked, "--compare"]) == 0
    assert [m["name"] for m in json.loads(capsys.readouterr().out)["models"]] == ["distilled"]
    other = str(workspace / "teacher")
    sources = sources_of(open_run(run), [other, "base"])
    assert [s.name for s in sources] == ["base", "distilled", "teacher"] and sources[-1].checkpoint == other
    assert [s.role for s in sources] == ["student", "student", "teacher"]


def test_interacts_own_verbalizers(run, tmp_path, workspace):
    copy = tmp_path / "run"
    for stage in ("verbalize", "interact"):
        record = json.loads((run / stage / "vlsi_stage.json").read_text())
        record["config"]["student"]["verbalizers"] = str(run / "verbalize" / "student")
        record["config"]["interact"] = {"train_student_verbalizers": True}
        write_record(copy / stage, record)
    (copy / "interact" / "verbalizers").mkdir()
    (source,) = sources_of(open_run(copy), [])
    assert source.verbalizers == copy / "interact" / "verbalizers" and "its own" in source.note
    assert source.checkpoint == str(copy / "interact" / "student")


def refused(capsys, *words) -> str:
    assert main(["verbalize", *words]) == 2
    return capsys.readouterr().err


def test_a_long_answer_is_as_sure_as_its_tokens():
    from vlsi_fast.viewer.right import probability

    said = lambda *tokens: SimpleNamespace(token_probabilities=list(tokens))  # noqa: E731
    assert probability(said(0.9)) == pytest.approx(0.9) and probability(said(*[0.9] * 60)) == pytest.approx(0.9)
    assert probability(said(0.25, 1.0)) == pytest.approx(0.5) and probability(said()) == probability(said(0.0, 1)) == 0


def test_errors_name_the_fix(run, workspace, asked, capsys, tmp_path, monkeypatch):
    assert "holds no run" in refused(capsys, "--run", str(tmp_path), *asked)
    assert "--question is missing" in refused(capsys, "--run", str(run))
    missing = ["--image", str(tmp_path / "none.png"), "--question", "x"]
    monkeypatch.setattr("vlsi_fast.viewer.columns.sources_of", None)  # said before any model is looked for
    told = refused(capsys, "--run", str(run), *missing)
    assert f"--image {missing[1]}: " in told and "does not exist" in told and "give an image file" in told
    (tmp_path / "text.png").write_text("no image")
    told = refused(capsys, "--run", str(run), "--image", str(tmp_path / "text.png"), "--question", "x")
    assert "text.png: not an image" in told and "(truncated_image); give an image file" in told
    monkeypatch.undo()
    assert "there are some for [1, 3]" in refused(capsys, "--run", str(run), *asked, "--layers", "2")
    assert "folder nowhere does not exist" in refused(capsys, "--run", str(run), *asked, "--compare", "nowhere")
    record = json.loads((run / "sft" / "vlsi_stage.json").read_text())
    write_record(tmp_path / "started" / "sft", record | {"state": "running"})
    assert "--stage interact first" in refused(capsys, "--run", str(tmp_path / "started"), *asked)
    write_record(tmp_path / "mute" / "sft", record)
    assert "run --stage verbalize first" in refused(capsys, "--run", str(tmp_path / "mute"), *asked)
    record["config"]["student"] |= {"verbalizers": str(run / "verbalize" / "student")}
    write_record(tmp_path / "half" / "sft", record)
    assert "--compare without teacher" in refused(capsys, "--run", str(tmp_path / "half"), *asked)
    record["config"]["student"]["path"] = str(run / "sft" / "student")
    write_record(tmp_path / "swapped" / "sft", record)
    with pytest.raises(ConfigError, match="trained on another checkpoint"):
        sources_of(open_run(tmp_path / "swapped"), ["base"])
    words = ["--run", str(run), *asked, "--teacher-layers", "2", "--compare"]
    assert "--compare base teacher" in refused(capsys, *words)
    for words in (["--layers", "0"], ["--layers", "two"], ["--num-beams", "0"]):
        with pytest.raises(SystemExit):
            main(["verbalize", "--run", str(run), *words])


# ---- text from models and users ----


def column(name, *texts):
    speeches = [Speech(i + 1, text, [text], [0], [0.5], [[(text, 0.5)]]) for i, text in enumerate(texts)]
    return Column(Source(name, "student", name, None, "<i>note</i>"), speeches)


def test_nothing_in_a_text_acts(capsys):
    evil = "<script>alert(1)</script>\x1b[2J\"'&[red]"
    assert visible("a\x1b[2J\u202e\n\u00e9\U0001f600") == "a\\x1b[2J\\u202e\\n\u00e9\U0001f600"
    text = render([column(evil, evil)], [], evil, evil, evil)
    assert "<script" not in text and "\x1b" not in text and "<i>" not in text and "&quot;&#x27;&amp;" in text
    assert not re.search(r"(?:src|href)=", text)
    print_table([column(evil, evil)], evil, probabilities=True)
    out = capsys.readouterr().out
    assert "\x1b[2J" not in out and "[red]" in out


def test_columns_of_different_depth_are_spread():
    rows = aligned([column("a", "1", "2", "3", "4", "5"), column("b", "1", "2", "3"), column("c", "1")])
    assert [[s and s.text for s in row] for row in rows] == [
        ["1", "1", None],
        ["2", None, None],
        ["3", "2", None],
        ["4", None, None],
        ["5", "3", "1"],
    ]


def test_answers_fill_their_columns():
    """Spans of a column add up to its rows; the last answers share the last one."""

    def speech(layer):
        return Speech(layer, "word", ["t"], [0], [0.5], [])

    source = Source("a", "student", "x", Path("y"))
    layers = [[1, 2, 3, 4, None], [2, None], [None]]
    page = render([Column(source, [speech(k) for k in each]) for each in layers], [], "?", "run", "greedy")
    spans = [[int(n) for n in re.findall(r"--span: (\d+)", part)] for part in page.split('class="model"')[1:]]
    assert spans == [[1] * 5, [4, 1], [5]]


NARROW = """
const out = [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1);
const columns = new Set([...document.querySelectorAll(".model")].map(m => m.getBoundingClientRect().left)).size;
return [innerWidth, document.documentElement.scrollWidth - innerWidth, out.map(e => e.outerHTML.slice(0, 90)), columns,
        document.querySelector("img").getBoundingClientRect().height];
"""


@pytest.mark.skipif(chromium.find() is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width,columns", [(390, 1), (800, 3), (1400, 3)])
def test_the_page_fits_phones_and_desks(tmp_path, width, columns):
    words = ["so " * 300, "x" * 900, "red"]
    speeches = [Speech(i, text, ["t" * 90], [1], [0.5], [[("u" * 90, 0.3)]]) for i, text in enumerate(words, 1)]
    source = Source("n" * 90, "student", "p" * 90, Path("y"), "note " * 30)
    text = render([Column(source, speeches)] * 3, [Image.new("RGB", (48, 48))], "q" * 200, "run", "greedy")
    (tmp_path / "page.html").write_text(text.replace("<details>", "<details open>").replace("default-src", "x-src"))
    found, _ = chromium.run(tmp_path / "page.html", NARROW, tmp_path, width)
    assert found[0] == width and found[1] <= 0 and found[2:4] == [[], columns]
    assert found[4] >= 150, "an image of 48 pixels is enlarged"


# ---- the shipped example ----


def test_the_shipped_run_speaks_at_once(capsys, tmp_path, monkeypatch):
    """All three models describe a drawing of the test split; what they say is scored here."""
    monkeypatch.chdir(tmp_path)  # nothing of a checkout is needed
    assert main(["verbalize", "--run", "demo", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    layers = [[layer["layer"] for layer in model["layers"]] for model in tree["models"]]
    assert layers == [[1, 2, 3, None], [1, 2, 3, None], [1, 2, 3, 4, 5, 6, 7, None]]
    assert tree["question"] == pictures.QUESTION and f"test picture {example.TEST_PICTURE} " in tree["images"][0]
    number, shown = example.TEST_PICTURE, pictures.scenes()
    (cells,) = [cells for split, n, cells, _ in shown if (split, n) == ("test", number)]
    true = frozenset((p, c.color, c.shape, c.dot) for p, c in enumerate(cells) if c)
    right = [[pictures.facts(layer["text"]) == true for layer in model["layers"]] for model in tree["models"]]
    assert [model[-1] for model in right] == [False, True, True] and not any(model[0] for model in right)


def test_the_shipped_run_is_small_whole_and_names_no_machine():
    files = [file for file in example.FOLDER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 5e6
    run = example.example_run()
    assert list(run.records) == ["verbalize", "interact"] and all(map(run.finished, run.records))
    assert [len(run.metrics(stage)) for stage in run.records] == [100, 300]
    for role in ("teacher", "student"):
        assert Path(run.base(role), "model.safetensors").is_file()
    for file in files:
        if file.suffix in (".json", ".jsonl") and file.name != "tokenizer.json":
            assert not re.search(r'"(?:/|\.\./\.\.)', file.read_text()), f"{file} holds an absolute path"


# ---- the app ----


def test_the_app_without_gradio(monkeypatch, capsys, run):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", "--run", str(run)]) == 2
    assert 'pip install "vlsi-fast[app]"' in capsys.readouterr().err


def app_arguments(run, *words):
    parser = argparse.ArgumentParser()
    add_app_arguments(parser)
    return parser.parse_args(["--run", str(run), "--max-new-tokens", "3", *words])


def test_the_apps_answers_and_limits(run, workspace, tmp_path):
    from vlsi_fast.viewer.app import Answerer

    arguments = app_arguments(run, "--max-megapixels", "1")
    assert arguments.host == "127.0.0.1"
    opened = open_run(run)
    answer = Answerer(opened, sources_of(opened, [arguments.compare]), arguments)
    text = answer(str(workspace / "images" / "0.png"), "what?", 1, True)
    assert text.count('class="model"') == 2 and text.count('class="answer"') == 6 and "<details>" in text
    Image.new("1", (1001, 1000)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="decompression_bomb"):
        answer(str(tmp_path / "large.png"), "what?", 1, False)
    with pytest.raises(ValueError, match="ask something"):
        answer(None, "  ", 1, False)


@pytest.fixture
def app(run):
    """Address of the app, served by Gradio."""
    gradio = pytest.importorskip("gradio")
    from vlsi_fast.viewer.app import Answerer, build

    opened = open_run(run)
    page = build(gradio, Answerer(opened, sources_of(opened, ["base"]), app_arguments(run)), "test")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True, max_file_size=20000)
    yield f"http://127.0.0.1:{port}"
    page.close()


def test_the_page_of_the_app_in_gradio(app, workspace, tmp_path):
    client = pytest.importorskip("gradio_client")
    caller = client.Client(app, verbose=False, analytics_enabled=False)
    image = client.handle_file(str(workspace / "images" / "0.png"))
    assert caller.predict(image, "what?", 1, False, api_name="/ask").count('class="answer"') == 6
    with pytest.raises(Exception, match="ask something"):
        caller.predict(image, "", 1, False, api_name="/ask")
    noise = torch.randint(0, 255, (200, 200, 3), dtype=torch.uint8).numpy()
    Image.fromarray(noise).save(tmp_path / "big.png")
    with pytest.raises(Exception, match="(?i)size|413|large"):
        caller.predict(client.handle_file(str(tmp_path / "big.png")), "what?", 1, False, api_name="/ask")


@pytest.mark.skipif(chromium.find() is None, reason="no Chromium on this machine")
def test_the_app_in_a_browser(app, workspace):
    """As a user: upload, ask, read; ask nothing and be told; nothing is loaded from elsewhere."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium.find(), args=["--no-sandbox"])
        page, asked, wrong = browser.new_page(), [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(app)
        page.get_by_role("button", name="Ask").click()
        page.get_by_text("ask something").first.wait_for()
        page.locator("input[type=file]").first.set_input_files(str(workspace / "images" / "0.png"))
        page.locator("img").first.wait_for()
        page.get_by_label("question").fill("what is <b>this</b>?")
        page.get_by_label("token probabilities").check()
        page.get_by_role("button", name="Ask").click()
        page.locator(".vlsi .answer").nth(5).wait_for()
        assert page.locator(".vlsi .model").count() == 2 and page.locator(".vlsi .answer").count() == 6
        assert page.locator(".vlsi details").count() == 6 and wrong == []
        browser.close()
    assert [url for url in asked if not url.startswith((app, "data:", "blob:"))] == []
