"""Semantic segmentation: normalised images, and the loss of the two heads' logits."""

import jax
import jax.numpy as jnp
import optax

from mambaout_jax.data.preprocess import normalize
from mambaout_jax.data.segmentation.masks import IGNORED
from mambaout_jax.models.upernet import resize
from mambaout_jax.training.recipe import Batch, Recipe


def augment(key: jax.Array, step: jax.Array, batch: Batch, recipe: Recipe) -> Batch:
    """Normalises the images. All else is done by the loader, on images and masks together."""
    del key, step
    images = normalize(batch["image"], recipe.mean, recipe.std)
    return {"image": images, "label": batch["label"]}


def loss(outputs: tuple[jax.Array, jax.Array], inputs: Batch, recipe: Recipe) -> jax.Array:
    """Returns the loss of the decode head plus a fraction of the auxiliary head's.

    Args:
        outputs: logits of the decode head and of the auxiliary head, [N, h, w, classes].
        inputs: "label" uint8 [N, H, W].
        recipe: `auxiliary_weight` is the fraction.
    """
    main, auxiliary = (cross_entropy(logits, inputs["label"]) for logits in outputs)
    return main + recipe.auxiliary_weight * auxiliary


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean cross entropy over all pixels, in which an ignored pixel counts as 0.

    The logits [N, h, w, classes] are resized to the labels [N, H, W]. Ignored pixels are in the
    denominator, as by default in mmsegmentation (`avg_non_ignore=False`), so that each pixel has
    the same weight in whatever batch it comes.
    """
    counted = labels != IGNORED
    logits = resize(logits, labels.shape[1:])
    classes = jnp.where(counted, labels, 0).astype(jnp.int32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, classes)
    return jnp.where(counted, losses, 0).mean()
