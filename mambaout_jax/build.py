"""What a configuration stands for: the model, the data, the recipe of a step, the whole run."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mambaout_jax import config as configuration
from mambaout_jax.config import duration_steps
from mambaout_jax.data.augment import Augmentation
from mambaout_jax.data.loader import EvalBatches, LoaderOptions, TrainBatches
from mambaout_jax.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from mambaout_jax.data.sources import Dataset
from mambaout_jax.errors import UserError
from mambaout_jax.models.mambaout import MambaOut, create_model
from mambaout_jax.runtime.sharding import check_batch, make_mesh
from mambaout_jax.training.optimizer import make_optimizer
from mambaout_jax.training.schedule import make_schedule, schedule_steps
from mambaout_jax.training.state import TrainState, init_params, init_state
from mambaout_jax.training.step import Recipe
from mambaout_jax.weights.store import WeightsInfo


def build_model(config: ConfigDict) -> MambaOut:
    """Returns the network.

    Raises:
        UserError: when it is unknown.
    """
    return create_model(
        config.model.name,
        num_classes=config.data.num_classes,
        drop_path_rate=config.model.drop_path_rate,
        head_dropout_rate=config.model.head_dropout_rate,
        dtype=jnp.dtype(config.model.dtype),
        remat=config.model.remat,
        depthwise=config.model.depthwise,
    )


def build_preprocessing(config: ConfigDict) -> Preprocessing:
    """Returns how evaluation makes its pixels."""
    return Preprocessing(
        size=config.data.image_size,
        crop_pct=config.eval.crop_pct,
        crop_mode=config.eval.crop_mode,
        interpolation="bicubic",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def build_dataset(config: ConfigDict) -> Dataset:
    """Returns which dataset to read."""
    return Dataset(
        kind=config.data.source,
        name=config.data.name,
        directory=config.data.dir,
        train_split=config.data.train_split,
        eval_split=config.data.eval_split,
        num_classes=config.data.num_classes,
    )


def build_augmentation(config: ConfigDict) -> Augmentation:
    """Returns how training images are augmented on the host."""
    augment = config.augment
    return Augmentation(
        image_size=config.data.image_size,
        crop_scale=tuple(augment.crop_scale),
        crop_ratio=tuple(augment.crop_ratio),
        interpolation=augment.interpolation,
        hflip=augment.hflip,
        policy=augment.policy,
        color_jitter=augment.color_jitter,
    )


def build_loader_options(config: ConfigDict) -> LoaderOptions:
    """Returns how fast images are made."""
    data = config.data
    return LoaderOptions(workers=data.workers, threads=data.threads, backend=data.backend)


def build_train_batches(
    config: ConfigDict, *, process_index: int = 0, process_count: int = 1, start_step: int = 0
) -> TrainBatches:
    """Returns the training batches of one process.

    Raises:
        UserError: see `TrainBatches`.
    """
    return TrainBatches(
        build_dataset(config),
        build_augmentation(config),
        batch_size=config.batch_size,
        seed=config.seed,
        repeats=config.augment.repeats,
        max_bad_fraction=config.augment.max_bad_fraction,
        loader=build_loader_options(config),
        process_index=process_index,
        process_count=process_count,
        start_step=start_step,
    )


def build_eval_batches(
    config: ConfigDict, *, process_index: int = 0, process_count: int = 1
) -> EvalBatches:
    """Returns the evaluation batches of one process.

    Raises:
        UserError: see `EvalBatches`.
    """
    return EvalBatches(
        build_dataset(config),
        build_preprocessing(config),
        batch_size=config.eval.batch_size,
        loader=build_loader_options(config),
        process_index=process_index,
        process_count=process_count,
    )


def build_recipe(config: ConfigDict, steps_per_epoch: int) -> Recipe:
    """Returns what a step does besides the model and the optimizer."""
    augment = config.augment
    return Recipe(
        num_classes=config.data.num_classes,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        label_smoothing=config.label_smoothing,
        random_erasing=augment.random_erasing,
        mixup=augment.mixup,
        cutmix=augment.cutmix,
        mixup_prob=augment.mixup_prob,
        mixup_switch_prob=augment.mixup_switch_prob,
        mixup_off_step=duration_steps(
            augment.mixup_off, steps_per_epoch=steps_per_epoch, batch_size=config.batch_size
        ),
        accumulate_steps=config.accumulate_steps,
        ema_decay=config.optimizer.ema_decay,
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """All that a run is made of, before it has a state or a workdir."""

    config: ConfigDict
    mesh: Mesh
    batches: TrainBatches
    eval_batches: EvalBatches
    model: MambaOut
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    recipe: Recipe
    total_steps: int

    def every(self, duration: str) -> int:
        """Turns a duration of the configuration into steps."""
        return duration_steps(
            duration,
            steps_per_epoch=self.batches.steps_per_epoch,
            batch_size=self.config.batch_size,
        )

    def initial_state(self, key: jax.Array, params: Any = None) -> TrainState:
        """Returns the state before the first step, with new parameters or these. Traceable."""
        if params is None:
            params = init_params(key, self.model, self.config.data.image_size)
        return init_state(params, self.optimizer, ema=self.config.optimizer.ema_decay > 0)


def build_run(config: ConfigDict) -> Run:
    """Builds a run from its configuration; writes nothing.

    Raises:
        UserError: names what is amiss in the configuration, the data or the devices.
    """
    configuration.check(config)
    mesh = make_mesh(config.mesh.fsdp)
    check_batch(config.batch_size, config.accumulate_steps, mesh, "batch_size")
    check_batch(config.eval.batch_size, 1, mesh, "eval.batch_size")
    model = build_model(config)
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    batches = build_train_batches(config, **process)
    if not batches.steps_per_epoch:
        raise UserError(
            f"config.batch_size {config.batch_size} is more than the "
            f"{batches.num_examples} training examples: choose a smaller one"
        )
    schedule = make_schedule(config, batches.steps_per_epoch)
    _, _, total_steps = schedule_steps(config, batches.steps_per_epoch)
    return Run(
        config=config,
        mesh=mesh,
        batches=batches,
        eval_batches=build_eval_batches(config, **process),
        model=model,
        schedule=schedule,
        optimizer=make_optimizer(config, schedule),
        recipe=build_recipe(config, batches.steps_per_epoch),
        total_steps=total_steps,
    )


def weights_info(run: Run, results: dict[str, float] | None) -> WeightsInfo:
    """Returns what a checkpoint says of its weights."""
    return WeightsInfo(
        model=run.config.model.name,
        num_classes=run.config.data.num_classes,
        preprocessing=build_preprocessing(run.config),
        class_names=tuple(run.batches.class_names),
        source="mambaout_jax",
        averaged=run.config.optimizer.ema_decay > 0,
        metrics=results or {},
    )
