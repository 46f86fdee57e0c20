"""Triton kernels of the selective scan for GPUs.

A program walks the tokens of one image for a few channels, with all their states in registers. A
tile is [states, channels], one number for each thread of a warp, so that the sums over states and
those over channels are first of registers, and then over few threads. Lists hold the tiles: `i`
counts those of states, `j` those of channels, `t` tokens.

The gradient walks the tokens from the last to the first, a few at a time, whose states it first
computes again from those that `forward` kept.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from mambaout_jax.ops.selective_scan.xla import CHUNK
from mambaout_jax.ops.triton_launch import add_at, launch, load, store

_TILE = (4, 8)  # states, channels
_CHANNELS = 16  # of a program
_STEPS = 4  # tokens at a time
_WARPS = 1
_LN2 = tl.constexpr(0.6931471805599453)


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
    """As `xla.forward`."""
    n, length, channels = x.shape
    kept = (n, triton.cdiv(length, CHUNK), a.shape[1], channels) if keep else (1,)
    y, states = launch(
        selective_scan,
        x,
        delta,
        _exponents(a),
        b,
        c,
        d,
        out_shape=[_like(x), jax.ShapeDtypeStruct(kept, jnp.float32)],
        keep=keep,
        **_options(x, a),
    )
    return (y, states) if keep else (y,)


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
    """As `xla.backward`."""
    n, length, channels = x.shape
    coefficients = (triton.cdiv(channels, _CHANNELS), n, length, a.shape[1])
    shapes = (n, a.shape[1], channels), coefficients, coefficients, (n, channels)
    dx, ddelta, da, db, dc, dd = launch(
        selective_scan_gradient,
        x,
        delta,
        _exponents(a),
        b,
        c,
        d,
        states,
        dy,
        out_shape=[
            _like(x),
            _like(delta),
            *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
        ],
        **_options(x, a),
    )
    db, dc = db.sum(0).astype(b.dtype), dc.sum(0).astype(c.dtype)
    return dx, ddelta, da.sum(0).T, db, dc, dd.sum(0)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _exponents(a: jax.Array) -> jax.Array:
    """Returns [S, E], for powers of 2."""
    return a.T / _LN2.value


def _options(x: jax.Array, a: jax.Array) -> dict[str, Any]:
    """Returns the grid, and the constants of each program."""
    images, length, channels = x.shape
    return {
        "grid": (triton.cdiv(channels, _CHANNELS), images),
        "num_warps": _WARPS,
        "length": length,
        "channels": channels,
        "state": a.shape[1],
        "chunk": CHUNK,
        "rows": _TILE[0],
        "lanes": _TILE[1],
        "block": _CHANNELS,
        "steps": _STEPS,
    }


@triton.jit
def selective_scan(
    x_ptr,
    delta_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    d_ptr,
    y_ptr,
    states_ptr,
    length: tl.constexpr,
    channels: tl.constexpr,
    state: tl.constexpr,
    chunk: tl.constexpr,
    rows: tl.constexpr,
    lanes: tl.constexpr,
    block: tl.constexpr,
    steps: tl.constexpr,
    keep: tl.constexpr,
):
    """Writes y of one image and a few channels, and the states before each chunk."""
    chunks: tl.constexpr = (length + chunk - 1) // chunk
    parts: tl.constexpr = (length + steps - 1) // steps
    image = tl.program_id(1).to(tl.int64)
    x_ptr += image * (length * channels)
    delta_ptr += image * (length * channels)
    y_ptr += image * (length * channels)
    b_ptr += image * (length * state)
    c_ptr += image * (length * state)
    states_ptr += image * (chunks * state * channels)
    s = _states_of_tiles(state, rows, lanes)
    e = _channels_of_tiles(rows, lanes, block)
    a = _load_states(a_ptr, s, e, state, channels)
    d = _load_row(d_ptr, e, True, channels)
    h = _zero_states(s, e)
    for k in range(chunks):
        if keep:
            _store_states(states_ptr + k * (state * channels), s, e, h, state, channels)
        first_part = k * (chunk // steps)
        for part in range(first_part, tl.minimum(first_part + chunk // steps, parts)):
            first = part * steps
            x = _load_tokens(x_ptr, first, e, steps, length, channels)
            delta = _load_tokens(delta_ptr, first, e, steps, length, channels)
            b = _load_all_coefficients(b_ptr, first, s, steps, length, state)
            c = _load_all_coefficients(c_ptr, first, s, steps, length, state)
            y = []
            for t in tl.static_range(steps):
                h = _after(h, a, x, delta, b, t)
                y_t = []
                for j in tl.static_range(len(e)):
                    read = h[0][j] * c[0][t]
                    for i in tl.static_range(1, len(s)):
                        read += h[i][j] * c[i][t]
                    y_t += [_over(0, read) + d[j] * x[t][j]]
                y += [y_t]
            for t in tl.static_range(steps):
                _store_tokens(y_ptr, first + t, e, y[t], length, channels)


@triton.jit
def selective_scan_gradient(
    x_ptr,
    delta_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    d_ptr,
    states_ptr,
    dy_ptr,
    dx_ptr,
    ddelta_ptr,
    da_ptr,
    db_ptr,
    dc_ptr,
    dd_ptr,
    length: tl.constexpr,
    channels: tl.constexpr,
    state: tl.constexpr,
    chunk: tl.constexpr,
    rows: tl.constexpr,
    lanes: tl.constexpr,
    block: tl.constexpr,
    steps: tl.constexpr,
):
    """Writes the gradients of one image and a few channels; the sums over both are the caller's."""
    chunks: tl.constexpr = (length + chunk - 1) // chunk
    parts: tl.constexpr = (length + steps - 1) // steps
    image = tl.program_id(1).to(tl.int64)
    x_ptr += image * (length * channels)
    delta_ptr += image * (length * channels)
    dy_ptr += image * (length * channels)
    dx_ptr += image * (length * channels)
    ddelta_ptr += image * (length * channels)
    b_ptr += image * (length * state)
    c_ptr += image * (length * state)
    states_ptr += image * (chunks * state * channels)
    of_block = tl.program_id(0) * tl.num_programs(1) + image
    db_ptr += of_block * (length * state)
    dc_ptr += of_block * (length * state)
    lane = tl.broadcast_to(tl.arange(0, lanes)[None, :], (rows, lanes))
    zero = tl.zeros((rows, lanes), tl.float32)
    s = _states_of_tiles(state, rows, lanes)
    e = _channels_of_tiles(rows, lanes, block)
    a = _load_states(a_ptr, s, e, state, channels)
    d = _load_row(d_ptr, e, True, channels)
    dh = _zero_states(s, e)
    da = _zero_states(s, e)
    dd = _zeros(e)
    for index in range(parts):
        part = parts - 1 - index
        first = part * steps
        k = part // (chunk // steps)
        h = _load_states(states_ptr + k * (state * channels), s, e, state, channels)
        for before in range(k * (chunk // steps), part):
            x = _load_tokens(x_ptr, before * steps, e, steps, length, channels)
            delta = _load_tokens(delta_ptr, before * steps, e, steps, length, channels)
            b = _load_all_coefficients(b_ptr, before * steps, s, steps, length, state)
            for t in tl.static_range(steps):
                h = _after(h, a, x, delta, b, t)
        x = _load_tokens(x_ptr, first, e, steps, length, channels)
        delta = _load_tokens(delta_ptr, first, e, steps, length, channels)
        dy = _load_tokens(dy_ptr, first, e, steps, length, channels)
        # For each token: sums over states, [j][t]; sums over channels, the tile i in column i.
        by_b = [[zero] * steps] * len(e)
        by_decay = [[zero] * steps] * len(e)
        db = [zero] * steps
        dc = [zero] * steps
        exponents = a
        # Each turn takes the tiles i, which are the first of the lists and become the last.
        for i in range(len(s)):
            b_i = _load_coefficients(b_ptr, first, s[0] + i, steps, length, state)
            c_i = _load_coefficients(c_ptr, first, s[0] + i, steps, length, state)
            dh_i = []
            da_i = []
            db_i = [zero] * steps
            dc_i = [zero] * steps
            for j in tl.static_range(len(e)):
                states = [h[0][j]]
                decays = []
                for t in tl.static_range(steps):
                    decays += [tl.exp2(delta[t][j] * exponents[0][j])]
                    states += [decays[t] * states[t] + delta[t][j] * x[t][j] * b_i[t]]
                dh_ij = dh[0][j]
                da_ij = da[0][j]
                for t in tl.static_range(steps - 1, -1, -1):
                    g = dh_ij + dy[t][j] * c_i[t]
                    dh_ij = g * decays[t]
                    in_exponent = dh_ij * states[t]
                    da_ij += delta[t][j] * in_exponent
                    by_b = _add_at_both(by_b, j, t, g * b_i[t])
                    by_decay = _add_at_both(by_decay, j, t, exponents[0][j] * in_exponent)
                    db_i = add_at(db_i, t, g * (delta[t][j] * x[t][j]))
                    dc_i = add_at(dc_i, t, states[t + 1] * dy[t][j])
                dh_i += [dh_ij]
                da_i += [da_ij]
            db = _with_column(db, i, db_i, lane)
            dc = _with_column(dc, i, dc_i, lane)
            h = h[1:] + [h[0]]
            dh = dh[1:] + [dh_i]
            da = da[1:] + [da_i]
            exponents = exponents[1:] + [exponents[0]]
        for t in tl.static_range(steps):
            dx_t = []
            ddelta_t = []
            for j in tl.static_range(len(e)):
                by_b_sum = _over(0, by_b[j][t])
                dx_t += [delta[t][j] * by_b_sum + d[j] * dy[t][j]]
                ddelta_t += [x[t][j] * by_b_sum + _LN2 * _over(0, by_decay[j][t])]
                dd = add_at(dd, j, dy[t][j] * x[t][j])
            _store_tokens(dx_ptr, first + t, e, dx_t, length, channels)
            _store_tokens(ddelta_ptr, first + t, e, ddelta_t, length, channels)
            place = s[0] + lane  # in column i: the states of the tile i
            exists = (lane < len(s)) & (place < state) & (first + t < length)
            store(db_ptr + (first + t) * state + place, db[t], exists)
            store(dc_ptr + (first + t) * state + place, dc[t], exists)
    _store_states(da_ptr + image * (state * channels), s, e, da, state, channels)
    for j in tl.static_range(len(e)):
        store(dd_ptr + image * channels + e[j], dd[j], e[j] < channels)


@triton.jit
def _channels_of_tiles(rows: tl.constexpr, lanes: tl.constexpr, block: tl.constexpr):
    """Returns the channels of each tile j."""
    lane = tl.broadcast_to(tl.arange(0, lanes)[None, :], (rows, lanes))
    channels = []
    for j in tl.static_range(block // lanes):
        channels += [tl.program_id(0) * block + j * lanes + lane]
    return channels


@triton.jit
def _states_of_tiles(state: tl.constexpr, rows: tl.constexpr, lanes: tl.constexpr):
    """Returns the states of each tile i; as neighbours, Triton would load them in other threads."""
    row = tl.broadcast_to(tl.arange(0, rows)[:, None], (rows, lanes))
    tiles: tl.constexpr = (state + rows - 1) // rows
    states = []
    for i in tl.static_range(tiles):
        states += [row * tiles + i]
    return states


@triton.jit
def _load_tokens(ptr, first, e, steps: tl.constexpr, length: tl.constexpr, channels: tl.constexpr):
    """Loads [L, E] at a few tokens: a tile of equal rows for each [t][j]."""
    values = []
    for t in tl.static_range(steps):
        values += [_load_row(ptr + (first + t) * channels, e, first + t < length, channels)]
    return values


@triton.jit
def _load_row(ptr, e, exists, channels: tl.constexpr):
    """Loads [E]: a tile of equal rows for each j."""
    return [load(ptr + place, exists & (place < channels)) for place in e]


@triton.jit
def _store_tokens(ptr, t, e, values, length: tl.constexpr, channels: tl.constexpr):
    """Stores [L, E] at a token, for each j."""
    for j in tl.static_range(len(e)):
        store(ptr + t * channels + e[j], values[j], (t < length) & (e[j] < channels))


@triton.jit
def _load_coefficients(
    ptr, first, s, steps: tl.constexpr, length: tl.constexpr, state: tl.constexpr
):
    """Loads [L, S] at a few tokens: a tile of equal columns for each t."""
    values = []
    for t in tl.static_range(steps):
        values += [load(ptr + (first + t) * state + s, (first + t < length) & (s < state))]
    return values


@triton.jit
def _load_all_coefficients(
    ptr, first, s, steps: tl.constexpr, length: tl.constexpr, state: tl.constexpr
):
    """Loads [L, S] at a few tokens, for each [i][t]."""
    return [_load_coefficients(ptr, first, place, steps, length, state) for place in s]


@triton.jit
def _load_states(ptr, s, e, state: tl.constexpr, channels: tl.constexpr):
    """Loads [S, E], for each [i][j]."""
    return [_load_row(ptr + place * channels, e, place < state, channels) for place in s]


@triton.jit
def _store_states(ptr, s, e, values, state: tl.constexpr, channels: tl.constexpr):
    """Stores [S, E], for each [i][j]."""
    for i in tl.static_range(len(s)):
        for j in tl.static_range(len(e)):
            exists = (s[i] < state) & (e[j] < channels)
            store(ptr + s[i] * channels + e[j], values[i][j], exists)


@triton.jit
def _zeros(e):
    return [tl.zeros(place.shape, tl.float32) for place in e]


@triton.jit
def _zero_states(s, e):
    return [_zeros(e) for _ in s]


@triton.jit
def _after(h, a, x, delta, b, t: tl.constexpr):
    """Returns the states after the token t, of those before it."""
    after = []
    for i in tl.static_range(len(a)):
        row = []
        for j in tl.static_range(len(x[t])):
            decay = tl.exp2(delta[t][j] * a[i][j])
            row += [decay * h[i][j] + delta[t][j] * x[t][j] * b[i][t]]
        after += [row]
    return after


@triton.jit
def _over(axis: tl.constexpr, values):
    """Returns the sum over an axis of a tile, in each of its places."""
    return tl.broadcast_to(tl.sum(values, axis=axis, keep_dims=True), values.shape)


@triton.jit
def _with_column(tiles, i, values, lane):
    """Returns tiles for each t, of which column i is the sum over the values' channels."""
    result = []
    for t in tl.static_range(len(tiles)):
        result += [tl.where(lane == i, _over(1, values[t]), tiles[t])]
    return result


@triton.jit
def _add_at_both(values, j: tl.constexpr, t: tl.constexpr, value):
    return values[:j] + [add_at(values[j], t, value)] + values[j + 1 :]
