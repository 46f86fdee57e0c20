"""Depthwise convolution on TPUs: the Pallas kernels, partitioned over the mesh and batch-padded.

Each device convolves its own images and channels; the filter gradient is summed over the devices
that share a channel. Elsewhere than on a TPU the kernels run in Pallas' interpreter, slowly.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from mambaout_jax.ops import depthwise_pallas_tpu


def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves x [N, H, W, C] with kernel [k, k, 1, C] of x's dtype, padding k // 2."""
    return _partitioned_convolve(x, kernel.astype(jnp.float32))


def input_gradient(dy: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns the gradient of x [N, H, W, C] for the result's gradient dy [N, H, W, C]."""
    return forward(dy, kernel[::-1, ::-1])


def filter_gradient(x: jax.Array, dy: jax.Array, kernel_size: int) -> jax.Array:
    """Returns the gradient of the kernel, float32 [k, k, 1, C], for x and dy [N, H, W, C]."""
    return _partitioned_filter_gradient(x, dy, kernel_size)


@jax.jit
def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    convolve = depthwise_pallas_tpu.convolve
    y = lax.platform_dependent(
        _images_before_channels(x),
        kernel,
        tpu=convolve,
        default=functools.partial(convolve, interpret=True),
    )
    return y.transpose(2, 0, 1, 3)[: x.shape[0]]


@functools.partial(jax.jit, static_argnums=2)
def _filter_gradient(x: jax.Array, dy: jax.Array, kernel_size: int) -> jax.Array:
    gradient = functools.partial(depthwise_pallas_tpu.filter_gradient, size=kernel_size)
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


_partitioned_convolve = custom_partitioning(_convolve)
_partitioned_filter_gradient = custom_partitioning(_filter_gradient, static_argnums=(2,))


def _shardings(mesh: jax.sharding.Mesh, x) -> tuple[NamedSharding, NamedSharding]:
    """Returns the shardings of maps and of kernels: images and channels may be split, as x is."""
    spec = (*x.sharding.spec, None, None, None, None)
    maps = PartitionSpec(spec[0], None, None, spec[3])
    return NamedSharding(mesh, maps), NamedSharding(mesh, PartitionSpec(None, None, None, spec[3]))


def _partition_convolve(mesh, arguments, _result):
    maps, kernels = _shardings(mesh, arguments[0])
    return mesh, _convolve, maps, (maps, kernels)


def _partition_filter_gradient(kernel_size, mesh, arguments, _result):
    maps, kernels = _shardings(mesh, arguments[0])

    def summed(x: jax.Array, dy: jax.Array) -> jax.Array:
        gradient = _filter_gradient(x, dy, kernel_size)
        return gradient if maps.spec[0] is None else lax.psum(gradient, maps.spec[0])

    return mesh, summed, kernels, (maps, maps)


_partitioned_convolve.def_partition(
    partition=_partition_convolve,
    infer_sharding_from_operands=lambda mesh, arguments, _: _shardings(mesh, arguments[0])[0],
    sharding_rule="n h w c, i j one c -> n h w c",
    need_replication_factors=("h", "w", "i", "j", "one"),
)
_partitioned_filter_gradient.def_partition(
    partition=_partition_filter_gradient,
    infer_sharding_from_operands=lambda _, mesh, arguments, __: _shardings(mesh, arguments[0])[1],
    sharding_rule="n h w c, n h w c -> i j one c",
    reduction_factors=("n",),
    need_replication_factors=("h", "w", "i", "j", "one"),
)
