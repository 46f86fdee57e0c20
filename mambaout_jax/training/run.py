"""A run: its parts, built from a config, and its position between two steps."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from mambaout_jax.data.loader import EvalBatches, TrainBatches
from mambaout_jax.data.preprocess import Preprocessing
from mambaout_jax.models.mambaout import MambaOut
from mambaout_jax.models.mixers import mixer_options
from mambaout_jax.training.metrics import LossMeter
from mambaout_jax.training.recipe import Recipe
from mambaout_jax.training.recorder import Row
from mambaout_jax.training.schedule import Schedule
from mambaout_jax.training.state import TrainState, init_params, init_state
from mambaout_jax.training.task import TASKS, Task
from mambaout_jax.training.teacher import Teacher
from mambaout_jax.weights.info import WeightsInfo


@dataclasses.dataclass(frozen=True)
class Steps:
    """The durations of a run, in steps; `profile` 0 is none."""

    per_epoch: int
    total: int
    evaluate_every: int
    save_every: int
    log_every: int
    profile: int


@dataclasses.dataclass(frozen=True)
class Run:
    """All that a run is made of, before it has a state or a workdir.

    Attributes:
        seed: of every draw.
        mesh: of the devices.
        batches: of training, of `batch_size` examples over all processes.
        batch_size: examples in a step.
        eval_batches: of evaluation, of `eval_batch_size` examples over all processes.
        eval_batch_size: examples in a step of evaluation.
        eval_options: of the task's step of evaluation.
        preprocessing: of evaluation's images.
        image_size: (height, width) of training's.
        model: the network.
        model_name: its variant.
        schedule: the learning rate.
        optimizer: what turns gradients into updates.
        recipe: the rest of a step.
        teacher: of a distillation.
        steps: durations.
        init_from: weights to start from, as `read_weights` takes them; "": none.
        keep_checkpoints: how many of the newest are kept.
        max_bad_steps: skipped steps in a row that do not stop the run.
        wandb_project: of Weights & Biases; "": none.
        record: the config, as the workdir keeps it.
        free_keys: prefixes of the keys of `record` that a resumed run may change.
        added_keys: keys that older runs lack, and the value that they ran with.
    """

    seed: int
    mesh: Mesh
    batches: TrainBatches
    batch_size: int
    eval_batches: EvalBatches
    eval_batch_size: int
    eval_options: Mapping[str, Any]
    preprocessing: Preprocessing
    image_size: tuple[int, int]
    model: MambaOut
    model_name: str
    schedule: Schedule
    optimizer: optax.GradientTransformation
    recipe: Recipe
    teacher: Teacher | None
    steps: Steps
    init_from: str
    keep_checkpoints: int
    max_bad_steps: int
    wandb_project: str
    record: Mapping[str, Any]
    free_keys: Sequence[str]
    added_keys: Mapping[str, Any]

    @property
    def task(self) -> Task:
        """What the run learns."""
        return TASKS[self.recipe.task]

    def initial_state(self, key: jax.Array, params: Any = None) -> TrainState:
        """Returns the state before the first step, with new parameters or these. Traceable."""
        if params is None:
            params = init_params(key, self.model, self.image_size)
        return init_state(params, self.optimizer, ema=self.recipe.ema_decay > 0)

    def weights_info(self, results: Mapping[str, float] | None = None) -> WeightsInfo:
        """Returns the description of the weights for a checkpoint."""
        return WeightsInfo(
            model=self.model_name,
            num_classes=self.recipe.num_classes,
            preprocessing=self.preprocessing,
            overrides=mixer_options(self.model),
            class_names=tuple(self.batches.class_names),
            source="mambaout_jax",
            averaged=self.recipe.ema_decay > 0,
            metrics=dict(results or {}),
        )


@dataclasses.dataclass
class Position:
    """The position of a run: everything that its next steps depend on.

    `evaluated` is False where a run was stopped before the evaluation that is due at its step.
    """

    step: int
    state: TrainState
    losses: LossMeter
    rows: Sequence[Row]
    evaluated: bool = True

    def data(self, run: Run) -> dict[str, Any]:
        """Returns what a checkpoint stores besides the state, as JSON."""
        return {
            "batches": run.batches.state() | {"step": self.step},  # more batches are made ahead
            "losses": self.losses.state(),
            "rows": list(self.rows),
            "evaluated": self.evaluated,
            "world": world(),
        }


def world() -> str:
    """Returns how many devices and processes there are, in words."""
    return f"{jax.device_count()} devices in {jax.process_count()} processes"
