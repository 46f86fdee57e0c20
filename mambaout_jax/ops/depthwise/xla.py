"""Depthwise convolution as one `lax.conv_general_dilated`: the reference, for every platform.

Maps and kernel have the same dtype.
"""

import jax
import jax.numpy as jnp
from jax import lax


def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves x [N, H, W, C] with kernel [k, k, 1, C] of x's dtype, padding k // 2."""
    padding = kernel.shape[0] // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1),
        padding=[(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def input_gradient(dy: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns the gradient of x [N, H, W, C] for the result's gradient dy [N, H, W, C]."""
    (dx,) = jax.linear_transpose(lambda x: forward(x, kernel), dy)(dy)
    return dx


def filter_gradient(x: jax.Array, dy: jax.Array, *, kernel_size: int) -> jax.Array:
    """Returns the gradient of the kernel, float32 [k, k, 1, C], for x and dy [N, H, W, C].

    XLA rounds it to x's dtype before it is returned in float32.
    """
    kernel = jax.ShapeDtypeStruct((kernel_size, kernel_size, 1, x.shape[-1]), x.dtype)
    (dkernel,) = jax.linear_transpose(lambda kernel: forward(x, kernel), kernel)(dy)
    return dkernel.astype(jnp.float32)
