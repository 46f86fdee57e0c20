"""The convolution and the gate in JAX operations: the reference, for every platform.

`bias`, `taps` and `conv_bias` are `dispatch.gated_conv`'s weights in x's dtype.
"""

import jax
import jax.numpy as jnp

from mambaout_jax.ops.activations import gate_product
from mambaout_jax.ops.depthwise.dispatch import depthwise_conv2d


def forward(
    x: jax.Array, bias: jax.Array, taps: jax.Array, conv_bias: jax.Array, *, act: str
) -> tuple[jax.Array, jax.Array]:
    """Returns the product [N, H, W, I + O], and the convolution with its bias, [N, H, W, O]."""
    gate, identity, conv = split(x, bias, taps)
    convolved = depthwise_conv2d(conv, taps) + _per_channel(conv_bias)
    return gate_product(act, gate, identity, convolved), convolved


def backward(
    x: jax.Array,
    bias: jax.Array,
    taps: jax.Array,
    conv_bias: jax.Array,
    convolved: jax.Array,
    dy: jax.Array,
    *,
    act: str,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of x, and, in float32, of its bias, the taps and the conv's bias."""
    gate, identity, conv = split(x, bias, taps)
    _, transpose = jax.vjp(lambda *parts: gate_product(act, *parts), gate, identity, convolved)
    dgate, didentity, dconvolved = transpose(dy)
    _, transpose = jax.vjp(depthwise_conv2d, conv, taps.astype(jnp.float32))
    dconv, dtaps = transpose(dconvolved)
    dx = jnp.concatenate((dgate, didentity, dconv), -1)
    return dx, _sum(dx), dtaps, _sum(dconvolved)


def split(x: jax.Array, bias: jax.Array, taps: jax.Array) -> list[jax.Array]:
    """Returns x's gate, and its channels of the identity and of the convolution, with the bias."""
    channels, conv = x.shape[-1], taps.shape[-1]
    return jnp.split(x + _per_channel(bias), (channels // 2, channels - conv), axis=-1)


def _per_channel(array: jax.Array) -> jax.Array:
    return array.reshape(1, 1, 1, -1)


def _sum(x: jax.Array) -> jax.Array:
    """Returns the sums of each channel [C], in float32."""
    return x.astype(jnp.float32).sum((0, 1, 2))
