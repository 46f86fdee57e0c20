"""Pallas kernels of the selective scan for GPUs, compiled by Triton.

A program walks the tokens of one image for a few channels, with all their states in registers. A
tile is [states, channels], one number for each thread of a warp, so that the sums over states and
those over channels are first of registers, and then over few threads. `i` counts the tiles of
states, `j` those of channels.

The gradient walks the tokens from the last to the first, a few at a time, whose states it first
computes again from those that `forward` kept.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from mambaout_jax.ops.selective_scan.xla import CHUNK

_TILE = (4, 8)  # states, channels
_CHANNELS = 16  # of a program
_STEPS = 4  # tokens at a time
_LOG2 = 0.6931471805599453


def forward(
    x: jax.Array,
    delta: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array,
    *,
    keep: bool,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """As `xla.forward`; `interpret` runs the kernel in Pallas' interpreter."""
    n, length, channels = x.shape
    out_shape = [jax.ShapeDtypeStruct((x.size,), x.dtype)]
    states = (n, pl.cdiv(length, CHUNK), a.shape[1], channels)
    if keep:
        out_shape.append(jax.ShapeDtypeStruct((math.prod(states),), jnp.float32))
    y, *kept = _call(
        _forward, "selective_scan", (x, delta, _exponents(a), b, c, d), out_shape, x, a, interpret
    )
    return (y.reshape(x.shape), *(array.reshape(states) for array in kept))


