"""Depthwise convolution on NVIDIA GPUs: Pallas kernels, and cuDNN's filter gradient for wide maps.

`interpret` runs the kernels in Pallas' interpreter, on any platform.
"""

import jax

from mambaout_jax.ops.depthwise import pallas_gpu, xla

# Up to this width in pixels our filter gradient is faster than cuDNN's; see docs/performance.md.
_NARROW = 14


def forward(x: jax.Array, kernel: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Convolves x [N, H, W, C] with kernel [k, k, 1, C] of x's dtype, padding k // 2."""
    return pallas_gpu.convolve(x, kernel, interpret=interpret)


def input_gradient(dy: jax.Array, kernel: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Returns the gradient of x [N, H, W, C] for the result's gradient dy [N, H, W, C]."""
    return pallas_gpu.convolve(dy, kernel[::-1, ::-1], interpret=interpret)


def filter_gradient(
    x: jax.Array, dy: jax.Array, *, kernel_size: int, interpret: bool = False
) -> jax.Array:
    """Returns the gradient of the kernel, float32 [k, k, 1, C], for x and dy [N, H, W, C]."""
    if x.shape[2] > _NARROW:
        return xla.filter_gradient(x, dy, kernel_size=kernel_size)
    return pallas_gpu.filter_gradient(x, dy, kernel_size, interpret=interpret)
