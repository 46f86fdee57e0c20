"""Classification: mixed images and their targets, and the loss of logits."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from mambaout_jax.training import distillation
from mambaout_jax.training.mixing import Mixing, augment_batch
from mambaout_jax.training.recipe import Batch, Recipe


def bce(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the binary cross entropy of each example, the mean over classes.

    Source: timm's `BinaryCrossEntropy` without a threshold.

    Args:
        logits: float32 [N, classes].
        targets: [N, classes], from 0 to 1.
    """
    return optax.sigmoid_binary_cross_entropy(logits, targets).mean(axis=-1)


# Functions of logits and targets [N, classes] to losses [N].
LOSSES: dict[str, Callable[[Any, Any], jax.Array]] = {
    "softmax": optax.softmax_cross_entropy,
    "bce": bce,
}


def augment(key: jax.Array, step: jax.Array, batch: Batch, recipe: Recipe) -> Batch:
    """Turns uint8 images and labels into mixed float32 images and targets [N, classes]."""
    mixing = Mixing(
        num_classes=recipe.num_classes,
        smoothing=recipe.label_smoothing,
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        prob=recipe.mixup_prob,
        switch_prob=recipe.mixup_switch_prob,
        group=recipe.mixup_group,
        repeats=recipe.repeats,
    )
    images, targets = augment_batch(
        key,
        batch["image"],
        batch["label"],
        mixing,
        mean=recipe.mean,
        std=recipe.std,
        erasing=recipe.random_erasing,
        enabled=step < recipe.mixup_off_step if recipe.mixup_off_step else True,
    )
    return {"image": images, "target": targets}


def loss(logits: jax.Array, inputs: Batch, recipe: Recipe) -> jax.Array:
    """Returns the mean loss of logits [N, classes].

    Args:
        logits: float32 [N, classes].
        inputs: "target" [N, classes]; with a teacher also its logits, "teacher" [N, classes].
        recipe: the choice of the losses, and their weight.
    """
    own = LOSSES[recipe.loss](logits, inputs["target"]).mean()
    if "teacher" not in inputs:
        return own
    kind, weight = distillation.KINDS[recipe.distillation], recipe.distillation_weight
    taught = kind(logits, inputs["teacher"], recipe.distillation_temperature).mean()
    return (1 - weight) * own + weight * taught
