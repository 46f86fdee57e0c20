"""Calls on a mesh: each device calls a function on its own part of the batch.

XLA cannot split a kernel over devices, and libtpu has no `custom_partitioning`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

_OF_PARAMETERS = "fsdp"  # the axis of `runtime.sharding.make_mesh` that splits parameters


def on_parts(function: Callable, split: Sequence[bool], split_results: Sequence[bool]) -> Callable:
    """Returns the function as each device of the mesh calls it, on its part of the batch.

    The mesh is the one in context (`jax.set_mesh`), else the one that the arguments lie on. Without
    a mesh, or in the caller's own `shard_map`, the function itself is called.

    Args:
        function: takes arrays and returns a tuple of arrays.
        split: for each argument, whether its axis 0 is the batch; other arguments are whole on each
            device. The first argument is split.
        split_results: for each result, whether its axis 0 is the batch; other results are sums over
            the batch, and are added up over the devices.
    """

    def call(*args: jax.Array) -> Any:
        mesh = _find_mesh(args)
        names = _names(mesh, AxisType.Auto, AxisType.Explicit)
        if not names:
            return function(*args)
        axes = _batch_axes(mesh, args[0])
        in_specs, out_specs = (
            tuple(PartitionSpec(axes if flag else ()) for flag in flags)
            for flags in (split, split_results)
        )

        def call_part(*parts: jax.Array) -> tuple[jax.Array, ...]:
            results = zip(function(*parts), split_results, strict=True)
            return tuple(
                result if is_split or not axes else lax.psum(result, axes)
                for result, is_split in results
            )

        parts = (_reshard(arg, mesh, spec) for arg, spec in zip(args, in_specs, strict=True))
        # Kernels do not say over which axes their results vary, hence no check.
        return jax.shard_map(
            call_part,
            mesh=mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=set(names),
            check_vma=False,
        )(*parts)

    return call


def on_one_device(x: jax.Array) -> bool:
    """Returns whether x and its results lie on no mesh, or on one of a single device."""
    mesh = _find_mesh((x,))
    return mesh.empty or (mesh.size == 1 and not _names(mesh, AxisType.Explicit, AxisType.Manual))


def images_on_device(x: jax.Array) -> int:
    """Returns how many images of a batch x each device of its mesh has."""
    mesh = _find_mesh((x,))
    return x.shape[0] // math.prod(mesh.shape[name] for name in _batch_axes(mesh, x))


def summed_in(dtype: Any, maps: int, function: Callable) -> Callable:
    """Returns the function with its results after the first `maps`, sums over devices, in dtype."""

    def call(*args: jax.Array) -> tuple[jax.Array, ...]:
        results = function(*args)
        return (*results[:maps], *(result.astype(dtype) for result in results[maps:]))

    return call


def _find_mesh(args: Sequence[jax.Array]) -> AbstractMesh:
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(arg).sharding.mesh for arg in args)]
    return next((mesh for mesh in meshes if not mesh.empty), meshes[0])


def _names(mesh: AbstractMesh, *kinds: AxisType) -> list[str]:
    return [
        name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind in kinds
    ]


def _batch_axes(mesh: AbstractMesh, x: jax.Array) -> tuple[str, ...]:
    """Returns the axes of the mesh that split the batch of x.

    Those are the explicit axes that x's type has for it, and all automatic ones, of which a type
    says nothing; of these none where they do not divide the batch.
    """
    first = jax.typeof(x).sharding.spec[0]
    explicit = () if first is None else (first,) if isinstance(first, str) else tuple(first)
    automatic = [name for name in _names(mesh, AxisType.Auto) if mesh.shape[name] > 1]
    parts = math.prod(mesh.shape[name] for name in (*explicit, *automatic))
    return (*explicit, *automatic) if x.shape[0] % parts == 0 else explicit


def on_mesh_of(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the weights, whole on each device of x's mesh if that has explicit axes alone.

    There, JAX cannot differentiate products of arrays of which one lies on no mesh.
    """
    mesh = _find_mesh((x,))
    if mesh.empty or not jax.typeof(weights).sharding.mesh.empty:
        return weights
    return _reshard(weights, mesh, PartitionSpec())


def gathered(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns weights, already rounded, whole on each device of a mesh that splits parameters.

    By itself, XLA gathers the float32 parameters, which are twice the bytes. It also gathers a
    kernel after reversing it for a convolution's gradient; cuDNN then computes that gradient as a
    convolution of a dilated map. How the weights' gradient is split is left to XLA.
    """
    mesh = _find_mesh((x,))
    if mesh.shape.get(_OF_PARAMETERS, 1) == 1 or _names(mesh, AxisType.Explicit, AxisType.Manual):
        return weights
    return _gathered(NamedSharding(mesh, PartitionSpec()), weights)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gathered(sharding: NamedSharding, weights: jax.Array) -> jax.Array:
    # Without the barrier, XLA applies the sharding before the rounding, too.
    return lax.with_sharding_constraint(lax.optimization_barrier(weights), sharding)


@_gathered.defjvp
def _gathered_jvp(sharding, weights, tangents):  # type: ignore[no-untyped-def]
    return _gathered(sharding, *weights), tangents[0]


def _reshard(x: jax.Array, mesh: AbstractMesh, spec: PartitionSpec) -> jax.Array:
    """Returns x as the specification says, where the mesh has explicit axes alone."""
    if _names(mesh, AxisType.Auto, AxisType.Manual):
        return x
    return jax.reshard(x, NamedSharding(mesh, spec))
