"""Small runs on the embedded digits, in this process."""

import json
from pathlib import Path
from unittest import mock

from etils import epath

from mambaout_jax import config as configuration
from mambaout_jax.build import build_run
from mambaout_jax.runtime.preemption import StopRequest
from mambaout_jax.training import loop, step
from mambaout_jax.training.programs import compile_programs

ROOT = Path(__file__).parents[1]


SMALL = {
    "model.depthwise": "xla",
    "data.train_split": "train[:64]",
    "data.eval_split": "validation[:30]",
    "batch_size": 16,
    "eval.batch_size": 16,
    "schedule.duration": "3 epochs",
    "schedule.warmup": "1 epochs",
    "checkpoint.keep": 3,
    "log.every": "2 steps",
}


def small_config(**keys):
    """The quickstart's data and a run of four steps in each of three epochs."""
    config = configuration.load_config(ROOT / "configs/quickstart.py")
    config.update_from_flattened_dict(SMALL | keys)
    return config


_programs = {}


def compile_once(run, *arguments):
    """Compiles a config once in this process, unless a test has replaced `augment`."""
    key = json.dumps(dict(run.record), sort_keys=True), step.augment
    if key not in _programs:
        _programs[key] = compile_programs(run, *arguments)
    return _programs[key]


def train(config, workdir):
    """Trains as main.py does."""
    with StopRequest() as stop, mock.patch.object(loop, "compile_programs", compile_once):
        loop.train(build_run(config), epath.Path(workdir), stop)
