"""A class activation map: which positions of an image support a class.

The map is HiResCAM (Draelos and Carin, 2020): gradient times activation, summed over channels, here
without the cut at zero. It is each position's first-order contribution to the class's logit when
the activations of a stage are scaled. The original class activation map (Zhou et al., 2016) needs a
head of one dense layer after the mean over positions; this head is an MLP.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mambaout_jax.models.mambaout import MambaOut

_MIN_SIDE = 7  # positions; the last stage has 7 x 7 at 224 pixels


@functools.partial(jax.jit, static_argnames="model")
def class_activation_map(
    params: Any, images: jax.Array, classes: jax.Array, *, model: MambaOut
) -> jax.Array:
    """Computes each position's contribution to the logit of a class.

    The map is of the last stage with at least 7 x 7 positions: at 224 pixels of the last stage, at
    32 pixels of the first, 8 x 8.

    Args:
        params: the network's weights.
        images: normalised, [N, H, W, 3].
        classes: one for each image, int [N].
        model: the network, with a head.

    Returns:
        float32 [N, h, w], the height and width of the stage; negative where a position lowers the
        logit.
    """
    variables = {"params": params}
    maps = model.apply(variables, images, method="features")
    level = max((i for i, x in enumerate(maps) if min(x.shape[1:3]) >= _MIN_SIDE), default=0)

    def rest(network: MambaOut, x: jax.Array) -> jax.Array:
        for stage in network.stages[level + 1 :]:
            x = stage(x)
        return network.head(x)

    def logit(features: jax.Array) -> jax.Array:
        logits = jnp.asarray(model.apply(variables, features, method=rest))
        return jnp.take_along_axis(logits, classes[:, None], axis=1).sum()

    features = maps[level]
    return jnp.sum(jax.grad(logit)(features) * features, axis=-1).astype(jnp.float32)


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Blends an image with the positive part of a map, in colours from dark to bright.

    Args:
        image: uint8 [H, W, 3].
        heat: float [h, w].

    Returns:
        uint8 [H, W, 3].
    """
    import matplotlib
    from PIL import Image

    height, width = image.shape[:2]
    heat = np.maximum(heat, 0) / max(float(heat.max()), 1e-12)
    resized = Image.fromarray(heat.astype(np.float32)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    strength = np.clip(np.asarray(resized), 0, 1)
    colours = matplotlib.colormaps["inferno"](strength)[..., :3] * 255
    return (0.5 * image + 0.5 * colours).astype(np.uint8)
