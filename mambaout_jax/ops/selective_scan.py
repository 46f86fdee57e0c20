"""The selective scan of Mamba: a linear recurrence whose coefficients depend on the input.

    h_t = exp(delta_t a) h_(t-1) + delta_t b_t x_t        y_t = c_t h_t + d x_t

for each channel on its own, with a state of S numbers and h_0 = 0 (Gu and Dao, "Mamba", 2023,
Algorithm 2, with B_bar = delta B as its implementation has it).

`scan` is one step after the other; its gradient keeps the state of every step. `chunked` computes
the states of a chunk of steps at once, by an associative scan, and computes them again in the
backward pass: only the state between chunks is kept.
"""

import functools

import jax
import jax.numpy as jnp

from mambaout_jax.errors import UserError
from mambaout_jax.ops.sharded import on_mesh_of

IMPLEMENTATIONS = ("auto", "scan", "chunked")
CHUNK = 16  # steps; a chunk's states are an array of [N, CHUNK, E, S]


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
        implementation: "scan", "chunked", or "auto": "chunked" for sequences of more than one
            chunk.

    Raises:
        UserError: when the shapes do not match, or the implementation is unknown.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(
            f"unknown implementation {implementation!r} of selective_scan "
            f"(known: {', '.join(IMPLEMENTATIONS)})"
        )
    _check_shapes(x, delta, a, b, c, d)
    if implementation == "auto":
        implementation = "chunked" if x.shape[1] > CHUNK else "scan"
    states = _chunked if implementation == "chunked" else _scan
    a, d = (on_mesh_of(x, array.astype(jnp.float32)) for array in (a, d))
    y = states(x, delta, a, b, c)
    return (y + x.astype(jnp.float32) * d[None, None]).astype(x.dtype)


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


def _coefficients(x, delta, a, b):  # type: ignore[no-untyped-def]
    """Returns the decay and the input of each step: both float32 [..., E, S]."""
    x, delta, b = (array.astype(jnp.float32) for array in (x, delta, b))
    a = a.reshape((1,) * (x.ndim - 1) + a.shape)
    return jnp.exp(delta[..., None] * a), (delta * x)[..., None] * b[..., None, :]


def _read(h: jax.Array, c: jax.Array) -> jax.Array:
    return (h * c.astype(jnp.float32)[..., None, :]).sum(-1)


def _first_state(x: jax.Array, a: jax.Array) -> jax.Array:
    # Of x's sharding, which a scan's first state must have.
    return jnp.zeros_like(x[:, 0, :, None].astype(jnp.float32) * a[None])


def _scan(x, delta, a, b, c):  # type: ignore[no-untyped-def]
    def step(h, inputs):  # type: ignore[no-untyped-def]
        x, delta, b, c = inputs
        decay, new = _coefficients(x, delta, a, b)
        h = decay * h + new
        return h, _read(h, c)

    steps = tuple(jnp.moveaxis(array, 1, 0) for array in (x, delta, b, c))
    _, y = jax.lax.scan(step, _first_state(x, a), steps)
    return jnp.moveaxis(y, 0, 1)


def _chunked(x, delta, a, b, c):  # type: ignore[no-untyped-def]
    length = x.shape[1]
    size = min(CHUNK, length)
    chunks = tuple(_in_chunks(array, size) for array in (x, delta, b, c))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk(h, inputs):  # type: ignore[no-untyped-def]
        x, delta, b, c = inputs
        decay, new = _coefficients(x, delta, a, b)
        decay, new = jax.lax.associative_scan(_compose, (decay, new), axis=1)
        states = decay * h[:, None] + new
        return states[:, -1], _read(states, c)

    _, y = jax.lax.scan(chunk, _first_state(x, a), chunks)
    y = jnp.moveaxis(y, 0, 1)
    return y.reshape(y.shape[0], -1, y.shape[-1])[:, :length]


def _in_chunks(array: jax.Array, size: int) -> jax.Array:
    """[N, L, C] to [ceil(L / size), N, size, C], padded with zeros: a delta of 0 keeps a state."""
    n, length, channels = array.shape
    array = jnp.pad(array, ((0, 0), (0, -length % size), (0, 0)))
    return jnp.moveaxis(array.reshape(n, -1, size, channels), 1, 0)


def _compose(first, second):  # type: ignore[no-untyped-def]
    return first[0] * second[0], second[0] * first[1] + second[1]
