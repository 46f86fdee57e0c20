"""`mambaout-jax train` and `mambaout-jax eval`: main.py, with the configs of the package by name.

A wheel holds copies of main.py and configs/ in mambaout_jax/shipped, which setup.py makes; in a
checkout the originals are used.
"""

import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from mambaout_jax.errors import UserError, did_you_mean

SUMMARIES = {
    "train": "Trains a network, or resumes its run.",
    "eval": "Evaluates the best checkpoint of a run, or the weights of config.init_from.",
}
EXAMPLE = "--config=quickstart --workdir=runs/quickstart"


def shipped_folder() -> Path:
    """Returns the folder of main.py and configs/: in the wheel, or else the checkout."""
    package = Path(__file__).parents[1]
    shipped = package / "shipped"
    return shipped if shipped.is_dir() else package.parent


def resolve_config(argument: str) -> str:
    """Returns the path for the name of a config in the package, and a path as it is.

    Raises:
        UserError: there is no config of this name; lists the known ones.
    """
    if "/" in argument or argument.endswith(".py") or not argument:
        return argument
    configs = shipped_folder() / "configs"
    known = sorted(path.stem for path in configs.glob("*.py") if path.stem != "__init__")
    if argument not in known:
        raise UserError(
            f"unknown config {argument!r}{did_you_mean(argument, known)} (expected the path of a "
            f".py file, or one of {', '.join(known)})"
        )
    return str(configs / f"{argument}.py")


def resolve_configs(arguments: Sequence[str]) -> list[str]:
    """Returns a command line with the path for each name after --config."""
    resolved: list[str] = []
    for argument in arguments:
        if match := re.fullmatch(r"(--?config=)(.*)", argument):
            argument = match[1] + resolve_config(match[2])
        elif resolved and re.fullmatch("--?config", resolved[-1]):
            argument = resolve_config(argument)
        resolved.append(argument)
    return resolved


def run_main(command: str, arguments: Sequence[str]) -> int:
    """Runs main.py in this process, which ends with main.py's exit code.

    Args:
        command: "train" or "eval".
        arguments: main.py's flags.

    Raises:
        UserError: there is no config, or it is unknown.
    """
    folder = shipped_folder()
    program = str(folder / "main.py")
    flags = resolve_configs(arguments)
    if not any(re.match("--?(config(=|$)|help)", flag) for flag in flags):
        raise UserError("no config: expected --config=NAME or a .py file, such as quickstart")
    sys.path.insert(0, str(folder))  # as `python main.py` does, for `from configs import default`
    sys.argv = [program, f"--mode={command}", *flags]
    runpy.run_path(program, run_name="__main__")
    return 0
