"""What a configuration stands for: the model, the recipe of a step, the evaluation's pixels."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from mambaout_jax.config import duration_steps
from mambaout_jax.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from mambaout_jax.models.mambaout import MambaOut, create_model
from mambaout_jax.training.step import Recipe


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
