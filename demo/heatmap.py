"""What a class rests on: a heat map over the picture.

The map is gradient times activation, summed over channels (Grad-CAM, Selvaraju et al. 2017, with
the gradient at each position and without the cut at zero): each position's part in the first-order
change of the class' logit when a stage's activations are scaled. A class activation map proper is
impossible: an MLP, not one dense layer, follows the mean over positions.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mambaout_jax.models.mambaout import MambaOut

_FINE_ENOUGH = 7  # positions a side, which the last stage has at 224 pixels


@functools.partial(jax.jit, static_argnames="model")
def evidence_map(
    params: Any, images: jax.Array, classes: jax.Array, *, model: MambaOut
) -> jax.Array:
    """Computes each position's part in a class' logit.

    The last stage is asked or, where the images are too small for 7 x 7 positions there, the last
    one that has them: at 224 pixels the map is the last stage's, at 32 the first one's, 8 x 8.

    Args:
        params: the network's weights.
        images: normalised, [N, H, W, 3].
        classes: one for each image, int [N].
        model: the network, with a head.

    Returns:
        float32 [N, h, w], the stage's height and width; negative where a position speaks against
        the class.
    """
    variables = {"params": params}
    maps = model.apply(variables, images, method="features")
    level = max((i for i, x in enumerate(maps) if min(x.shape[1:3]) >= _FINE_ENOUGH), default=0)

    def rest(network: MambaOut, x: jax.Array) -> jax.Array:
        for stage in network.stages[level + 1 :]:
            x = stage(x)
        return network.head(x)

    def logit(features: jax.Array) -> jax.Array:
        logits = jnp.asarray(model.apply(variables, features, method=rest))
        return jnp.take_along_axis(logits, classes[:, None], axis=1).sum()

    features = maps[level]
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
