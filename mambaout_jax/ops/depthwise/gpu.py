"""Depthwise convolution on NVIDIA GPUs: Triton kernels, and for some maps cuDNN."""

import jax
import jax.numpy as jnp

from mambaout_jax.ops.depthwise import triton_kernels, xla

_NARROW = 14  # pixels
_LANES = 64  # channels that a program of our filter gradient sums


def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves x [N, H, W, C] with kernel [k, k, 1, C] of x's dtype, padding k // 2."""
    return triton_kernels.convolve(x, kernel)


def input_gradient(dy: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns the gradient of x [N, H, W, C] for the result's gradient dy [N, H, W, C]."""
    return triton_kernels.convolve(dy, kernel[::-1, ::-1])


def filter_gradient(x: jax.Array, dy: jax.Array, *, kernel_size: int) -> jax.Array:
    """Returns the gradient of the kernel, float32 [k, k, 1, C], for x and dy [N, H, W, C].

    On wide maps in bfloat16 whose channels leave lanes of our kernel idle, cuDNN's is faster. On
    others it takes several times as long, and in float32 it computes in TF32; see
    docs/performance.md.
    """
    if x.dtype == jnp.bfloat16 and x.shape[2] > _NARROW and x.shape[3] % _LANES:
        return xla.filter_gradient(x, dy, kernel_size=kernel_size)
    return triton_kernels.filter_gradient(x, dy, kernel_size)
