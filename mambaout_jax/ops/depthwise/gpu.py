"""Depthwise convolution on NVIDIA GPUs by Triton kernels."""

import jax

from mambaout_jax.ops.depthwise import triton_kernels


def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves x [N, H, W, C] with kernel [k, k, 1, C] of x's dtype, padding k // 2."""
    return triton_kernels.convolve(x, kernel)


def input_gradient(dy: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns the gradient of x [N, H, W, C] for the result's gradient dy [N, H, W, C]."""
    return triton_kernels.convolve(dy, kernel[::-1, ::-1])


def filter_gradient(x: jax.Array, dy: jax.Array, *, kernel_size: int) -> jax.Array:
    """Returns the gradient of the kernel, float32 [k, k, 1, C], for dy [N, H, W, C].

    x is [N, H, W, P], of which the last C channels were convolved.
    """
    return triton_kernels.filter_gradient(x, dy, kernel_size)
