"""Writes the checkpoints of tests/checkpoints: a converted one, and a step of a run.

PYTHONPATH=. python tests/make_checkpoints.py tests/checkpoints

The directories are named for their format. They are never written again: when the format changes,
this script writes those of the new one, and all of them stay readable.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import golden
import jax
import jax.numpy as jnp
from etils import epath

from mambaout_jax.data.preprocess import Preprocessing
from mambaout_jax.training import checkpoint
from mambaout_jax.training.optimizer import make_optimizer
from mambaout_jax.training.state import TrainState
from mambaout_jax.weights.info import FORMAT, WeightsInfo
from mambaout_jax.weights.store import save_weights

STEP = 3
INFO = WeightsInfo(
    model="test_mambaout",
    num_classes=3,
    preprocessing=Preprocessing(size=(32, 48), crop_pct=0.9, crop_mode="squash"),
    overrides={"depths": (1, 1, 1, 1), "widths": (4, 6, 8, 12)},
    class_names=("ant", "bee", "cat"),
    source="tests/make_checkpoints.py",
    metrics={"top1": 12.5},
)


def params(seed: int) -> dict[str, Any]:
    """Returns parameters that numpy's legacy generator makes."""
    return golden.params(INFO.create_model(), seed)


def state() -> TrainState:
    """Returns a run's state: parameters of seed 0, their average of seed 1, and one update."""
    current, average = params(0), params(1)
    optimizer = make_optimizer(lambda step: 1e-3)
    _, opt_state = optimizer.update(average, optimizer.init(current), current)
    return TrainState(
        step=jnp.asarray(STEP, jnp.int32),
        params=jax.tree.map(jnp.asarray, current),
        opt_state=opt_state,
        ema_params=jax.tree.map(jnp.asarray, average),
    )


def main(directory: Path) -> None:
    """Writes both checkpoints."""
    save_weights(directory / f"converted-{FORMAT}", params(0), INFO)
    run = state()
    info = dataclasses.replace(INFO, averaged=True)
    workdir = epath.Path(directory / f"run-{FORMAT}")
    with checkpoint.open_checkpoints(workdir, keep=1) as manager:
        data = {"batches": {"step": STEP}}
        checkpoint.save(manager, run, data, info, INFO.metrics)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
