"""Depthwise convolution on TPUs: the Pallas kernels, with the layout and batch size they need.

`interpret` runs the kernels in Pallas' interpreter, on any platform.
"""

import jax
import jax.numpy as jnp

from mambaout_jax.ops.depthwise import pallas_tpu


def forward(x: jax.Array, kernel: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Convolves x [N, H, W, C] with kernel [k, k, 1, C] of x's dtype, padding k // 2."""
    y = pallas_tpu.convolve(
        _images_before_channels(x), kernel.astype(jnp.float32), interpret=interpret
    )
    return y.transpose(2, 0, 1, 3)[: x.shape[0]]


def input_gradient(dy: jax.Array, kernel: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Returns the gradient of x [N, H, W, C] for the result's gradient dy [N, H, W, C]."""
    return forward(dy, kernel[::-1, ::-1], interpret=interpret)


def filter_gradient(
    x: jax.Array, dy: jax.Array, *, kernel_size: int, interpret: bool = False
) -> jax.Array:
    """Returns the gradient of the kernel, float32 [k, k, 1, C], for x and dy [N, H, W, C]."""
    x, dy = _images_before_channels(x), _images_before_channels(dy)
    return pallas_tpu.filter_gradient(x, dy, kernel_size, interpret=interpret)


def _images_before_channels(x: jax.Array) -> jax.Array:
    """[N, H, W, C] to [H, W, N, C], with N padded to a multiple of 8 sublanes."""
    x = jnp.pad(x, ((0, -x.shape[0] % 8), (0, 0), (0, 0), (0, 0)))
    return x.transpose(1, 2, 0, 3)
