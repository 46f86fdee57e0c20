"""Configs: reading them, and checking each value once.

`mambaout_jax.build` turns a checked config into typed parts; nothing after it reads a config.
"""

import dataclasses
import itertools
import json
import math
import re
import runpy
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mambaout_jax.errors import UserError, did_you_mean
from mambaout_jax.files import kind_of
from mambaout_jax.models.upernet import PREFIX
from mambaout_jax.models.vit import ATTENTIONS
from mambaout_jax.training.classification import LOSSES
from mambaout_jax.training.distillation import KINDS
from mambaout_jax.training.mixing import check_group
from mambaout_jax.training.optimizer import OPTIMIZERS
from mambaout_jax.training.task import TASKS

# Prefixes of the keys that a resumed run may change: where and how fast it runs, not what it
# computes. skip_bad_batches is a key of older runs.
FREE_KEYS = (
    "accumulate_steps",
    "checkpoint",
    "compilation_cache",
    "data.backend",
    "data.dir",
    "data.threads",
    "data.workers",
    "eval.batch_size",
    "log",
    "max_bad_steps",
    "mesh",
    "model.depthwise",
    "model.gradient_dtype",
    "model.remat",
    "profile",
    "skip_bad_batches",
)
# Keys that older runs do not have, and the value that they ran with.
ADDED_KEYS: dict[str, Any] = {
    "augment.mixup_group": 0,
    "loss": "softmax",
    "distillation.teacher": "",
    "distillation.kind": "soft",
    "distillation.weight": 0.5,
    "distillation.temperature": 1.0,
    "optimizer.name": "adamw",
    "model.token_mixer": "conv",
    "model.kernel_size": 7,
    "model.attention": "full",
    "task": "classification",
    "data.reduce_zero_label": False,
    "segmentation.channels": 512,
    "segmentation.auxiliary_weight": 0.4,
    "segmentation.ratio_range": [0.5, 2.0],
    "segmentation.cat_max_ratio": 0.75,
    "segmentation.photometric": True,
    "schedule.kind": "cosine",
    "schedule.power": 1.0,
    "schedule.reference_batch": 0,
    "eval.scales": [1.0],
    "eval.flip": False,
    "eval.window": 0,
    "eval.stride": 0,
}
# Values of older runs, and what they are called now.
_RENAMED_VALUES: dict[tuple[str, Any], Any] = {("model.depthwise", "pallas_gpu"): "triton"}
# Keys that one task does not read, and the value that they have with it.
UNREAD: dict[str, dict[str, Any]] = {
    "segmentation": {
        "label_smoothing": 0.0,
        "loss": "softmax",
        "distillation.teacher": "",
        "augment.crop_scale": [0.08, 1.0],
        "augment.crop_ratio": [3 / 4, 4 / 3],
        "augment.interpolation": "random",
        "augment.policy": "",
        "augment.color_jitter": 0.0,
        "augment.random_erasing": 0.0,
        "augment.mixup": 0.0,
        "augment.cutmix": 0.0,
        "augment.mixup_prob": 1.0,
        "augment.mixup_switch_prob": 0.5,
        "augment.mixup_group": 0,
        "augment.mixup_off": "",
        "eval.crop_pct": 1.0,
        "eval.crop_mode": "center",
    },
    "classification": {
        key: value
        for key, value in ADDED_KEYS.items()
        if key.startswith(("segmentation.", "data.reduce_zero_label", "eval."))
    },
}
# Prefixes of the keys that may differ between the hosts of a run.
HOST_KEYS = ("compilation_cache", "data.dir", "data.threads", "data.workers", "profile")


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers from `low` to `high`, without the ends that are open."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, number: float) -> bool:
        above = number > self.low if self.open_low else number >= self.low
        below = number < self.high if self.open_high else number <= self.high
        return above and below

    def __str__(self) -> str:
        low = f"above {self.low}" if self.open_low else f"at least {self.low}"
        if self.high == math.inf:
            return low
        return f"{low} and {'below' if self.open_high else 'at most'} {self.high}"


PROBABILITY = Range(0, 1)
BELOW_ONE = Range(0, 1, open_high=True)
COUNT = Range(1)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, open_low=True)

