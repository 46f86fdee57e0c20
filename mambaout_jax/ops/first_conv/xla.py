"""The stem up to its activation in JAX operations: the reference, for every platform.

`kernel` and `bias` are those of the convolution in `dispatch.first_conv`, in the images' dtype;
`scale` and `shift` are those of its norm, float32.
"""

import jax
import jax.numpy as jnp

from mambaout_jax.ops import norm_xla
from mambaout_jax.ops.activations import activate
from mambaout_jax.ops.patches import xla_conv


def forward(
    images: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    *,
    act: str,
    epsilon: float,
) -> jax.Array:
    """Returns the activation."""
    y = xla_conv(images, kernel, stride=2, padding=((1, 1), (1, 1))) + bias.reshape(1, 1, 1, -1)
    y = norm_xla.normalise(y, scale, shift, epsilon=epsilon, dtype=images.dtype)
    return activate(act, y)


def backward(
    images: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    dy: jax.Array,
    *,
    act: str,
    epsilon: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of kernel, bias, scale and shift, in float32."""

    def from_weights(*weights: jax.Array) -> jax.Array:
        return forward(images, *weights, act=act, epsilon=epsilon)

    _, transpose = jax.vjp(from_weights, kernel, bias, scale, shift)
    dkernel, dbias, dscale, dshift = transpose(dy)
    return dkernel.astype(jnp.float32), dbias.astype(jnp.float32), dscale, dshift
