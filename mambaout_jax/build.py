"""Turns a config into the typed parts of a run; nothing after it reads a config."""

import json
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mambaout_jax import config as configuration
from mambaout_jax.build_data import (
    build_eval_batches,
    build_eval_options,
    build_preprocessing,
    build_train_batches,
    fill_in,
)
from mambaout_jax.config import duration_steps
from mambaout_jax.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from mambaout_jax.errors import UserError
from mambaout_jax.models.mambaout import MambaOut, create_model
from mambaout_jax.models.mixers import DEFAULTS
from mambaout_jax.models.vit import VITS
from mambaout_jax.runtime.processes import all_or_none, check_alike
from mambaout_jax.runtime.sharding import check_batch, make_mesh
from mambaout_jax.training.optimizer import make_optimizer
from mambaout_jax.training.recipe import Recipe
from mambaout_jax.training.run import Run, Steps
from mambaout_jax.training.schedule import CosineSchedule, PolynomialSchedule, Schedule
from mambaout_jax.training.teacher import Teacher, read_teacher

logger = logging.getLogger(__name__)


def build_model(config: ConfigDict) -> MambaOut:
    """Returns the network.

    Raises:
        UserError: when it is unknown, or an option is of another kind of network.
    """
    model = config.model
    options: dict[str, Any] = {
        "token_mixer": model.token_mixer,
        "kernel_size": model.kernel_size,
        "depthwise": model.depthwise,
    }
    if config.task == "segmentation":
        options["channels"] = config.segmentation.channels
        if config.optimizer.layer_decay != 1:
            raise UserError(
                f"config.optimizer.layer_decay is for classification: {model.name} needs 1"
            )
    if model.name in VITS:
        defaults = {**DEFAULTS, "depthwise": "auto"}
        if changed := [key for key in options if options[key] != defaults[key]]:
            raise UserError(
                f"config.model.{changed[0]} is {options[changed[0]]!r}, an option of MambaOut, and "
                f"{model.name} is a ViT: leave it out"
            )
        options = {"attention": model.attention, "image_size": config.data.image_size}
    elif model.attention != DEFAULTS["attention"]:
        raise UserError(
            f"config.model.attention is {model.attention!r}, and {model.name} has no attention: "
            f"expected one of {', '.join(VITS)}, or leave it out"
        )
    return create_model(
        model.name,
        num_classes=config.data.num_classes,
        drop_path_rate=config.model.drop_path_rate,
        head_dropout_rate=config.model.head_dropout_rate,
        dtype=jnp.dtype(config.model.dtype),
        gradient_dtype=jnp.dtype(config.model.gradient_dtype),
        remat=config.model.remat,
        **options,
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


def rate_scale(config: ConfigDict) -> float:
    """Returns the factor of the learning rates, by the batch size over `schedule.reference_batch`.

    It is the ratio's square root for adamw and lamb, else the ratio, as timm has it.
    """
    if not config.schedule.reference_batch:
        return 1.0
    ratio = config.batch_size / config.schedule.reference_batch
    return ratio**0.5 if config.optimizer.name in ("adamw", "lamb") else ratio


def build_schedule(config: ConfigDict, steps_per_epoch: int) -> Schedule:
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
    scale = rate_scale(config)
    common = {
        "peak": scale * schedule.learning_rate,
        "start": scale * schedule.warmup_learning_rate,
        "end": scale * schedule.min_learning_rate,
        "duration": duration,
        "warmup": warmup,
    }
    if schedule.kind == "poly":
        return PolynomialSchedule(**common, power=schedule.power)
    return CosineSchedule(**common, tick=steps_per_epoch if schedule.per == "epoch" else 1)


def build_optimizer(config: ConfigDict, schedule: Schedule) -> optax.GradientTransformation:
    """Returns the optimizer."""
    optimizer = config.optimizer
    return make_optimizer(
        schedule,
        name=optimizer.name,
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
        loss=config.loss,
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
        task=config.task,
        distillation=config.distillation.kind,
        distillation_weight=config.distillation.weight,
        distillation_temperature=config.distillation.temperature,
        auxiliary_weight=config.segmentation.auxiliary_weight,
    )


def build_teacher(config: ConfigDict, classes: Sequence[str], mesh: Mesh) -> Teacher | None:
    """Returns the teacher of a distillation, None without one; `classes` are the data's.

    Raises:
        UserError: see `read_teacher`.
    """
    if not config.distillation.teacher:
        return None
    return read_teacher(
        config.distillation.teacher,
        classes=classes,
        image_size=config.data.image_size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        dtype=config.model.dtype,
        device=mesh.devices.flat[0],
    )


def build_run(config: ConfigDict) -> Run:
    """Builds a run from its config, which `fill_in` changes; writes nothing.

    Raises:
        UserError: names what is wrong in the config, the data or the devices, or what differs
            between the hosts.
    """
    with all_or_none():
        fill_in(config)
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
        eval_options=build_eval_options(config),
        preprocessing=build_preprocessing(config),
        image_size=(config.data.image_size,) * 2,
        model=build_model(config),
        model_name=config.model.name,
        schedule=schedule,
        optimizer=build_optimizer(config, schedule),
        recipe=build_recipe(config, steps_per_epoch),
        teacher=build_teacher(config, batches.class_names, mesh),
        steps=build_steps(config, steps_per_epoch),
        init_from=config.init_from,
        keep_checkpoints=config.checkpoint.keep,
        max_bad_steps=config.max_bad_steps,
        wandb_project=config.log.wandb_project,
        record=configuration.flatten(config),
        free_keys=configuration.FREE_KEYS,
        added_keys=configuration.ADDED_KEYS,
    )
