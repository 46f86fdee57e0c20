"""The command line as a whole: its help, its examples, its version."""

import shlex
import subprocess
import sys

import pytest

from mambaout_jax import __version__
from mambaout_jax.__main__ import COMMANDS, main, make_parser

TOOLS = ["tools/convert_torch_weights.py"]


def help_of(command):
    done = subprocess.run(
        [sys.executable, *command, "--help"], capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=str)
def test_the_help_ends_with_an_example_that_the_parser_takes(command, capsys):
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    heading, example = capsys.readouterr().out.strip().splitlines()[-2:]
    assert heading == "example:"
    words = shlex.split(example)
    assert words[:3] == ["python", "-m", "mambaout_jax"]
    args = make_parser().parse_args(words[3:])
    assert args.command == words[3]
    assert not command or args.command == command[0]


def test_without_arguments_the_commands_are_listed(capsys):
    assert main([]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    for command in ("train", *COMMANDS):
        assert f"\n    {command} " in printed.err or f"\n    {command}\n" in printed.err


@pytest.mark.parametrize("tool", [*TOOLS, "demo/app.py"])
def test_the_help_of_a_script_ends_with_examples_of_it(tool):
    text = help_of([tool])
    assert text.strip().splitlines()[-1].startswith(f"  python {tool} ")


@pytest.mark.parametrize("command", ["models", "summary", "flops"])
def test_the_examples_that_need_no_weights_run(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    example = shlex.split(capsys.readouterr().out.strip().splitlines()[-1])
    assert main(example[3:]) == 0
    assert capsys.readouterr().out


def test_the_model_of_a_summary_is_an_argument_or_an_option(capsys):
    assert main(["summary", "test_mambaout", "--depth=1"]) == 0
    expected = capsys.readouterr().out
    assert main(["summary", "--model=test_mambaout", "--depth=1"]) == 0
    assert capsys.readouterr().out == expected
    for arguments in ([], ["test_mambaout", "--model=mambaout_tiny"]):
        assert main(["summary", *arguments]) == 1
        assert capsys.readouterr().err.startswith("error: expected one variant, such as: python")


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"{__version__}\n"
