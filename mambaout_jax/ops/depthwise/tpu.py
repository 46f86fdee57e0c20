"""Depthwise convolution on TPUs: the Pallas kernels, batch-padded and spread over the mesh.

XLA cannot partition a Pallas kernel by itself, and libtpu has no `custom_partitioning`. So each
device of the mesh in context (`jax.sharding.use_abstract_mesh`, `jax.set_mesh`) takes its part of
the batch under `shard_map`, and the filter gradient is summed over them; without a mesh in context
the kernels serve one device. Elsewhere than on a TPU they run in Pallas' interpreter, slowly.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from mambaout_jax.ops.depthwise import pallas_tpu
from mambaout_jax.ops.sharded import batch_axes, on_mesh, sum_on_mesh


def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves x [N, H, W, C] with kernel [k, k, 1, C] of x's dtype, padding k // 2."""
    maps = PartitionSpec(batch_axes(x))
    return on_mesh(_convolve, (maps, PartitionSpec()), maps)(x, kernel.astype(jnp.float32))


def input_gradient(dy: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns the gradient of x [N, H, W, C] for the result's gradient dy [N, H, W, C]."""
    return forward(dy, kernel[::-1, ::-1])


def filter_gradient(x: jax.Array, dy: jax.Array, kernel_size: int) -> jax.Array:
    """Returns the gradient of the kernel, float32 [k, k, 1, C], for x and dy [N, H, W, C]."""
    return sum_on_mesh(functools.partial(_filter_gradient, kernel_size=kernel_size), x, dy)


@jax.jit
def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    convolve = pallas_tpu.convolve
    y = lax.platform_dependent(
        _images_before_channels(x),
        kernel,
        tpu=convolve,
        default=functools.partial(convolve, interpret=True),
    )
    return y.transpose(2, 0, 1, 3)[: x.shape[0]]


@functools.partial(jax.jit, static_argnames="kernel_size")
def _filter_gradient(x: jax.Array, dy: jax.Array, kernel_size: int) -> jax.Array:
    gradient = functools.partial(pallas_tpu.filter_gradient, size=kernel_size)
    return lax.platform_dependent(
        _images_before_channels(x),
        _images_before_channels(dy),
        tpu=gradient,
        default=functools.partial(gradient, interpret=True),
    )


def _images_before_channels(x: jax.Array) -> jax.Array:
    """[N, H, W, C] to [H, W, N, C], N padded to a whole number of sublanes."""
    x = jnp.pad(x, ((0, -x.shape[0] % 8), (0, 0), (0, 0), (0, 0)))
    return x.transpose(1, 2, 0, 3)
