"""The selective scan of Mamba: a linear recurrence whose coefficients depend on the input.

    h_t = exp(delta_t a) h_(t-1) + delta_t b_t x_t        y_t = c_t h_t + d x_t

for each channel on its own, with a state of S numbers and h_0 = 0 (Gu and Dao, "Mamba", 2023,
Algorithm 2, with B_bar = delta B as its implementation has it).

`scan` is one step after the other. The others keep one state in `CHUNK` steps for the gradient:
`chunked` in JAX operations, `triton` as kernels for NVIDIA GPUs.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mambaout_jax.errors import UserError
from mambaout_jax.ops.kernels import kernels_usable, why_unusable
from mambaout_jax.ops.lowering import Target, call_for_target
from mambaout_jax.ops.selective_scan import xla
from mambaout_jax.ops.sharded import on_mesh_of, on_parts

KERNEL_STATES = 32  # at most, of a channel
IMPLEMENTATIONS = ("auto", "scan", "chunked", "triton")


def selective_scan(
    x: jax.Array,
    delta: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array,
    *,
    implementation: str = "auto",
) -> jax.Array:
    """Returns y [N, L, E], in x's dtype; the states are float32.

    Args:
        x: [N, L, E], tokens in the order of the scan.
        delta: [N, L, E], positive step sizes.
        a: [E, S], negative.
        b: [N, L, S].
        c: [N, L, S].
        d: [E].
        implementation: "scan", "chunked", "triton", or "auto": "scan" for sequences of one chunk;
            for longer ones "triton" on NVIDIA GPUs, and "chunked" elsewhere or, with a warning,
            where the kernels cannot be used. They take at most 32 states.

    Raises:
        UserError: when the shapes do not match, the implementation is unknown or takes fewer
            states, and while lowering, when a kernel that is chosen by name cannot be used, as
            "triton" for other platforms than NVIDIA GPUs.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(
            f"unknown implementation {implementation!r} of selective_scan "
            f"(known: {', '.join(IMPLEMENTATIONS)})"
        )
    _check_shapes(x, delta, a, b, c, d)
    states = a.shape[1]
    if implementation == "triton" and states > KERNEL_STATES:
        raise UserError(
            f"selective_scan's 'triton' takes at most {KERNEL_STATES} states, got {states}"
        )
    if implementation == "auto" and x.shape[1] <= xla.CHUNK:
        implementation = "scan"
    elif implementation == "auto" and states > KERNEL_STATES:
        implementation = "chunked"
    a, d = (on_mesh_of(x, array.astype(jnp.float32)) for array in (a, d))
    if implementation == "scan":
        return xla.scan(x, delta, a, b, c, d).astype(x.dtype)
    return _in_chunks(implementation, x, delta, a, b, c, d)


def _check_shapes(x, delta, a, b, c, d) -> None:  # type: ignore[no-untyped-def]
    found = [array.shape for array in (x, delta, a, b, c, d)]
    if x.ndim == 3 and a.ndim == 2 and x.shape[1]:
        (n, length, channels), state = x.shape, a.shape[1]
        tokens, coefficients = (n, length, channels), (n, length, state)
        if found == [tokens, tokens, (channels, state), coefficients, coefficients, (channels,)]:
            return
    raise UserError(
        "selective_scan expected x and delta [N, L, E], a [E, S], b and c [N, L, S] and d [E], "
        f"L at least 1, got {', '.join(map(str, found))}"
    )


_SPLIT = (True, True, False, True, True, False)  # x, delta, a, b, c, d: axis 0 is the batch


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_chunks(implementation: str, *args: jax.Array) -> jax.Array:
    forward = _function(implementation, "forward", keep=False)
    (y,) = on_parts(forward, _SPLIT, (True,))(*args)
    return y


def _forward(implementation: str, *args: jax.Array):  # type: ignore[no-untyped-def]
    forward = _function(implementation, "forward", keep=True)
    y, states = on_parts(forward, _SPLIT, (True, True))(*args)
    return y, (*args, states)


def _backward(implementation: str, residuals: tuple[jax.Array, ...], dy: jax.Array):  # type: ignore[no-untyped-def]
    backward = _function(implementation, "backward")
    return on_parts(backward, (*_SPLIT, True, True), _SPLIT)(*residuals, dy)


_in_chunks.defvjp(_forward, _backward)


def _function(implementation: str, name: str, **options: bool) -> Callable:
    """Returns a function of the implementation, which is chosen and imported at lowering."""
    choose, reference = _Choice(implementation, name), getattr(xla, name)

    def call(*args: jax.Array) -> tuple[jax.Array, ...]:
        results = call_for_target(choose, reference, *args, **options)
        return results if isinstance(results, tuple) else (results,)

    return call


@dataclasses.dataclass(frozen=True)
class _Choice:
    """Chooses a function's implementation for a target."""

    implementation: str
    function: str

    def __call__(self, target: Target) -> Callable:
        name = self.implementation
        if name == "auto":
            usable = target.platform == "cuda" and kernels_usable(target, "selective scans")
            name = "triton" if usable else "chunked"
        if name == "chunked":
            return getattr(xla, self.function)
        if reason := why_unusable(target, "cuda"):
            raise UserError(f"selective_scan's {name!r} cannot be used, choose 'auto': {reason}")
        module = importlib.import_module("mambaout_jax.ops.selective_scan.triton_kernels")
        return getattr(module, self.function)
