"""LayerNorm and its gradient in JAX operations: the reference, for every platform."""

import jax
import jax.numpy as jnp
from jax import lax


def normalise(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float, dtype: jnp.dtype
) -> jax.Array:
    """Returns the normalised x [..., C], with scale and bias [C]."""
    normalised, _ = _normalise(x, epsilon)
    return (normalised * _per_channel(scale, x) + _per_channel(bias, x)).astype(dtype)


def gradient(
    x: jax.Array, scale: jax.Array, dy: jax.Array, *shortcut: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of x [..., C], plus the shortcut's, of scale and of bias, [C]."""
    normalised, factor = _normalise(x, epsilon)
    dy = dy.astype(jnp.float32)
    scaled = dy * _per_channel(scale, x)
    mean = scaled.mean(-1, keepdims=True)
    slope = (scaled * normalised).mean(-1, keepdims=True)
    dx = factor * (scaled - mean - normalised * slope)
    dx = sum((branch.astype(jnp.float32) for branch in shortcut), start=dx)
    batch = tuple(range(x.ndim - 1))
    return dx.astype(x.dtype), (dy * normalised).sum(batch), dy.sum(batch)


def _per_channel(array: jax.Array, x: jax.Array) -> jax.Array:
    return array.reshape((1,) * (x.ndim - 1) + (-1,))


def _normalise(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Returns x with mean 0 and variance 1, and 1 / standard deviation, both in float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    factor = lax.rsqrt((centred * centred).mean(-1, keepdims=True) + epsilon)
    return centred * factor, factor
