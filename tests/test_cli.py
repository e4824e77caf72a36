"""The command line: help and an example that parses for every command, completion scripts, unknown arguments."""

import argparse
import shlex
import subprocess

import pytest

from vlsi_fast.cli import COMMANDS, build_parser, main
from vlsi_fast.config_files import parse_overrides
from vlsi_fast.sizes import format_size, parse_size


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


def options(parser):
    """All options that `--help` shows, those of commands of commands too."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from options(child)
        elif action.help != argparse.SUPPRESS:
            yield from action.option_strings


def test_options_are_spelt_with_dashes():
    found = set(options(build_parser()))
    assert {"--output-dir", "--gpu-memory", "--max-shard-size", "--shard-size"} <= found
    assert not [name for name in found if "_" in name]


def test_options_of_the_config_are_spelt_either_way():
    same = ["--output-dir", "x", "--data.max-length=5"], ["--output_dir", "x", "--data.max_length=5"]
    assert parse_overrides(same[0]) == parse_overrides(same[1]) == {"output_dir": "x", "data.max_length": 5}


def test_sizes_are_read_alike_everywhere():
    assert parse_size("80GiB") == 80 * 2**30 and parse_size("1.5 gb") == 1.5e9 and parse_size("7") == 7
    for text in ("big", "-1GB", "0", "1..2GB", "5 GX"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no size"):
            parse_size(text)
    shown = [format_size(n) for n in (0, 1023, 1536, 2**30, 3 * 2**41)]
    assert shown == ["0 B", "1023 B", "1.5 KiB", "1.0 GiB", "6.0 TiB"]


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
