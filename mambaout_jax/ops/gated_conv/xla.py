"""The convolution and the gate in JAX operations: the reference, for every platform.

`bias`, `taps` and `conv_bias` are `dispatch.gated_conv`'s weights in x's dtype. So are those of
`small_block`, but the norm's `scale` and `shift`, which are float32.
"""

import jax
import jax.numpy as jnp

from mambaout_jax.ops import norm_xla
from mambaout_jax.ops.activations import gate_product
from mambaout_jax.ops.depthwise.dispatch import depthwise_conv2d


def forward(
    x: jax.Array, bias: jax.Array, taps: jax.Array, conv_bias: jax.Array, *, act: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the product, x with its bias, and the convolution with its bias, [N, H, W, O]."""
    x = add_bias(x, bias)
    gate, identity, conv = _split(x, taps)
    convolved = add_bias(depthwise_conv2d(conv, taps), conv_bias)
    return gate_product(act, gate, identity, convolved), x, convolved


def backward(
    x: jax.Array, taps: jax.Array, convolved: jax.Array, dy: jax.Array, *, act: str
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of x, and, in float32, of its bias, the taps and the conv's bias.

    x is the one with its bias.
    """
    gate, identity, conv = _split(x, taps)
    _, transpose = jax.vjp(lambda *parts: gate_product(act, *parts), gate, identity, convolved)
    dgate, didentity, dconvolved = transpose(dy)
    _, transpose = jax.vjp(depthwise_conv2d, conv, taps.astype(jnp.float32))
    dconv, dtaps = transpose(dconvolved)
    dx = jnp.concatenate((dgate, didentity, dconv), -1)
    return dx, _sum(dx), dtaps, _sum(dconvolved)


def small_block(
    x: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    taps: jax.Array,
    conv_bias: jax.Array,
    out_kernel: jax.Array,
    out_bias: jax.Array,
    *,
    act: str,
    epsilon: float,
) -> jax.Array:
    """Returns x plus the block's branch, which starts with the norm."""
    y = norm_xla.normalise(x, scale, shift, epsilon=epsilon, dtype=x.dtype)
    product, _, _ = forward(y @ kernel, bias, taps, conv_bias, act=act)
    return x + add_bias(product @ out_kernel, out_bias)


def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Adds a bias [C] to each pixel of x [N, H, W, C]."""
    return x + bias.reshape(1, 1, 1, -1)


def _split(x: jax.Array, taps: jax.Array) -> list[jax.Array]:
    """Returns x's gate, and its channels of the identity and of the convolution."""
    channels, conv = x.shape[-1], taps.shape[-1]
    return jnp.split(x, (channels // 2, channels - conv), axis=-1)


def _sum(x: jax.Array) -> jax.Array:
    """Returns the sums of each channel [C], in float32."""
    return x.astype(jnp.float32).sum((0, 1, 2))
