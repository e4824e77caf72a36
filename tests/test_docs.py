"""docs/ says what the code does: its commands parse, its paths exist, no error, option or operator is left out."""

import importlib
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import vlsi_fast
import vlsi_kernels
from vlsi_fast.cli import build_parser
from vlsi_fast.config import RunConfig, field_names, load_config
from vlsi_fast.config_data import SourceConfig
from vlsi_fast.data import answering
from vlsi_fast.data.answering.filters import CAUSES as REJECTED
from vlsi_fast.data.skipped import CAUSES

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
EXAMPLES = {"configs/mine.yaml", "configs/X.yaml"}
"""Names of files that a reader writes."""

sys.path.insert(0, str(DOCS))
hooks = importlib.import_module("hooks")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """(page, command line) of everything that the pages tell to type."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.name, line) for line in lines if line.startswith("vlsi-fast ")]
        inline = re.findall(r"`(vlsi-fast [a-z-]+ --?[^`]*)`", page.read_text())
        found += [(page.name, line) for line in inline]
    return found


@pytest.mark.parametrize("page, line", commands())
def test_commands_of_the_pages_parse(page, line, capsys):
    words = shlex.split(line, comments=True)[1:]
    if "--options" in words:  # prints and exits
        words = ["train", "--stage", "all", "--config", "x"]
    try:
        _, rest = build_parser().parse_known_args(words)
    except SystemExit:
        pytest.fail(f"{page}: {line}: {capsys.readouterr().err}")
    known = set(field_names(RunConfig)) | {
        f"data.{which}.N.{name}" for which in ("train", "eval") for name in SourceConfig.model_fields
    }
    for option in (word for word in rest if word.startswith("--")):
        name = re.sub(r"\.\d+\.", ".N.", option[2:].partition("=")[0].replace("-", "_"))
        assert name in known, f"{page}: {line}: {option} is no option"


def test_there_are_commands_to_check():
    assert len(commands()) > 20 and len({page for page, _ in commands()}) > 6


def test_paths_that_the_pages_name_exist():
    known = r"(?:configs|scripts|benchmarks|tests|kernels|vlsi_fast)/[\w./-]*\w\.(?:py|sh|yaml|json|md)"
    for page in PAGES:
        for path in set(re.findall(known, page.read_text())) - EXAMPLES:
            assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_the_tree_of_the_architecture_exists_and_is_whole():
    (tree,) = re.findall(r"```\n(vlsi_fast/.*?)```", (DOCS / "architecture.md").read_text(), re.DOTALL)
    named = set(re.findall(r"^  ([\w./]+) ", tree, re.MULTILINE))
    for name in named:
        assert (ROOT / "vlsi_fast" / name).exists(), name
    for name in re.findall(r"^([\w./]+) ", tree, re.MULTILINE):
        assert (ROOT / name).exists(), name
    there = {path.name for path in (ROOT / "vlsi_fast").iterdir() if not path.name.startswith("_")}
    assert there == {name.rstrip("/") for name in named if name.count("/") == name.endswith("/")}


def test_links_between_pages_lead_somewhere():
    made = {"config-reference.md", *hooks.REPOSITORY_PAGES}
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert target in made or (DOCS / target).is_file(), f"{page.name} links to {target}"


def test_the_menu_has_every_page():
    tree = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = set(re.findall(r"[\w-]+\.md", str(tree)))
    assert named == {page.name for page in PAGES} | {"config-reference.md", *hooks.REPOSITORY_PAGES}


def test_every_error_and_cause_is_explained():
    page = (DOCS / "troubleshooting.md").read_text()
    sources = [path.read_text() for path in (ROOT / "vlsi_fast").rglob("*.py")]
    names = {name for text in sources for name in re.findall(r"^class (\w+)\([\w, ]*Error\):", text, re.MULTILINE)}
    assert {"ConfigError", "LineageError", "UnusableRow", "TooManySkippedRows"} <= names
    for name in names | set(CAUSES) | set(REJECTED):
        assert re.search(rf"^\| [^|]*`{name}`[^|]* \|", page, re.MULTILINE), f"troubleshooting.md lacks {name}"


def test_the_config_reference_has_every_option():
    page = hooks.config_reference()
    for name, info in field_names(RunConfig).items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        assert " ".join(info.description.split()).replace("|", "\\|") in row
    for name in SourceConfig.model_fields:
        assert f"| `data.train[].{name}` |" in page
    assert "| `lora.rank` | whole number, ≥ 1 | `64` |" in page
    assert "| `sft.method` | `full` or `lora` | `full` |" in page
    assert "| `output_dir` | text | required |" in page


def test_an_option_without_documentation_is_refused():
    class Bare(RunConfig):
        more: int = 1

    with pytest.raises(ValueError, match="Bare.more has no documentation"):
        hooks.table(Bare, "")


@pytest.mark.parametrize(
    "tag",
    [
        '<script src="https://example.org/x.js">',
        "<link rel=stylesheet href=//example.org/x.css>",
        '<img alt="" src="http://example.org/x.png">',
    ],
)
def test_a_page_that_loads_from_elsewhere_is_refused(tag):
    class Of:
        class file:
            src_uri = "page.md"

    assert hooks.on_post_page('<a href="https://example.org">x</a><script src="x.js">', Of, None)
    with pytest.raises(ValueError, match=r"page\.md loads from another server"):
        hooks.on_post_page(f"<p>{tag}", Of, None)


def documented() -> list[str]:
    pages = ((DOCS / name).read_text() for name in ("operators.md", "python.md"))
    return [name for page in pages for name in re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)]


def find(path: str):
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_the_api_pages_have_everything_public():
    shown = [find(path) for path in documented()]
    public = [getattr(vlsi_kernels, name) for name in vlsi_kernels.__all__]
    for thing in [*public, vlsi_fast.load_config, vlsi_fast.run, answering.answer]:
        assert any(thing is each for each in shown), thing


@pytest.mark.parametrize("path", [path for path in documented() if path.rpartition(".")[2][0].islower()])
def test_api_functions_document_every_parameter(path):
    function = find(path)
    text = inspect.getdoc(function)
    assert text and "Raises:" in text or path.endswith(("exact_match", "merge_head_statistics")), path
    if "Args:" in text:
        for name in inspect.signature(function).parameters:
            assert re.search(rf"^ +{name}: ", text, re.MULTILINE), f"{path}: {name}"


def test_the_tutorials_config_is_one(tmp_path):
    (text,) = blocks(DOCS / "tutorial.md", "yaml")
    (tmp_path / "run.yaml").write_text(text)
    config = load_config(tmp_path / "run.yaml")
    assert config.stages == ["verbalize", "interact"] and config.stage_training("interact").max_steps == 150


def test_citation_and_packages_agree_on_the_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == vlsi_fast.__version__ == vlsi_kernels.__version__
    assert cited["license"] == "Apache-2.0" and "2412.01822" in str(cited["references"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mkdocs") is None, reason="needs the extra docs; `make docs` builds in any case")
def test_the_site_builds_without_a_warning(tmp_path):
    built = subprocess.run(
        ["mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    assert built.returncode == 0, built.stderr
    assert "interact.intermediate_weight" in (tmp_path / "site" / "config-reference" / "index.html").read_text()
