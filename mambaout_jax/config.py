"""Configurations: reading them, checking them, durations, and the run that a workdir holds."""

import itertools
import json
import re
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mambaout_jax.errors import UserError, did_you_mean

# What a resumed run may change: where and how fast it runs, not what it computes.
FREE_KEYS = (
    "data.dir",
    "data.workers",
    "data.threads",
    "eval.batch_size",
    "checkpoint",
    "log",
    "skip_bad_batches",
    "compilation_cache",
    "profile",
    "mesh",
)
# What the hosts of a run may have each their own of.
HOST_KEYS = ("data.dir", "data.workers", "data.threads", "compilation_cache", "profile")

CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("float32", "bfloat16"),
    "data.source": ("tfds", "folder"),
    "augment.interpolation": ("random", "bilinear", "bicubic"),
    "schedule.per": ("epoch", "step"),
    "eval.crop_mode": ("center", "squash"),
}
DURATIONS = (
    "augment.mixup_off",
    "schedule.duration",
    "schedule.warmup",
    "schedule.cooldown",
    "eval.every",
    "checkpoint.every",
    "log.every",
    "profile",
)
OPTIONAL_DURATIONS = ("augment.mixup_off", "schedule.warmup", "schedule.cooldown", "profile")
POSITIVE = ("batch_size", "accumulate_steps", "eval.batch_size", "checkpoint.keep")


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Returns the configuration as one dict of dotted keys, its values as JSON keeps them."""

    def walk(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in tree.items():
            if isinstance(value, dict):
                flat |= walk(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value
        return flat

    return walk(json.loads(config.to_json()), "")


def shared(config: ConfigDict) -> dict[str, Any]:
    """Returns the keys that all hosts of a run must have alike, as `flatten` does."""
    flat = flatten(config)
    return {key: flat[key] for key in flat if not key.startswith(HOST_KEYS)}


def load_config(path: str | Path) -> ConfigDict:
    """Returns the configuration that a file's `get_config` makes.

    Raises:
        UserError: when the file is not there or is no configuration.
    """
    path = Path(path)
    if not path.is_file():
        known = sorted(str(p) for p in Path("configs").glob("*.py") if p.stem != "__init__")
        hint = did_you_mean(str(path), known)
        raise UserError(f"no configuration file {path}{hint} (known: {', '.join(known) or 'none'})")
    try:
        return runpy.run_path(str(path))["get_config"]()
    except KeyError:
        raise UserError(f"{path} is no configuration: it defines no get_config()") from None
    except SyntaxError as error:
        raise UserError(f"{path} is no configuration: line {error.lineno}, {error.msg}") from None


def check_command_line(argv: Sequence[str], flag: str = "config") -> None:
    """Checks the configuration file and the keys that a command line names.

    Raises:
        UserError: when the file is not there or not a configuration, or a key is unknown.
    """
    paths = [arg.split("=", 1)[1] for arg in argv if re.match(rf"--?{flag}=", arg)]
    paths += [b for a, b in itertools.pairwise(argv) if re.fullmatch(rf"--?{flag}", a)]
    if not paths:
        raise UserError(f"no configuration: expected --{flag}=FILE, such as configs/quickstart.py")
    keys = flatten(load_config(paths[-1]))
    for arg in argv:
        match = re.match(rf"--?{flag}\.([^=]+)", arg)
        if match and match[1] not in keys:
            key = match[1]
            sections = {known.rsplit(".", 1)[0] for known in keys if "." in known}
            if key in sections:
                raise UserError(
                    f"{key!r} is a section: set one of its keys, such as --{flag}.{key}.…"
                )
            last = [known for known in keys if known.split(".")[-1] == key.split(".")[-1]]
            hint = f"; did you mean {last[0]!r}?" if last else did_you_mean(key, list(keys))
            raise UserError(f"unknown configuration key {key!r}{hint}")


def duration_steps(duration: str, *, steps_per_epoch: int, batch_size: int) -> int:
    """Turns "300 epochs", "20 steps" or "1_000_000 examples" into steps; "" is 0 steps.

    Epochs may be fractions. A part of a step counts as a whole one.

    Raises:
        UserError: when the text is no duration.
    """
    if not duration:
        return 0
    match = re.fullmatch(r"([\d_]+(?:\.\d+)?) *(step|example|epoch)s?", duration)
    if not match:
        raise UserError(
            f"{duration!r} is no duration: expected a number and a unit, "
            'such as "300 epochs", "20 steps" or "1_000_000 examples"'
        )
    number, unit = float(match[1]), match[2]
    steps = number * {"step": 1, "epoch": steps_per_epoch, "example": 1 / batch_size}[unit]
    return -int(-steps // 1)


def check(config: ConfigDict) -> None:
    """Checks every value that can be checked without the data and the devices.

    Raises:
        UserError: names the key, its value and what was expected.
    """
    flat = flatten(config)
    for key, choices in CHOICES.items():
        if flat[key] not in choices:
            raise UserError(
                f"config.{key} is {flat[key]!r}{did_you_mean(str(flat[key]), choices)}"
                f" (expected one of {', '.join(choices)})"
            )
    for key in DURATIONS:
        try:
            steps = duration_steps(flat[key], steps_per_epoch=1, batch_size=1)
        except UserError as error:
            raise UserError(f"config.{key}: {error}") from None
        if not steps and key not in OPTIONAL_DURATIONS:
            raise UserError(f"config.{key} is {flat[key]!r}: expected a duration above zero")
    for key in POSITIVE:
        if flat[key] < 1:
            raise UserError(f"config.{key} is {flat[key]}: expected at least 1")
    if config.batch_size % config.accumulate_steps:
        raise UserError(
            f"config.batch_size {config.batch_size} does not divide into "
            f"config.accumulate_steps {config.accumulate_steps} equal parts"
        )
