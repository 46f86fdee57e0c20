"""Depthwise convolution on NVIDIA GPUs: Pallas kernels, each device on its part of the batch.

The filter's gradient on large maps is XLA's own, which is cuDNN's and no slower there. Where the
program is lowered for something else, the kernels run in interpret mode.
"""

import functools

import jax
from jax import lax
from jax.sharding import PartitionSpec

from mambaout_jax.ops.depthwise import pallas_gpu, xla
from mambaout_jax.ops.sharded import batch_axes, on_mesh, sum_on_mesh

# Up to this many pixels of width our filter gradient is the faster one; docs/performance.md.
_NARROW = 14


def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves x [N, H, W, C] with kernel [k, k, 1, C] of x's dtype, padding k // 2."""
    maps = PartitionSpec(batch_axes(x))
    return on_mesh(_convolve, (maps, PartitionSpec()), maps)(x, kernel)


def input_gradient(dy: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns the gradient of x [N, H, W, C] for the result's gradient dy [N, H, W, C]."""
    return forward(dy, kernel[::-1, ::-1])


def filter_gradient(x: jax.Array, dy: jax.Array, kernel_size: int) -> jax.Array:
    """Returns the gradient of the kernel, float32 [k, k, 1, C], for x and dy [N, H, W, C]."""
    if x.shape[2] > _NARROW:
        return xla.filter_gradient(x, dy, kernel_size)
    return sum_on_mesh(functools.partial(_filter_gradient, kernel_size=kernel_size), x, dy)


@jax.jit
def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    convolve = pallas_gpu.convolve
    return lax.platform_dependent(
        x, kernel, cuda=convolve, default=functools.partial(convolve, interpret=True)
    )


@functools.partial(jax.jit, static_argnames="kernel_size")
def _filter_gradient(x: jax.Array, dy: jax.Array, kernel_size: int) -> jax.Array:
    gradient = functools.partial(pallas_gpu.filter_gradient, size=kernel_size)
    return lax.platform_dependent(
        x, dy, cuda=gradient, default=functools.partial(gradient, interpret=True)
    )
