"""What a newcomer sees in a terminal: quiet libraries, whole words, help, and what is said when a run is stopped."""

import os
import signal
import subprocess
import sys
import time

import pytest
import tiny_runs as runs
from rich.table import Table

from vlsi_fast import tabular
from vlsi_fast.cli import COMMANDS, main
from vlsi_fast.config import RunConfig, field_names
from vlsi_fast.data.skipped import SkipLog

# ---- tables ----


def a_table() -> Table:
    table = Table("communication", "path", "words")
    table.add_row("0.5", "/a/very/long/path/" + "x" * 60, "many words that can be broken between any two of them " * 3)
    return table


@pytest.mark.parametrize("room", [20, 80, 110, 160, 500])
def test_no_word_of_a_table_is_cut(room, capsys):
    tabular.print_table(a_table(), room)
    text = capsys.readouterr().out
    assert "communication" in text and "/a/very/long/path/" + "x" * 60 in text and "…" not in text
    least = 13 + 78 + len("between") + 10
    assert max(map(len, text.splitlines())) <= max(room, least)
    whole = " ".join("many words that can be broken between any two of them".split())
    assert (whole in text) == (room >= 160)


def test_room_is_the_pipes_or_the_terminals(capsys, monkeypatch):
    tabular.print_table(a_table())
    assert 100 < max(map(len, capsys.readouterr().out.splitlines())) <= tabular.PIPE_WIDTH


def test_plan_in_80_columns_and_with_units_that_fit(capsys, monkeypatch):
    """A tiny model's plan: no row of zeros, no table over 80 columns, every word whole."""
    monkeypatch.setattr(tabular, "PIPE_WIDTH", 80)
    monkeypatch.chdir(runs.ROOT)
    student = "vlsi_fast/demo/example_run/start/student/config.json"
    assert main(["plan", "--config", "configs/demo.yaml", "--student-config", student]) == 0
    text = capsys.readouterr().out
    assert "student 675.3K parameters, teacher 1.1M" in text and "MiB a GPU" in text and "GFLOP a sample" in text
    tables = [line for line in text.splitlines() if line.startswith(("│", "┃", "verbalize", "interact"))]
    assert len(tables) > 40 and max(map(len, tables)) <= 80 and "…" not in text
    for word in ("verbalize", "interact", "checkpointing", "(activations)", "compute"):
        assert word in text
    assert not [line for line in tables if " 0.0 " in line]


# ---- help ----


def test_bare_command_shows_help(capsys):
    assert main([]) == 2
    text = capsys.readouterr().err
    assert all(f"    {command.name} " in text for command in COMMANDS)
    assert '\n    from vlsi_fast import load_config, run\n    run(load_config("configs/demo.yaml")' in text


def test_options_are_whole_in_a_pipe(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit) as stop:
        main(["train", "--options"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and max(len(line) for line in lines if line.startswith("    ")) <= 60
    names = [line.split()[0] for line in lines if line.startswith("--")]
    assert names == [f"--{name}" for name in field_names(RunConfig)]


def test_a_reader_that_leaves_is_no_error():
    code = "import sys; from vlsi_fast.cli import main; sys.exit(main(['train', '--options']))"
    command = f'{sys.executable} -c "{code}" | head -n 1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], cwd=runs.ROOT, env=runs.environment(), capture_output=True)
    assert done.stderr == b"" and done.stdout.splitlines()[1] == b"0"


# ---- skipped rows ----


def test_a_new_cause_is_told_once_and_all_at_the_end(tmp_path):
    log = SkipLog(tmp_path / "skipped.jsonl", 10_000, 1.0)
    row = lambda i, cause: {"id": f"rows#{i}", "cause": cause, "detail": "x"}  # noqa: E731
    assert log.total() == "" and log.news() == []
    log.record([row(1, "missing_image"), row(2, "missing_image"), row(3, "too_long")])
    told = log.news()
    assert len(told) == 2 and "rows#1" in told[1] and "does not exist" in told[1] and "rows#3" in told[0]
    log.record([row(i, "missing_image") for i in range(4, 2000)])
    assert log.news() == []
    assert log.total().startswith("1,999 of 10,000 rows skipped: missing_image 1,998, too_long 1 (")
    assert SkipLog(tmp_path / "skipped.jsonl", 10_000, 1.0).news() == [], "a continued run has told them"


# ---- a run in a terminal ----


def start(workspace, tmp_path, *arguments, ranks=0, **settings):
    """A run of stage verbalize that would take minutes, with rows that cannot be used."""
    runs.make_rows(tmp_path / "data", 16)
    for i in range(0, 16, 2):
        (tmp_path / "data" / "images" / f"{i}.png").unlink()
    tree = runs.settings(workspace, tmp_path / "run", max_steps=5000, save_steps=2, **settings)
    tree["data"] = {"train": [{"reader": "messages", "path": str(tmp_path / "data" / "rows.jsonl")}]}
    tree["data"]["max_skipped_share"] = 1.0
    path = runs.write_config(tree, tmp_path / "config.yaml")
    environment = {k: v for k, v in runs.environment().items() if k != "PYTHONWARNINGS"}
    return subprocess.Popen(
        runs.train_command(path, "verbalize", *arguments, ranks=ranks), cwd=runs.ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background has it ignored
    )  # fmt: skip


def interrupt(process, folder, steps=3, timeout=runs.LIMIT):
    """Ctrl-C as a terminal sends it, to the whole group, once some steps are made. Returns the output."""
    metrics, until = folder / "verbalize" / "metrics.jsonl", time.monotonic() + timeout
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < steps:
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    return process.communicate(timeout=runs.LIMIT)[0]


@pytest.mark.slow
def test_ctrl_c_ends_with_one_sentence(workspace, tmp_path):
    process = start(workspace, tmp_path)
    text = interrupt(process, tmp_path / "run")
    assert process.returncode == 130
    last = text.splitlines()[-1]
    step = int(last.split("optimizer step ")[1].split(";")[0])
    sentences = [  # a checkpoint is made every 2 steps: that of this very step may be there already
        f"vlsi-fast: stopped in stage verbalize, optimizer step {step}; continue from step {saved} with --resume"
        for saved in {(step - 1) // 2 * 2, step // 2 * 2}
    ]
    assert last in sentences, "on a line of its own"
    for noise in ("Traceback", "Loading weights", "Warning", "[transformers]", "DeepSpeed", "non_blocking"):
        assert noise not in text, text
    assert text.count("skipped: missing_image (the image file does not exist") == 1


@pytest.mark.slow
def test_verbose_shows_what_libraries_say(workspace, tmp_path):
    process = start(workspace, tmp_path, "--verbose")
    text = interrupt(process, tmp_path / "run", steps=1)
    assert process.returncode == 130 and "Loading weights" in text


@pytest.mark.slow
def test_ctrl_c_under_deepspeed(workspace, tmp_path):
    process = start(workspace, tmp_path, ranks=2, deepspeed=runs.zero3())
    text = interrupt(process, tmp_path / "run")
    # DeepSpeed's launcher kills the ranks at once: on a busy machine before one has said its sentence
    assert process.returncode != 0 and text.count("vlsi-fast: stopped in stage verbalize") <= 1, text
    assert "Loading weights" not in text and "FutureWarning" not in text
    # the launcher, interrupted itself, may print a traceback of its own frames
    assert "vlsi_fast/stages" not in text and "vlsi_fast/cli" not in text, text
