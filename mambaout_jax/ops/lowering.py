"""Calls whose function is chosen when the program is lowered, by the platform it is lowered for.

`lax.platform_dependent` traces the functions of all platforms. Here only the chosen one is traced:
a program for CPUs or TPUs imports no GPU kernel.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
from jax.export import Exported, is_symbolic_dim
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive
from jax.interpreters import batching, mlir

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


@dataclasses.dataclass(frozen=True)
class Call:
    """A call in a program: shapes and dtypes of its arrays, and its parameters by name."""

    shapes: tuple[jax.ShapeDtypeStruct, ...]
    params: tuple[tuple[str, Any], ...]

    def __call__(self, *args: jax.Array) -> list[jax.Array]:
        """Makes the call, as a part of the program that is traced."""
        return _call_p.bind(*args, **dict(self.params))


# Calls that are already lowered for one NVIDIA GPU; programs reuse them.
lowered: dict[Call, Exported] = {}


@dataclasses.dataclass(frozen=True)
class Target:
    """What a call is lowered for.

    Attributes:
        platform: "cpu", "cuda", "rocm", "tpu", or "other".
        devices: how many devices XLA must split the call over; 1 under `shard_map`, where each
            device makes a call of its own.
        symbolic: whether a size is a symbol of `jax.export`, which stands for any number.
    """

    platform: str
    devices: int
    symbolic: bool = False


def call_for_target(
    choose: Callable[[Target], Callable],
    reference: Callable,
    *args: jax.Array,
    **options: Hashable,
) -> Any:
    """Calls the function that `choose` returns for the target of the program.

    Args:
        choose: returns a function of `args` and `options` for a target. Equal calls compare equal:
            it is a function of a module, or a frozen dataclass.
        reference: a function in JAX operations alone whose results have the same shapes and dtypes.
        *args: arrays.
        **options: passed on as keywords.

    Returns:
        An array, or a tuple of arrays, as `reference` does.
    """
    results = _call_p.bind(
        *args,
        choose=choose,
        reference=reference,
        options=tuple(sorted(options.items())),
        # The function is traced later, perhaps outside of the caller's context manager.
        precision=jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
    )
    return results[0] if len(results) == 1 else tuple(results)


_call_p = Primitive("call_for_target")
_call_p.multiple_results = True


def _as_tuple(function: Callable, options: tuple[tuple[str, Any], ...]) -> Callable:
    def call(*args: jax.Array) -> tuple[jax.Array, ...]:
        results = function(*args, **dict(options))
        return tuple(results) if isinstance(results, tuple | list) else (results,)

    return call


@_call_p.def_abstract_eval
def _abstract(*avals: Any, reference: Callable, options: tuple, **_: Any) -> list[Any]:
    return jax.make_jaxpr(_as_tuple(reference, options))(*avals).out_avals


@functools.partial(jax.jit, static_argnames=("choose", "reference", "options", "precision"))
def _compiled(*args: jax.Array, **params: Any) -> Any:
    return _call_p.bind(*args, **params)


@_call_p.def_impl
def _evaluate(*args: jax.Array, **params: Any) -> Any:
    with jax.disable_jit(False):  # without jit, this would call itself for ever
        return _compiled(*args, **params)


def _lower(platform: str, ctx: Any, *args: Any, **params: Any) -> Any:
    context = ctx.module_context.axis_context
    devices = context.num_devices if isinstance(context, mlir.ShardingContext) else 1
    symbolic = any(is_symbolic_dim(size) for aval in ctx.avals_in for size in aval.shape)
    target = Target(platform, max(devices, 1), symbolic)
    if target == Target("cuda", 1) and (known := lowered.get(_call_of(ctx.avals_in, params))):
        return mlir.lower_fun(known.call)(ctx, *args)
    function = params["choose"](target)
    with jax.default_matmul_precision(params["precision"]):
        return mlir.lower_fun(_as_tuple(function, params["options"]))(ctx, *args)


# Equal calls share one function of the module, instead of a copy each.
mlir.register_lowering(_call_p, functools.partial(_lower, "other"), inline=False)
for _platform in _PLATFORMS:
    mlir.register_lowering(
        _call_p, functools.partial(_lower, _platform), platform=_platform, inline=False
    )


def calls_in(jaxpr: Jaxpr) -> Iterator[Call]:
    """Yields the calls in a program and in those that it contains."""
    for equation in jaxpr.eqns:
        if equation.primitive is _call_p:
            yield _call_of([variable.aval for variable in equation.invars], equation.params)
        for part in jax.tree.leaves(
            tuple(equation.params.values()), is_leaf=lambda leaf: isinstance(leaf, ClosedJaxpr)
        ):
            if isinstance(part, ClosedJaxpr | Jaxpr):
                yield from calls_in(part.jaxpr if isinstance(part, ClosedJaxpr) else part)


def _call_of(avals: Sequence[Any], params: dict[str, Any]) -> Call:
    shapes = tuple(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals)
    return Call(shapes, tuple(sorted(params.items())))


@dataclasses.dataclass(frozen=True)
class _Vmapped:
    function: Callable
    axes: tuple[int | None, ...]

    def __call__(self, *args: jax.Array, **options: Any) -> Any:
        return jax.vmap(functools.partial(self.function, **options), self.axes)(*args)


@dataclasses.dataclass(frozen=True)
class _VmappedChoice:
    choose: Callable[[Target], Callable]
    axes: tuple[int | None, ...]

    def __call__(self, target: Target) -> Callable:
        return _Vmapped(self.choose(target), self.axes)


def _batch(args: Any, axes: Any, *, choose: Callable, reference: Callable, **params: Any) -> Any:
    axes = tuple(axes)
    choose, reference = _VmappedChoice(choose, axes), _Vmapped(reference, axes)
    results = _call_p.bind(*args, choose=choose, reference=reference, **params)
    return results, (0,) * len(results)


batching.primitive_batchers[_call_p] = _batch
