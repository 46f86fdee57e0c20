"""Triton kernel of LayerNorm's gradient for GPUs; it reads each map once."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from mambaout_jax.ops.triton_launch import launch, load, store

_PROGRAMS = 1056  # eight for each multiprocessor of an H200
_TILE = 1024  # elements


def gradient(
    x: jax.Array, scale: jax.Array, dy: jax.Array, *shortcut: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of x [..., C], plus the shortcut's, of scale and of bias, [C]."""
    channels = x.shape[-1]
    pixels = x.size // channels
    lanes = triton.next_power_of_2(channels)
    rows = max(_TILE // lanes, 1)
    steps = triton.cdiv(pixels, rows * _PROGRAMS)
    programs = triton.cdiv(pixels, rows * steps)
    sums = jax.ShapeDtypeStruct((programs, channels), jnp.float32)
    (branch,) = shortcut or (dy,)
    dx, dscale, dbias = launch(
        layer_norm_gradient,
        scale,
        x,
        dy,
        branch,
        out_shape=(jax.ShapeDtypeStruct(x.shape, x.dtype), sums, sums),
        grid=(programs,),
        num_warps=4,
        pixels=pixels,
        channels=channels,
        rows=rows,
        lanes=lanes,
        steps=steps,
        epsilon=epsilon,
        has_shortcut=bool(shortcut),
    )
    return dx, dscale.sum(0), dbias.sum(0)


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
    first = tl.program_id(0) * steps * rows + tl.broadcast_to(tl.arange(0, rows)[:, None], tile)
    scale = load(scale_ptr + channel, channel < channels)
    dscale = tl.zeros(tile, tl.float32)
    dbias = tl.zeros(tile, tl.float32)
    for step in range(steps):
        pixel = first + step * rows
        index = pixel * channels + channel
        mask = (channel < channels) & (pixel < pixels)
        x = load(x_ptr + index, mask)
        dy = load(dy_ptr + index, mask)
        centred = tl.where(mask, x - _mean(x, channels), 0)
        factor = tl.rsqrt(_mean(centred * centred, channels) + epsilon)
        normalised = centred * factor
        scaled = dy * scale
        slope = _mean(scaled * normalised, channels)
        dx = factor * (scaled - _mean(scaled, channels) - normalised * slope)
        if has_shortcut:
            dx += load(shortcut_ptr + index, mask)
        store(dx_ptr + index, dx, mask)
        dscale += dy * normalised
        dbias += dy
    place = tl.program_id(0) * channels + lane
    store(dscale_ptr + place, tl.sum(dscale, axis=0), lane < channels)
    store(dbias_ptr + place, tl.sum(dbias, axis=0), lane < channels)


@triton.jit
def _mean(values, channels: tl.constexpr):
    return tl.sum(values, axis=1, keep_dims=True) / channels
