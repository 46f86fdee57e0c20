"""Linear resizes as matrices, also where each image of a batch has its own size."""

import jax
import jax.numpy as jnp


def resizes(
    start: jax.Array | int,
    count: int,
    inputs: jax.Array,
    outputs: jax.Array,
    length: int,
    mirrored: jax.Array | bool = False,
) -> jax.Array:
    """Returns, for each image, the matrix of a linear resize from `inputs` to `outputs` pixels.

    Its rows are the output pixels from `start` on, [N, count, length]: align_corners=False, without
    antialiasing. With `mirrored` the input is read from its end.
    """
    scale = inputs / jnp.maximum(outputs, 1)
    last = jnp.maximum(inputs - 1, 0)[:, None]
    place = (jnp.arange(count) + start + 0.5)[None] * scale[:, None] - 0.5
    place = jnp.clip(place, 0, last)
    place = jnp.where(mirrored, last - place, place)
    return jnp.maximum(1 - jnp.abs(place[:, :, None] - jnp.arange(length)[None, None]), 0)


def resize_matrix(outputs: int, inputs: int) -> jax.Array:
    """Returns the matrix of a linear resize, [outputs, inputs]."""
    sizes = jnp.array([inputs]), jnp.array([outputs])
    return resizes(0, outputs, *sizes, inputs)[0]


def product(equation: str, *factors: jax.Array) -> jax.Array:
    """Returns an einsum in float32, on a TPU too."""
    return jnp.einsum(equation, *factors, precision=jax.lax.Precision.HIGHEST)