RANGES: dict[str, Range] = {
    "seed": Range(0, 2**32 - 1),
    "model.drop_path_rate": BELOW_ONE,
    "model.head_dropout_rate": BELOW_ONE,
    "model.kernel_size": Range(3, 13),
    "data.num_classes": COUNT,
    "data.image_size": Range(32),
    "data.workers": Range(-1),
    "data.threads": COUNT,
    "augment.hflip": PROBABILITY,
    "augment.color_jitter": NOT_NEGATIVE,
    "augment.repeats": COUNT,
    "augment.random_erasing": PROBABILITY,
    "augment.mixup": NOT_NEGATIVE,
    "augment.cutmix": NOT_NEGATIVE,
    "augment.mixup_prob": PROBABILITY,
    "augment.mixup_switch_prob": PROBABILITY,
    "augment.mixup_group": NOT_NEGATIVE,
    "augment.max_bad_fraction": PROBABILITY,
    "mesh.fsdp": COUNT,
    "batch_size": COUNT,
    "accumulate_steps": COUNT,
    "label_smoothing": BELOW_ONE,
    "distillation.weight": PROBABILITY,
    "distillation.temperature": POSITIVE,
    "segmentation.channels": Range(2),
    "segmentation.auxiliary_weight": NOT_NEGATIVE,
    "segmentation.cat_max_ratio": Range(0, 1, open_low=True),
    "schedule.power": POSITIVE,
    "schedule.reference_batch": NOT_NEGATIVE,
    "schedule.learning_rate": NOT_NEGATIVE,
    "schedule.warmup_learning_rate": NOT_NEGATIVE,
    "schedule.min_learning_rate": NOT_NEGATIVE,
    "optimizer.b1": BELOW_ONE,
    "optimizer.b2": BELOW_ONE,
    "optimizer.eps": POSITIVE,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.layer_decay": Range(0, 1, open_low=True),
    "optimizer.clip_norm": NOT_NEGATIVE,
    "optimizer.ema_decay": BELOW_ONE,
    "eval.batch_size": COUNT,
    "eval.crop_pct": POSITIVE,
    "eval.window": NOT_NEGATIVE,
    "eval.stride": NOT_NEGATIVE,
    "checkpoint.keep": COUNT,
    "max_bad_steps": NOT_NEGATIVE,
}
# Keys of two rising numbers, each in the range.
INTERVALS: dict[str, Range] = {
    "augment.crop_scale": Range(0, 1, open_low=True),
    "augment.crop_ratio": POSITIVE,
    "segmentation.ratio_range": POSITIVE,
}
CHOICES: dict[str, tuple[str, ...]] = {
    "task": tuple(TASKS),
    "schedule.kind": ("cosine", "poly"),
    "model.attention": ATTENTIONS,
    "model.dtype": ("float32", "bfloat16"),
    "model.gradient_dtype": ("float32", "bfloat16"),
    "data.source": ("tfds", "folder", "synthetic"),
    "data.backend": ("auto", "pillow", "fast"),
    "augment.interpolation": ("random", "bilinear", "bicubic"),
    "loss": tuple(LOSSES),
    "distillation.kind": tuple(KINDS),
    "schedule.per": ("epoch", "step"),
    "optimizer.name": tuple(OPTIMIZERS),
    "eval.crop_mode": ("center", "squash"),
}
# Durations, and whether "" is allowed.
DURATIONS: dict[str, bool] = {
    "augment.mixup_off": True,
    "schedule.duration": False,
    "schedule.warmup": True,
    "schedule.cooldown": True,
    "eval.every": False,
    "checkpoint.every": False,
    "log.every": False,
    "profile": True,
}


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Returns the config as one dict of dotted keys, with values as JSON stores them."""

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
    """Returns the keys that must be the same on all hosts of a run, as `flatten` does."""
    flat = flatten(config)
    return {key: flat[key] for key in flat if not key.startswith(HOST_KEYS)}


def load_config(path: str | Path) -> ConfigDict:
    """Returns the config that the `get_config` of a file returns.

    Raises:
        UserError: when the file does not exist or is not a config.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is {kind_of(path)}, not a config file")
    if not path.exists():
        known = sorted(str(p) for p in Path("configs").glob("*.py") if p.stem != "__init__")
        hint = did_you_mean(str(path), known)
        listed = f" (known: {', '.join(known)})" if known else ""
        raise UserError(f"no config file {path}{hint}{listed}")
    try:
        return runpy.run_path(str(path))["get_config"]()
    except KeyError:
        raise UserError(f"{path} is not a config: it defines no get_config()") from None
    except SyntaxError as error:
        raise UserError(f"{path} is not a config: line {error.lineno}, {error.msg}") from None


def check_command_line(argv: Sequence[str], flag: str = "config") -> None:
    """Checks the config file and the keys that a command line names.

    Raises:
        UserError: when the file does not exist or is not a config, or a key is unknown.
    """
    paths = [arg.split("=", 1)[1] for arg in argv if re.match(rf"--?{flag}=", arg)]
    paths += [b for a, b in itertools.pairwise(argv) if re.fullmatch(rf"--?{flag}", a)]
    if not paths:
        raise UserError(f"no config: expected --{flag}=FILE, such as configs/quickstart.py")
    keys = flatten(load_config(paths[-1]))
    named = False
    for arg in argv:
        named |= bool(re.match(rf"--?{flag}(=|$)", arg))
        match = re.match(rf"--?{flag}\.([^=]+)", arg)
        if match and not named:
            raise UserError(f"--{flag}.{match[1]} stands before --{flag}=FILE: put the file first")
        if match and match[1] not in keys:
            key = match[1]
            sections = {known.rsplit(".", 1)[0] for known in keys if "." in known}
            if key in sections:
                raise UserError(
                    f"{key!r} is a section: set one of its keys, such as --{flag}.{key}.…"
                )
            last = [known for known in keys if known.split(".")[-1] == key.split(".")[-1]]
            hint = f"; did you mean {last[0]!r}?" if last else did_you_mean(key, list(keys))
            raise UserError(f"unknown config key {key!r}{hint}")


