"""The command line: help and an example that parses for every command, completion scripts, unknown arguments."""

import shlex
import subprocess

import pytest

from vlsi_fast.cli import COMMANDS, build_parser, main


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_help_ends_with_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command.name, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "example:" in text and "vlsi-fast " + command.name in text
    assert ("--section.field" in text) == command.takes_overrides
    for line in command.examples.splitlines():
        words = shlex.split(line.replace('eval "$(', "").replace(')"', ""), comments=True)
        if words[0] != "vlsi-fast":
            continue
        arguments, rest = build_parser().parse_known_args(words[1:])
        assert arguments.command == command.name and (command.takes_overrides or not rest)


def test_top_help_lists_all_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(command.summary.split(",")[0] in " ".join(text.split()) for command in COMMANDS)


def test_unknown_arguments_are_errors(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["completion", "bash", "--colour"])
    assert stop.value.code == 2 and "--colour" in capsys.readouterr().err
    assert main(["data", "verify", "nowhere", "--data.root", "x"]) == 2
    assert "takes no --data.root" in capsys.readouterr().err


def test_completion_script_knows_commands_and_options(capsys, tmp_path):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    (tmp_path / "script").write_text(script)
    subprocess.run(["bash", "-n", str(tmp_path / "script")], check=True)
    ask = f"source {tmp_path}/script; COMP_WORDS=(vlsi-fast {{}}); COMP_CWORD={{}}; _shtab_vlsi_fast; "
    ask += "echo ${{COMPREPLY[@]}}"

    def complete(words: str, at: int) -> set[str]:
        done = subprocess.run(["bash", "-c", ask.format(words, at)], capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert {command.name for command in COMMANDS} <= complete("''", 1)
    assert "--gpu-memory" in complete("plan --gpu", 2)
    assert complete("completion ''", 2) == {"bash", "zsh", "tcsh"}
