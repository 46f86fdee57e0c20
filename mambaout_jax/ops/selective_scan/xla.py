"""The selective scan in JAX operations.

`scan` is one step after the other; its gradient, which JAX derives, keeps the state of every step.
`forward` and `backward` keep the states at the start of each chunk of steps alone, and compute the
others again. The steps of a chunk are unrolled, so that XLA fuses them.
"""

import jax
import jax.numpy as jnp

CHUNK = 16  # steps


def scan(
    x: jax.Array, delta: jax.Array, a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array
) -> jax.Array:
    """Returns y [N, L, E], float32, of arguments as of `ops.selective_scan`."""
    return _walk(_first_state(x, a), a, x, delta, b, c, unroll=1)[1] + _direct(x, d)


def forward(
    x: jax.Array,
    delta: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array,
    *,
    keep: bool,
) -> tuple[jax.Array, ...]:
    """Returns y [N, L, E] in x's dtype.

    With `keep`, also the states before each chunk, float32 [N, ceil(L / CHUNK), S, E].
    """

    def step(h, inputs):  # type: ignore[no-untyped-def]
        last, y = _walk(h, a, *inputs)
        return last, (y, jnp.swapaxes(h, 1, 2) if keep else ())

    _, (y, states) = jax.lax.scan(step, _first_state(x, a), _chunks(x, delta, b, c))
    y = (_steps(y, x.shape[1]) + _direct(x, d)).astype(x.dtype)
    return (y, jnp.moveaxis(states, 0, 1)) if keep else (y,)


def backward(
    x: jax.Array,
    delta: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array,
    states: jax.Array,
    dy: jax.Array,
) -> tuple[jax.Array, ...]:
    """Returns the gradients of x, delta, a, b, c and d, the arguments of `forward`.

    `states` are those that `forward` kept, and `dy`, [N, L, E], is the gradient of y.
    """

    def step(carry, inputs):  # type: ignore[no-untyped-def]
        dh, da = carry
        state, dy, *chunk = inputs
        _, transpose = jax.vjp(_walk, jnp.swapaxes(state, 1, 2), a, *chunk)
        dh, da_chunk, *gradients = transpose((dh, dy.astype(jnp.float32)))
        return (dh, da + da_chunk), gradients

    chunks = (jnp.moveaxis(states, 1, 0), *_chunks(dy, x, delta, b, c))
    zeros = (_first_state(x, a), jnp.zeros_like(a))
    (_, da), gradients = jax.lax.scan(step, zeros, chunks, reverse=True)
    dx, ddelta, db, dc = (_steps(gradient, x.shape[1]) for gradient in gradients)
    dy = dy.astype(jnp.float32)
    dx = (dx.astype(jnp.float32) + _direct(dy, d)).astype(x.dtype)
    return dx, ddelta, da, db, dc, (x.astype(jnp.float32) * dy).sum((0, 1))


def _coefficients(x, delta, a, b):  # type: ignore[no-untyped-def]
    """Returns the decay and the input of each step: both float32 [..., E, S]."""
    x, delta, b = (array.astype(jnp.float32) for array in (x, delta, b))
    a = a.reshape((1,) * (x.ndim - 1) + a.shape)
    return jnp.exp(delta[..., None] * a), (delta * x)[..., None] * b[..., None, :]


def _read(h: jax.Array, c: jax.Array) -> jax.Array:
    return (h * c.astype(jnp.float32)[..., None, :]).sum(-1)


def _direct(x: jax.Array, d: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) * d[None, None]


def _first_state(x: jax.Array, a: jax.Array) -> jax.Array:
    # Of x's sharding, which a scan's first state must have.
    return jnp.zeros_like(x[:, 0, :, None].astype(jnp.float32) + a[None])


def _walk(h, a, x, delta, b, c, unroll=CHUNK):  # type: ignore[no-untyped-def]
    """Returns the state after the steps, and their outputs, float32 [N, steps, E]."""

    def step(h, inputs):  # type: ignore[no-untyped-def]
        x, delta, b, c = inputs
        decay, new = _coefficients(x, delta, a, b)
        h = decay * h + new
        return h, _read(h, c)

    steps = tuple(jnp.moveaxis(array, 1, 0) for array in (x, delta, b, c))
    h, y = jax.lax.scan(step, h, steps, unroll=unroll)
    return h, jnp.moveaxis(y, 0, 1)


def _chunks(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """[N, L, C] to [ceil(L / size), N, size, C], padded with zeros: a delta of 0 keeps a state."""
    n, length, _ = arrays[0].shape
    size = min(CHUNK, length)
    padded = (jnp.pad(array, ((0, 0), (0, -length % size), (0, 0))) for array in arrays)
    return tuple(
        jnp.moveaxis(array.reshape(n, -1, size, array.shape[-1]), 1, 0) for array in padded
    )


def _steps(chunks: jax.Array, length: int) -> jax.Array:
    """The reverse of `_chunks`."""
    array = jnp.moveaxis(chunks, 0, 1)
    return array.reshape(array.shape[0], -1, array.shape[-1])[:, :length]
