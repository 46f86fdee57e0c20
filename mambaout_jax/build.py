"""Turns a config into the typed parts of a run; nothing after it reads a config."""

import json
import logging
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath
from ml_collections import ConfigDict

from mambaout_jax import config as configuration
from mambaout_jax.bucket import absolute
from mambaout_jax.config import duration_steps
from mambaout_jax.data.augment import Augmentation
from mambaout_jax.data.loader import EvalBatches, LoaderOptions, TrainBatches
from mambaout_jax.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from mambaout_jax.data.sources import Dataset, open_source
from mambaout_jax.errors import UserError
from mambaout_jax.files import write_json
from mambaout_jax.inference.evaluate import describe
from mambaout_jax.inference.evaluate_weights import evaluate_weights
from mambaout_jax.models.mambaout import MambaOut, create_model
from mambaout_jax.runtime.processes import all_or_none, check_alike
from mambaout_jax.runtime.sharding import check_batch, make_mesh
from mambaout_jax.runtime.workdir import RECORD, read_record
from mambaout_jax.training.optimizer import make_optimizer
from mambaout_jax.training.run import Run, Steps
from mambaout_jax.training.schedule import CosineSchedule
from mambaout_jax.training.step import Recipe
from mambaout_jax.weights.load import read_weights

logger = logging.getLogger(__name__)


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
        gradient_dtype=jnp.dtype(config.model.gradient_dtype),
        remat=config.model.remat,
        depthwise=config.model.depthwise,
    )


def build_preprocessing(config: ConfigDict) -> Preprocessing:
    """Returns how evaluation prepares its images."""
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
    """Returns the processes and threads that load images."""
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


def steps_of(config: ConfigDict, key: str, steps_per_epoch: int) -> int:
    """Returns the duration at a key of the config in steps."""
    section, name = f".{key}".rsplit(".", 1)
    durations = config[section[1:]] if section else config
    return duration_steps(
        durations[name], steps_per_epoch=steps_per_epoch, batch_size=config.batch_size
    )


def build_steps(config: ConfigDict, steps_per_epoch: int) -> Steps:
    """Returns the durations of a run, in steps."""
    in_steps = {
        key: steps_of(config, key, steps_per_epoch)
        for key in (
            "schedule.duration",
            "schedule.cooldown",
            "eval.every",
            "checkpoint.every",
            "log.every",
            "profile",
        )
    }
    return Steps(
        per_epoch=steps_per_epoch,
        total=in_steps["schedule.duration"] + in_steps["schedule.cooldown"],
        evaluate_every=in_steps["eval.every"],
        save_every=in_steps["checkpoint.every"],
        log_every=in_steps["log.every"],
        profile=in_steps["profile"],
    )


def build_schedule(config: ConfigDict, steps_per_epoch: int) -> CosineSchedule:
    """Returns the learning rate as a function of the step.

    Raises:
        UserError: when the warmup is as long as the run, or the rate moves by epochs and the warmup
            does not end with one.
    """
    schedule = config.schedule
    duration = steps_of(config, "schedule.duration", steps_per_epoch)
    warmup = steps_of(config, "schedule.warmup", steps_per_epoch)
    if warmup >= duration:
        raise UserError(
            f"config.schedule.warmup is {schedule.warmup!r} and config.schedule.duration "
            f"{schedule.duration!r}: expected a shorter warmup, such as "
            "--config.schedule.warmup='' for none"
        )
    if schedule.per == "epoch" and warmup % steps_per_epoch:
        raise UserError(
            f"config.schedule.warmup is {schedule.warmup!r}, {warmup / steps_per_epoch:.2f} "
            "epochs, and the learning rate moves once an epoch: expected whole epochs, or "
            "--config.schedule.per=step"
        )
    return CosineSchedule(
        peak=schedule.learning_rate,
        start=schedule.warmup_learning_rate,
        end=schedule.min_learning_rate,
        duration=duration,
        warmup=warmup,
        tick=steps_per_epoch if schedule.per == "epoch" else 1,
    )


def build_optimizer(config: ConfigDict, schedule: CosineSchedule) -> optax.GradientTransformation:
    """Returns the optimizer."""
    optimizer = config.optimizer
    return make_optimizer(
        schedule,
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        layer_decay=optimizer.layer_decay,
        clip_norm=optimizer.clip_norm,
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
        mixup_off_step=steps_of(config, "augment.mixup_off", steps_per_epoch),
        mixup_group=augment.mixup_group,
        repeats=augment.repeats,
        accumulate_steps=config.accumulate_steps,
        ema_decay=config.optimizer.ema_decay,
    )


