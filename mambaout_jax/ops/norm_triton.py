"""Triton kernels of LayerNorm and its gradient for GPUs; they read each map once."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from mambaout_jax.ops.triton_launch import launch, load, store

_TILE = 512  # elements
# Programs: 64 and 32 for each multiprocessor of an H200.
_PROGRAMS, _GRADIENT_PROGRAMS = 8448, 4224


def normalise(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float, dtype: jnp.dtype
) -> jax.Array:
    """Returns the normalised x [..., C], with scale and bias [C]."""
    programs, warps, constants = _tiles(x, _PROGRAMS)
    (y,) = launch(
        layer_norm,
        scale,
        bias,
        x,
        out_shape=[jax.ShapeDtypeStruct(x.shape, dtype)],
        grid=(programs,),
        num_warps=warps,
        epsilon=epsilon,
        **constants,
    )
    return y


def gradient(
    x: jax.Array, scale: jax.Array, dy: jax.Array, *shortcut: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of x [..., C], plus the shortcut's, of scale and of bias, [C]."""
    programs, warps, constants = _tiles(x, _GRADIENT_PROGRAMS)
    sums = jax.ShapeDtypeStruct((programs, x.shape[-1]), jnp.float32)
    (branch,) = shortcut or (dy,)
    dx, dscale, dbias = launch(
        layer_norm_gradient,
        scale,
        x,
        dy,
        branch,
        out_shape=(jax.ShapeDtypeStruct(x.shape, x.dtype), sums, sums),
        grid=(programs,),
        num_warps=warps,
        epsilon=epsilon,
        has_shortcut=bool(shortcut),
        **constants,
    )
    return dx, dscale.sum(0), dbias.sum(0)


def _tiles(x: jax.Array, programs: int) -> tuple[int, int, dict[str, int]]:
    """Returns the number of programs, at most `programs`, their warps, and their constants."""
    channels = x.shape[-1]
    pixels = x.size // channels
    lanes = triton.next_power_of_2(channels)
    rows = max(_TILE // lanes, 1)
    steps = triton.cdiv(pixels, rows * programs)
    sizes = {"pixels": pixels, "channels": channels, "rows": rows, "lanes": lanes, "steps": steps}
    return triton.cdiv(pixels, rows * steps), max(lanes // 1024, 1), sizes


@triton.jit
def layer_norm(
    scale_ptr,
    bias_ptr,
    x_ptr,
    y_ptr,
    pixels: tl.constexpr,
    channels: tl.constexpr,
    rows: tl.constexpr,
    lanes: tl.constexpr,
    steps: tl.constexpr,
    epsilon: tl.constexpr,
):
    """Writes some rows of pixels."""
    tile: tl.constexpr = (rows, lanes)
    channel = tl.broadcast_to(tl.arange(0, lanes)[None, :], tile)
    row = tl.broadcast_to(tl.arange(0, rows)[:, None], tile)
    scale = load(scale_ptr + channel, channel < channels)
    bias = load(bias_ptr + channel, channel < channels)
    for step in range(steps):
        first = (tl.program_id(0).to(tl.int64) * steps + step) * rows
        mask = (channel < channels) & (row < pixels - first)
        index = row * channels + channel
        y, _ = normalised(load(x_ptr + first * channels + index, mask), mask, channels, epsilon)
        store(y_ptr + first * channels + index, y * scale + bias, mask)


@triton.jit
def layer_norm_gradient(
    scale_ptr,
    x_ptr,
    dy_ptr,
    shortcut_ptr,
    dx_ptr,
    dscale_ptr,
    dbias_ptr,
    pixels: tl.constexpr,
    channels: tl.constexpr,
    rows: tl.constexpr,
    lanes: tl.constexpr,
    steps: tl.constexpr,
    epsilon: tl.constexpr,
    has_shortcut: tl.constexpr,
):
    """Writes dx of some rows of pixels, and the sums of dscale and dbias over them."""
    tile: tl.constexpr = (rows, lanes)
    lane = tl.arange(0, lanes)
    channel = tl.broadcast_to(lane[None, :], tile)
    row = tl.broadcast_to(tl.arange(0, rows)[:, None], tile)
    scale = load(scale_ptr + channel, channel < channels)
    dscale = tl.zeros(tile, tl.float32)
    dbias = tl.zeros(tile, tl.float32)
    index = row * channels + channel
    next_first = tl.program_id(0).to(tl.int64) * steps * rows
    next_mask = (channel < channels) & (row < pixels - next_first)
    next_x = tl.load(x_ptr + next_first * channels + index, mask=next_mask, other=0)
    next_dy = tl.load(dy_ptr + next_first * channels + index, mask=next_mask, other=0)
    for _ in range(steps):
        first, mask, x, dy = next_first, next_mask, next_x, next_dy.to(tl.float32)
        # The next tile is loaded while this one is computed.
        next_first += rows
        next_mask = (channel < channels) & (row < pixels - next_first)
        next_x = tl.load(x_ptr + next_first * channels + index, mask=next_mask, other=0)
        next_dy = tl.load(dy_ptr + next_first * channels + index, mask=next_mask, other=0)
        y, factor = normalised(x.to(tl.float32), mask, channels, epsilon)
        dx = normalised_gradient(y, factor, dy * scale, channels)
        if has_shortcut:
            dx += load(shortcut_ptr + first * channels + index, mask)
        store(dx_ptr + first * channels + index, dx, mask)
        dscale += dy * y
        dbias += dy
    place = tl.program_id(0) * channels + lane
    store(dscale_ptr + place, tl.sum(dscale, axis=0), lane < channels)
    store(dbias_ptr + place, tl.sum(dbias, axis=0), lane < channels)


@triton.jit
def normalised(x, mask, channels: tl.constexpr, epsilon: tl.constexpr):
    """Returns x with mean 0 and variance 1 in each row, and 1 / standard deviation.

    x is 0 outside of the mask.
    """
    mean, factor = moments(x, mask, channels, epsilon)
    return tl.where(mask, x - mean, 0) * factor, factor


@triton.jit
def moments(x, mask, channels: tl.constexpr, epsilon: tl.constexpr):
    """Returns the mean of each row, and 1 / standard deviation; x is 0 outside of the mask."""
    mean = _mean(x, channels)
    centred = tl.where(mask, x - mean, 0)
    return mean, tl.rsqrt(_mean(centred * centred, channels) + epsilon)


@triton.jit
def normalised_gradient(y, factor, dy, channels: tl.constexpr):
    """Returns the gradient of x for that of y, where `normalised` returns y and the factor."""
    slope = _mean(dy * y, channels)
    return factor * (dy - _mean(dy, channels) - y * slope)


@triton.jit
def _mean(values, channels: tl.constexpr):
    return tl.sum(values, axis=1, keep_dims=True) / channels
