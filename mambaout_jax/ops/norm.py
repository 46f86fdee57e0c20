"""LayerNorm over channels, and its gradient in one pass over the maps."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from mambaout_jax.ops import norm_pallas_gpu
from mambaout_jax.ops.sharded import batch_axes, on_mesh


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Normalises over channels; statistics in float32, by two passes.

    Reverse-mode differentiation only.

    Args:
      x: [N, ..., C].
      scale: float32 [C].
      bias: float32 [C].
      epsilon: is added to the variance.
      dtype: the result's.

    Returns:
      x itself, and the normalised x of `dtype`. The gradient of a residual branch that starts from
      this x is added where x's own is made, and costs no pass over the maps.
    """
    normalised, _ = _normalise(x, epsilon)
    return x, (normalised * _per_channel(scale, x) + _per_channel(bias, x)).astype(dtype)


def _per_channel(array: jax.Array, x: jax.Array) -> jax.Array:
    return array.reshape((1,) * (x.ndim - 1) + (-1,))


def _normalise(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Returns x of mean 0 and variance 1, and the factor that made it so, in float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    factor = lax.rsqrt((centred * centred).mean(-1, keepdims=True) + epsilon)
    return centred * factor, factor


def _forward(x, scale, bias, epsilon, dtype):
    x, scale, bias = x.value, scale.value, bias.value
    return layer_norm(x, scale, bias, epsilon, dtype), (x, scale)


def _backward(epsilon, dtype, residuals, gradients):
    x, scale = residuals
    shortcut, dy = gradients
    if isinstance(dy, SymbolicZero):
        dy = jnp.zeros(dy.shape, dy.dtype)
    shortcuts = () if isinstance(shortcut, SymbolicZero) else (shortcut,)
    return lax.platform_dependent(
        x,
        scale,
        dy,
        *shortcuts,
        cuda=functools.partial(_backward_gpu, epsilon=epsilon),
        default=functools.partial(_backward_xla, epsilon=epsilon),
    )


layer_norm.defvjp(_forward, _backward, symbolic_zeros=True)


def _backward_gpu(x, scale, dy, *shortcut, epsilon, interpret=False):
    axes = batch_axes(x)
    maps, whole = PartitionSpec(axes), PartitionSpec()

    def backward(*args):
        dx, *sums = norm_pallas_gpu.backward(*args, epsilon=epsilon, interpret=interpret)
        return dx, *(lax.psum(sums, axes) if axes else sums)

    specs = (maps, whole, maps, *(maps for _ in shortcut))
    return on_mesh(backward, specs, (maps, whole, whole))(x, scale, dy, *shortcut)


def _backward_xla(x, scale, dy, *shortcut, epsilon):
    """Returns the gradients of x, added to the shortcut's, of the scale and of the bias."""
    normalised, factor = _normalise(x, epsilon)
    dy = dy.astype(jnp.float32)
    scaled = dy * _per_channel(scale, x)
    mean = scaled.mean(-1, keepdims=True)
    slope = (scaled * normalised).mean(-1, keepdims=True)
    dx = factor * (scaled - mean - normalised * slope)
    dx = sum((branch.astype(jnp.float32) for branch in shortcut), start=dx)
    batch = tuple(range(x.ndim - 1))
    return dx.astype(x.dtype), (dy * normalised).sum(batch), dy.sum(batch)
