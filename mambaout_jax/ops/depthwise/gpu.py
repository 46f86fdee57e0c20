"""Depthwise convolution on NVIDIA GPUs: Triton kernels, and for some maps cuDNN."""

import jax
import jax.numpy as jnp

from mambaout_jax.ops.depthwise import triton_kernels, xla

_NARROW = 14  # pixels


def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves x [N, H, W, C] with kernel [k, k, 1, C] of x's dtype, padding k // 2."""
    return triton_kernels.convolve(x, kernel)


def input_gradient(dy: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns the gradient of x [N, H, W, C] for the result's gradient dy [N, H, W, C]."""
    return triton_kernels.convolve(dy, kernel[::-1, ::-1])


def filter_gradient(x: jax.Array, dy: jax.Array, *, kernel_size: int) -> jax.Array:
    """Returns the gradient of the kernel, float32 [k, k, 1, C], for dy [N, H, W, C].

    x is [N, H, W, P], of which the last C channels were convolved.

    cuDNN's is faster on wide maps in bfloat16 whose channels leave a part of our tiles idle. On
    some others it takes several times as long, and in float32 it computes in TF32; see
    docs/performance.md.
    """
    channels = dy.shape[-1]
    idle = channels % triton_kernels.FILTER_TILE[1]
    if x.dtype == jnp.bfloat16 and x.shape[2] > _NARROW and idle:
        return xla.filter_gradient(x[..., -channels:], dy, kernel_size=kernel_size)
    return triton_kernels.filter_gradient(x, dy, kernel_size)
