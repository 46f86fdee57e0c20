"""Kernels on a mesh: the compiler cannot split a kernel's call, so each device makes its own."""

import math
from collections.abc import Callable

import jax
from jax import lax
from jax.sharding import AxisType, PartitionSpec


def batch_axes(x: jax.Array) -> tuple[str, ...]:
    """Returns the axes of the mesh in context that split the batch: all, or none if uneven."""
    mesh = jax.sharding.get_abstract_mesh()
    automatic = [
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind != AxisType.Manual and mesh.shape[name] > 1
    ]
    parts = math.prod(mesh.shape[name] for name in automatic)
    return tuple(automatic) if x.shape[0] % parts == 0 else ()


def on_mesh(function: Callable, in_specs: tuple, out_specs: PartitionSpec | tuple) -> Callable:
    """Returns the function that each device of the mesh in context calls with its own part."""
    if jax.sharding.get_abstract_mesh().empty:
        return function
    # Pallas calls do not say over which axes their results vary, hence no check.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def sum_on_mesh(function: Callable, x: jax.Array, dy: jax.Array) -> jax.Array:
    """Returns function(x, dy), a sum over the batch, of which each device sums its part."""
    axes = batch_axes(x)
    maps = PartitionSpec(axes)

    def summed(x: jax.Array, dy: jax.Array) -> jax.Array:
        gradient = function(x, dy)
        return lax.psum(gradient, axes) if axes else gradient

    return on_mesh(summed, (maps, maps), PartitionSpec())(x, dy)