def build_run(config: ConfigDict) -> Run:
    """Builds a run from its config; writes nothing.

    Raises:
        UserError: names what is wrong in the config, the data or the devices, or what differs
            between the hosts.
    """
    check_alike(config=json.dumps(configuration.shared(config), sort_keys=True))
    with all_or_none():
        return _build_run(config)


def _build_run(config: ConfigDict) -> Run:
    configuration.check(config)
    mesh = make_mesh(config.mesh.fsdp)
    check_batch(config.batch_size, config.accumulate_steps, mesh, "batch_size")
    check_batch(config.eval.batch_size, 1, mesh, "eval.batch_size")
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    batches = build_train_batches(config, **process)
    steps_per_epoch = batches.steps_per_epoch
    schedule = build_schedule(config, steps_per_epoch)
    return Run(
        seed=config.seed,
        mesh=mesh,
        batches=batches,
        batch_size=config.batch_size,
        eval_batches=build_eval_batches(config, **process),
        eval_batch_size=config.eval.batch_size,
        preprocessing=build_preprocessing(config),
        model=build_model(config),
        model_name=config.model.name,
        schedule=schedule,
        optimizer=build_optimizer(config, schedule),
        recipe=build_recipe(config, steps_per_epoch),
        steps=build_steps(config, steps_per_epoch),
        init_from=config.init_from,
        keep_checkpoints=config.checkpoint.keep,
        max_bad_steps=config.max_bad_steps,
        wandb_project=config.log.wandb_project,
        record=configuration.flatten(config),
        free_keys=configuration.FREE_KEYS,
        added_keys=configuration.ADDED_KEYS,
    )


def evaluate_workdir(
    config: ConfigDict, workdir: epath.Path, given: Collection[str] = ()
) -> dict[str, Any]:
    """Evaluates `config.init_from`, or the best checkpoint of the workdir, on the evaluation split.

    A workdir with a run is evaluated with the run's own config, but for the keys that the command
    line sets, and `init_from`. The result is logged and written to WORKDIR/eval.json.

    Args:
        config: of the command line.
        workdir: of a run, or a new one for the result.
        given: the keys that the command line sets.

    Raises:
        UserError: when the weights do not fit the config, or the config, the data or an image is
            wrong.
    """
    workdir = absolute(workdir)
    with all_or_none():
        if (workdir / RECORD).exists():
            configuration.overlay(config, read_record(workdir), {*given, "init_from"})
    check_alike(config=json.dumps(configuration.shared(config), sort_keys=True))
    configuration.check(config)
    weights = str(config.init_from or workdir)
    preprocessing = build_preprocessing(config)
    with all_or_none():
        check_batch(config.eval.batch_size, 1, make_mesh(), "eval.batch_size")
        params, info = read_weights(weights)
        for key, ours, theirs in (
            ("model.name", config.model.name, info.model),
            ("data.num_classes", config.data.num_classes, info.num_classes),
        ):
            if ours != theirs:
                raise UserError(f"config.{key} is {ours!r}, but the weights have {theirs!r}")
        source = open_source(build_dataset(config), config.data.eval_split)
    if preprocessing != info.preprocessing:
        logger.warning("evaluating with %s; the weights' is %s", preprocessing, info.preprocessing)
    evaluation = evaluate_weights(
        params,
        info,
        source,
        preprocessing=preprocessing,
        batch_size=config.eval.batch_size,
        loader=build_loader_options(config),
        dtype=config.model.dtype,
    )
    results = evaluation.results
    report = {
        "weights": weights,
        "model": info.model,
        "data": source.name,
        "loss": results["loss"],
        "top1": results["top1"],
        "top5": results.get("top5"),
        "examples": results["examples"],
        "image_size": config.data.image_size,
        "crop_pct": config.eval.crop_pct,
        "crop_mode": config.eval.crop_mode,
        "dtype": config.model.dtype,
    }
    logger.info(
        "%s on %s: %s, loss %.4f over %d images",
        *(weights, source.name, describe(results, digits=3)),
        *(results["loss"], results["examples"]),
    )
    if jax.process_index() == 0:
        write_json(workdir / "eval.json", report)
    return report
