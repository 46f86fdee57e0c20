"""The block's calls in JAX operations: the reference, for every platform.

Maps are [N, H, W, channels]; kernels have the dtype of the maps, biases are float32.
"""

import jax
import jax.numpy as jnp

from mambaout_jax.ops.activations import activate
from mambaout_jax.ops.norm import layer_norm

_EPSILON = 1e-6


def norm_dense(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns norm(x) @ kernel + bias, for x [N, H, W, C], kernel [C, O] and bias [O]."""
    return _dense(_normalise(x), kernel, bias).astype(x.dtype)


def norm_dense_gradient(
    x: jax.Array, dx: jax.Array, dy: jax.Array, kernel: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of `norm_dense`: dx plus that of x, and those of kernel and bias."""
    _, pull = jax.vjp(norm_dense, x, kernel, bias)
    branch, dkernel, dbias = pull(dy)
    return dx + branch, dkernel.astype(jnp.float32), dbias


def gated(
    x: jax.Array, conv: jax.Array, scale: jax.Array, *weights: jax.Array, act: str
) -> jax.Array:
    """Returns the block's result, as `dispatch.gated_residual` describes it."""
    gate, gate_bias, value, value_bias, out, out_bias = weights
    normalised = _normalise(x)
    active = activate(act, _dense(normalised, gate, gate_bias))
    zeros = value.shape[1] - conv.shape[-1]
    conv = jnp.pad(conv, ((0, 0), (0, 0), (0, 0), (0, zeros))).astype(jnp.float32)
    product = active * (_dense(normalised, value, value_bias) + conv)
    y = _dense(product.astype(x.dtype), out.T, out_bias) * scale.reshape(-1, 1, 1, 1)
    return (x.astype(jnp.float32) + y).astype(x.dtype)


def gated_gradient(
    x: jax.Array,
    conv: jax.Array,
    dy: jax.Array,
    scale: jax.Array,
    *weights: jax.Array,
    act: str,
) -> tuple[jax.Array, ...]:
    """Returns the gradients of `gated` for x, conv and the six weights."""
    _, pull = jax.vjp(
        lambda x, conv, *rest: gated(x, conv, scale, *rest, act=act), x, conv, *weights
    )
    dx, dconv, *gradients = pull(dy)
    return dx, dconv, *(gradient.astype(jnp.float32) for gradient in gradients)


def _normalise(x: jax.Array) -> jax.Array:
    channels = x.shape[-1:]
    _, y = layer_norm(x, jnp.ones(channels), jnp.zeros(channels), _EPSILON, x.dtype)
    return y


def _dense(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns x @ kernel + bias in float32."""
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32) + bias.reshape(1, 1, 1, -1)