def backward(
    x: jax.Array,
    delta: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    d: jax.Array,
    states: jax.Array,
    dy: jax.Array,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """As `xla.backward`; `interpret` runs the kernel in Pallas' interpreter."""
    n, length, channels = x.shape
    state = a.shape[1]
    shapes = {
        "da": (n, state, channels),
        "dd": (n, channels),
        "db": (pl.cdiv(channels, _CHANNELS), n, length, state),
    }
    sums = {name: jax.ShapeDtypeStruct((math.prod(s),), jnp.float32) for name, s in shapes.items()}
    out_shape = [
        jax.ShapeDtypeStruct((x.size,), x.dtype),
        jax.ShapeDtypeStruct((x.size,), delta.dtype),
        *(sums[name] for name in ("da", "db", "db", "dd")),
    ]
    inputs = (x, delta, _exponents(a), b, c, d, states, dy)
    dx, ddelta, da, db, dc, dd = _call(
        _backward, "selective_scan_gradient", inputs, out_shape, x, a, interpret
    )
    da = da.reshape(shapes["da"]).sum(0).T
    db, dc = (part.reshape(shapes["db"]).sum(0) for part in (db, dc))
    dd = dd.reshape(shapes["dd"]).sum(0)
    tokens = dx.reshape(x.shape), ddelta.reshape(x.shape)
    return *tokens, da, db.astype(b.dtype), dc.astype(c.dtype), dd


def _exponents(a: jax.Array) -> jax.Array:
    """Returns [S, E], for powers of 2."""
    return a.T / _LOG2


def _call(kernel, name, inputs, out_shape, x, a, interpret):  # type: ignore[no-untyped-def]
    n, _, channels = x.shape
    return pl.pallas_call(
        functools.partial(kernel, shape=(*x.shape, a.shape[1])),
        out_shape=out_shape,
        grid=(pl.cdiv(channels, _CHANNELS), n),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name=name,
    )(*(array.reshape(-1) for array in inputs))


class _Program:
    """Addresses and masks of a program's part of the arrays."""

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        self.images, self.length, self.channels, self.state = shape
        self.block, self.image = pl.program_id(0), pl.program_id(1)
        self.row = jax.lax.broadcasted_iota(jnp.int32, _TILE, 0)
        self.lane = jax.lax.broadcasted_iota(jnp.int32, _TILE, 1)
        self.i = range(pl.cdiv(self.state, _TILE[0]))
        self.j = range(_CHANNELS // _TILE[1])
        self.e = [self.block * _CHANNELS + j * _TILE[1] + self.lane for j in self.j]

    def s(self, i):  # type: ignore[no-untyped-def]
        """Returns the states of a tile; as neighbours, Triton would load them in other threads."""
        return self.row * len(self.i) + i

    def tokens(self, ref, t):  # type: ignore[no-untyped-def]
        """Loads [N, L, E] at a token: a tile of equal rows for each j."""
        start = (self.image * self.length + t) * self.channels
        inside = t < self.length
        return [_load(ref, start + e, inside & (e < self.channels)) for e in self.e]

    def store_tokens(self, ref, t, values):  # type: ignore[no-untyped-def]
        """Stores [N, L, E] at a token, for each j."""
        start = (self.image * self.length + t) * self.channels
        for e, value in zip(self.e, values, strict=True):
            _store(ref, start + e, value, (t < self.length) & (e < self.channels))

    def coefficients(self, ref, t, i):  # type: ignore[no-untyped-def]
        """Loads [N, L, S] at a token: a tile of equal columns."""
        start = (self.image * self.length + t) * self.state
        return _load(ref, start + self.s(i), (t < self.length) & (self.s(i) < self.state))

    def states(self, ref, part):  # type: ignore[no-untyped-def]
        """Loads tiles [i][j] of part of an array [parts, S, E]."""
        start = part * self.state * self.channels
        return [
            [_load(ref, start + s * self.channels + e, self._exist(s, e)) for e in self.e]
            for s in map(self.s, self.i)
        ]

    def store_states(self, ref, part, values):  # type: ignore[no-untyped-def]
        """Stores tiles [i][j] in part of an array [parts, S, E]."""
        start = part * self.state * self.channels
        for s, row in zip(map(self.s, self.i), values, strict=True):
            for e, value in zip(self.e, row, strict=True):
                _store(ref, start + s * self.channels + e, value, self._exist(s, e))

    def store_columns(self, ref, t, values):  # type: ignore[no-untyped-def]
        """Stores an array [blocks, N, L, S] at a token, of a tile with the states i in column i."""
        s = self.s(self.lane)
        start = ((self.block * self.images + self.image) * self.length + t) * self.state
        inside = (self.lane < len(self.i)) & (s < self.state) & (t < self.length)
        _store(ref, start + s, values, inside)

    def _exist(self, s, e):  # type: ignore[no-untyped-def]
        return (s < self.state) & (e < self.channels)

    def zeros(self):  # type: ignore[no-untyped-def]
        """Returns tiles [i][j]."""
        return [[jnp.zeros(_TILE, jnp.float32) for _ in self.j] for _ in self.i]

    def inputs(self, refs, first):  # type: ignore[no-untyped-def]
        """Loads x, delta and b of `_STEPS` tokens from their refs: [t][j], [t][j] and [t][i]."""
        x_ref, delta_ref, b_ref = refs
        x, delta = (
            [self.tokens(ref, first + t) for t in range(_STEPS)] for ref in (x_ref, delta_ref)
        )
        return (
            x,
            delta,
            [[self.coefficients(b_ref, first + t, i) for i in self.i] for t in range(_STEPS)],
        )

    def after(self, h, a, x, delta, b):  # type: ignore[no-untyped-def]
        """Returns the states after a token, of those before it."""
        new = [delta[j] * x[j] for j in self.j]
        return [
            [jnp.exp2(delta[j] * a[i][j]) * h[i][j] + new[j] * b[i] for j in self.j] for i in self.i
        ]


def _load(ref, index, mask):  # type: ignore[no-untyped-def]
    return plt.load(ref.at[index], mask=mask, other=0).astype(jnp.float32)


def _store(ref, index, value, mask):  # type: ignore[no-untyped-def]
    plt.store(ref.at[index], value.astype(ref.dtype), mask=mask)


def _over(axis, value):  # type: ignore[no-untyped-def]
    """Returns the sum over an axis of a tile, in each of its places."""
    return jnp.broadcast_to(jnp.sum(value, axis=axis, keepdims=True), _TILE)


def _forward(x_ref, delta_ref, a_ref, b_ref, c_ref, d_ref, y_ref, *kept, shape):  # type: ignore[no-untyped-def]
    program = _Program(shape)
    chunks, parts = pl.cdiv(program.length, CHUNK), pl.cdiv(program.length, _STEPS)
    a = program.states(a_ref, 0)
    d = [_load(d_ref, e, e < program.channels) for e in program.e]

    def chunk(k, h):  # type: ignore[no-untyped-def]
        for states_ref in kept:
            program.store_states(states_ref, program.image * chunks + k, h)
        first = k * (CHUNK // _STEPS)
        return jax.lax.fori_loop(first, jnp.minimum(first + CHUNK // _STEPS, parts), part, h)

    def part(k, h):  # type: ignore[no-untyped-def]
        first = k * _STEPS
        x, delta, b = program.inputs((x_ref, delta_ref, b_ref), first)
        c = [[program.coefficients(c_ref, first + t, i) for i in program.i] for t in range(_STEPS)]
        y = []
        for t in range(_STEPS):
            h = program.after(h, a, x[t], delta[t], b[t])
            read = [sum(h[i][j] * c[t][i] for i in program.i) for j in program.j]
            y.append([_over(0, read[j]) + d[j] * x[t][j] for j in program.j])
        for t in range(_STEPS):
            program.store_tokens(y_ref, first + t, y[t])
        return h

    jax.lax.fori_loop(0, chunks, chunk, program.zeros())


def _backward(  # type: ignore[no-untyped-def]
    x_ref, delta_ref, a_ref, b_ref, c_ref, d_ref, states_ref, dy_ref, *gradients, shape
):
    dx_ref, ddelta_ref, da_ref, db_ref, dc_ref, dd_ref = gradients
    program, steps = _Program(shape), range(_STEPS)
    chunks, parts = pl.cdiv(program.length, CHUNK), pl.cdiv(program.length, _STEPS)
    a = program.states(a_ref, 0)
    d = [_load(d_ref, e, e < program.channels) for e in program.e]
    zero = jnp.zeros(_TILE, jnp.float32)

    def advance(k, h):  # type: ignore[no-untyped-def]
        x, delta, b = program.inputs((x_ref, delta_ref, b_ref), k * _STEPS)
        for t in steps:
            h = program.after(h, a, x[t], delta[t], b[t])
        return h

    def part(index, carry):  # type: ignore[no-untyped-def]
        dh, da, dd = carry
        index = parts - 1 - index
        first, k = index * _STEPS, jax.lax.div(index, jnp.int32(CHUNK // _STEPS))
        kept = program.states(states_ref, program.image * chunks + k)
        h = jax.lax.fori_loop(k * (CHUNK // _STEPS), index, advance, kept)
        x, delta, dy = (
            [program.tokens(ref, first + t) for t in steps] for ref in (x_ref, delta_ref, dy_ref)
        )
        new = [[delta[t][j] * x[t][j] for j in program.j] for t in steps]

        def add_tiles(i, carry):  # type: ignore[no-untyped-def]
            """Adds the parts of the tiles i, which are first in the lists and become the last."""
            by_b, by_decay, db, dc, *lists = carry
            (h, *_), (dh_after, *_), (da, *_), (a, *_) = lists
            by_b, by_decay = ([[*row] for row in rows] for rows in (by_b, by_decay))
            dh, da = [], [*da]
            b, c = (
                [program.coefficients(ref, first + t, i) for t in steps] for ref in (b_ref, c_ref)
            )
            db_i, dc_i = ([zero for _ in steps] for _ in range(2))
            for j in program.j:
                delta_j, new_j, dy_j = ([value[t][j] for t in steps] for value in (delta, new, dy))
                dh_j, terms = _tile_gradient((h[j], dh_after[j], a[j]), delta_j, new_j, dy_j, b, c)
                dh.append(dh_j)
                for t, (in_b, in_exponent, of_b, of_c) in zip(steps, terms, strict=True):
                    by_b[t][j] += in_b
                    by_decay[t][j] += a[j] * in_exponent
                    da[j] += delta_j[t] * in_exponent
                    db_i[t] += of_b
                    dc_i[t] += of_c
            db, dc = (
                [jnp.where(program.lane == i, _over(1, of_i), whole) for of_i, whole in pairs]
                for pairs in (zip(db_i, db, strict=True), zip(dc_i, dc, strict=True))
            )
            lists = [[*rest[1:], row] for rest, row in zip(lists, (h, dh, da, a), strict=True)]
            return by_b, by_decay, db, dc, *lists

        # For each token: sums over states, [t][j]; sums over channels, the tile i in column i.
        by_b, by_decay = ([[zero for _ in program.j] for _ in steps] for _ in range(2))
        db, dc = ([zero for _ in steps] for _ in range(2))
        sums = jax.lax.fori_loop(
            0, len(program.i), add_tiles, (by_b, by_decay, db, dc, h, dh, da, a)
        )
        by_b, by_decay, db, dc, _, dh, da, _ = sums
        for t in steps:
            by_b_t = [_over(0, value) for value in by_b[t]]
            dx = [delta[t][j] * by_b_t[j] + d[j] * dy[t][j] for j in program.j]
            ddelta = [x[t][j] * by_b_t[j] + _LOG2 * _over(0, by_decay[t][j]) for j in program.j]
            program.store_tokens(dx_ref, first + t, dx)
            program.store_tokens(ddelta_ref, first + t, ddelta)
            program.store_columns(db_ref, first + t, db[t])
            program.store_columns(dc_ref, first + t, dc[t])
            dd = [dd[j] + dy[t][j] * x[t][j] for j in program.j]
        return dh, da, dd

    zeros = program.zeros()
    _, da, dd = jax.lax.fori_loop(0, parts, part, (zeros, zeros, zeros[0]))
    program.store_states(da_ref, program.image, da)
    for e, value in zip(program.e, dd, strict=True):
        _store(dd_ref, program.image * program.channels + e, value, e < program.channels)


def _tile_gradient(states, delta, new, dy, b, c):  # type: ignore[no-untyped-def]
    """Goes back over a few tokens with a tile of states, its gradient and its exponents.

    Returns the gradient of the states before them, and for each token its product with b, that with
    the exponent's derivative, and the terms of the gradients of b and of c.
    """
    (h, dh, a), steps = states, range(len(delta))
    decays, states = [jnp.exp2(delta[t] * a) for t in steps], [h]
    for t in steps:
        states.append(decays[t] * states[t] + new[t] * b[t])
    terms = []
    for t in reversed(steps):
        g = dh + dy[t] * c[t]
        dh = g * decays[t]
        terms.append((g * b[t], dh * states[t], g * new[t], states[t + 1] * dy[t]))
    return dh, terms[::-1]
