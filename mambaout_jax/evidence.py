"""What a class rests on: a heat map over the picture.

The head sees the last stage's map through its mean over positions alone, so the gradient of a
logit is the same at every position, and gradient times activation, summed over channels (Grad-CAM,
Selvaraju et al. 2017, without its cut at zero), is each position's part in the first-order change
of the logit. A class activation map proper is impossible: an MLP, not one dense layer, follows the
mean.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mambaout_jax.models.mambaout import MambaOut


@functools.partial(jax.jit, static_argnames="model")
def evidence_map(
    params: Any, images: jax.Array, classes: jax.Array, *, model: MambaOut
) -> jax.Array:
    """Computes each position's part in a class' logit.

    Args:
        params: the network's weights.
        images: normalised, [N, H, W, 3].
        classes: one for each image, int [N].
        model: the network, with a head.

    Returns:
        float32 [N, ceil(H / 32), ceil(W / 32)]; negative where a position speaks against the class.
    """
    variables = {"params": params}
    features = model.apply(variables, images, method="features")[-1]

    def logit(features: jax.Array) -> jax.Array:
        logits = jnp.asarray(model.apply(variables, features, method=lambda net, x: net.head(x)))
        return jnp.take_along_axis(logits, classes[:, None], axis=1).sum()

    return jnp.sum(jax.grad(logit)(features) * features, axis=-1).astype(jnp.float32)


def overlay(picture: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Paints the positive part of a heat map over a picture, dark to bright.

    Args:
        picture: uint8 [H, W, 3].
        heat: float [h, w].

    Returns:
        uint8 [H, W, 3].
    """
    import matplotlib
    from PIL import Image

    height, width = picture.shape[:2]
    heat = np.maximum(heat, 0) / max(float(heat.max()), 1e-12)
    fine = Image.fromarray(heat.astype(np.float32)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    strength = np.clip(np.asarray(fine), 0, 1)
    colours = matplotlib.colormaps["inferno"](strength)[..., :3] * 255
    return (0.5 * picture + 0.5 * colours).astype(np.uint8)
