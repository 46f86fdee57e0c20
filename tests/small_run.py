"""Small runs on the embedded digits, in this process."""

from pathlib import Path

from etils import epath

from mambaout_jax import config as configuration
from mambaout_jax.build import build_run
from mambaout_jax.runtime.preemption import StopRequest
from mambaout_jax.training import loop

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


def train(config, workdir):
    """Trains as main.py does."""
    with StopRequest() as stop:
        loop.train(build_run(config), epath.Path(workdir), stop)