def given_keys(argv: Sequence[str], flag: str = "config") -> set[str]:
    """Returns the keys that a command line sets."""
    matches = (re.match(rf"--?{flag}\.([^=]+)", arg) for arg in argv)
    return {match[1] for match in matches if match}


def overlay(config: ConfigDict, record: Mapping[str, Any], keep: Collection[str]) -> None:
    """Sets the keys of a config to a run's record, those of `keep` excepted.

    Keys that the config does not know are left out.
    """
    known = flatten(config)
    for key, value in record.items():
        if key in known and key not in keep:
            value = tuple(value) if isinstance(value, list) else value
            value = _RENAMED_VALUES.get((key, value), value)
            config.update_from_flattened_dict({key: value})


def duration_steps(duration: str, *, steps_per_epoch: int, batch_size: int) -> int:
    """Turns "300 epochs", "20 steps" or "1_000_000 examples" into steps; "" is 0 steps.

    Epochs may be fractions. A part of a step counts as a whole one.

    Raises:
        UserError: when the text is not a duration.
    """
    if not duration:
        return 0
    match = re.fullmatch(r"([\d_]+(?:\.\d+)?) *(step|example|epoch)s?", duration)
    if not match:
        raise UserError(
            f"{duration!r} is not a duration: expected a number and a unit, "
            'such as "300 epochs", "20 steps" or "1_000_000 examples"'
        )
    number, unit = float(match[1]), match[2]
    steps = number * {"step": 1, "epoch": steps_per_epoch, "example": 1 / batch_size}[unit]
    return -int(-steps // 1)


def check_choices(config: ConfigDict) -> None:
    """Checks the values that are one of a few names.

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


def check(config: ConfigDict) -> None:
    """Checks every value that can be checked without the data and the devices.

    Raises:
        UserError: names the key, its value and what was expected.
    """
    check_choices(config)
    flat = flatten(config)
    for key, allowed in RANGES.items():
        if flat[key] not in allowed:
            raise UserError(f"config.{key} is {flat[key]}: expected {allowed}")
    for key, allowed in INTERVALS.items():
        ends = flat[key]
        if len(ends) != 2 or ends[0] > ends[1] or not all(end in allowed for end in ends):
            raise UserError(f"config.{key} is {ends}: expected two rising numbers, each {allowed}")
    for key, optional in DURATIONS.items():
        try:
            steps = duration_steps(flat[key], steps_per_epoch=1, batch_size=1)
        except UserError as error:
            raise UserError(f"config.{key}: {error}") from None
        if not steps and not optional:
            raise UserError(f"config.{key} is {flat[key]!r}: expected a duration above zero")
    _check_task(flat)
    if config.batch_size % config.accumulate_steps:
        raise UserError(
            f"config.batch_size {config.batch_size} does not divide into "
            f"config.accumulate_steps {config.accumulate_steps} equal parts"
        )
    check_group(config.augment.mixup_group, config.augment.repeats, config.batch_size)


def _check_task(flat: Mapping[str, Any]) -> None:
    """Checks that the model is of the task, and that no key is set that the task does not read."""
    task, name = flat["task"], flat["model.name"]
    if (task == "segmentation") != name.startswith(PREFIX):
        fitting = f"{PREFIX}{name}" if task == "segmentation" else name.removeprefix(PREFIX)
        raise UserError(
            f"config.task is {task!r} and config.model.name {name!r}: expected {fitting!r}, or "
            "another task"
        )
    for key, value in UNREAD[task].items():
        if flat[key] != value:
            raise UserError(
                f"config.{key} is {flat[key]!r}, which config.task={task} does not read: expected "
                f"{value!r}"
            )
    if not flat["eval.scales"] or min(flat["eval.scales"]) <= 0:
        raise UserError(f"config.eval.scales is {flat['eval.scales']}: expected numbers above 0")
    window, stride = flat["eval.window"], flat["eval.stride"]
    if (window and not (window >= 32 and 0 < stride <= window)) or (stride and not window):
        raise UserError(
            f"config.eval.window is {window} and config.eval.stride {stride}: expected a window of "
            "at least 32 pixels and a stride from 1 to the window, such as 512 and 341, or 0 and 0"
        )
    if flat["schedule.kind"] == "poly" and flat["schedule.per"] != "step":
        raise UserError(
            "config.schedule.kind is 'poly', which moves each step: expected "
            "--config.schedule.per=step"
        )
