"""The evaluation of semantic segmentation: a confusion matrix of all labelled pixels."""

from typing import Any

import jax
import jax.numpy as jnp

from mambaout_jax.data.preprocess import normalize
from mambaout_jax.inference.evaluate import Measures, Sums
from mambaout_jax.inference.segmentation import confusion, predict_labels
from mambaout_jax.inference.segmentation import results as class_means
from mambaout_jax.inference.views import slide, views


def eval_step(
    params: Any,
    batch: dict[str, jax.Array],
    *,
    model: Any,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    flip: bool = False,
    window: int = 0,
    stride: int = 0,
) -> dict[str, jax.Array]:
    """Evaluates one batch of whole images.

    Args:
        params: parameters of the model.
        batch: as `data.segmentation.whole.PaddedImages` makes it, and "mask".
        model: the network.
        mean: of R, G and B in [0, 1].
        std: of R, G and B in [0, 1].
        flip: whether the network sees each image mirrored, too.
        window: side in pixels of the windows that it sees; 0: whole images.
        stride: pixels from a window to the next.

    Returns:
        Sums over the batch, int32: "confusion" [classes, classes], the pixels of each label (row)
        that were predicted as each class, and "examples".
    """

    def apply(images: jax.Array) -> jax.Array:
        return jnp.asarray(model.apply({"params": params}, images))

    seen = views(batch, flip)
    logits = []
    for view in seen:
        images = normalize(view.image, mean, std)
        logits.append(slide(apply, images, window, stride) if window else apply(images))
    return {
        "confusion": confusion(logits, batch, seen),
        "examples": batch["mask"].sum(dtype=jnp.int32),
    }


def predict_step(
    params: Any,
    batch: dict[str, jax.Array],
    *,
    model: Any,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    shape: tuple[int, int],
) -> jax.Array:
    """Predicts the labels of one batch of whole images, at their first scale.

    Args:
        params: parameters of the model.
        batch: "image", "input_size" and "label_size", as in `eval_step`.
        model: the network.
        mean: of R, G and B in [0, 1].
        std: of R, G and B in [0, 1].
        shape: (height, width) of the result, at least the largest "label_size".

    Returns:
        int32 [N, *shape]. What is outside of "label_size" has no meaning.
    """
    logits = jnp.asarray(model.apply({"params": params}, normalize(batch["image"], mean, std)))
    return predict_labels(logits, batch, shape)


def results(sums: Sums) -> dict[str, float]:
    """Returns "miou", "macc" and "aacc" (in percent) and "examples"."""
    return {**class_means(sums["confusion"]), "examples": int(sums["examples"])}


MASKS = Measures(eval_step, results, {name: name for name in ("miou", "macc", "aacc")})
