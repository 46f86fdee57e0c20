"""Pallas kernel of LayerNorm's gradient for GPUs, compiled by Triton; it reads each map once."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

_PROGRAMS = 1056  # eight for each multiprocessor of an H200
_TILE = 2048  # elements


def gradient(
    x: jax.Array,
    scale: jax.Array,
    dy: jax.Array,
    *shortcut: jax.Array,
    epsilon: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of x [..., C], plus the shortcut's, of scale and of bias, [C]."""
    channels = x.shape[-1]
    pixels = x.size // channels
    lanes = pl.next_power_of_2(channels)
    rows = max(_TILE // lanes, 1)
    steps = pl.cdiv(pixels, rows * _PROGRAMS)
    programs = pl.cdiv(pixels, rows * steps)
    sums = jax.ShapeDtypeStruct((programs * channels,), jnp.float32)
    kernel = functools.partial(
        _gradient, tile=(rows, lanes), shape=(pixels, channels), steps=steps, epsilon=epsilon
    )
    dx, dscale, dbias = pl.pallas_call(
        kernel,
        out_shape=(jax.ShapeDtypeStruct((x.size,), x.dtype), sums, sums),
        grid=(programs,),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="layer_norm_gradient",
    )(scale, x.reshape(-1), dy.reshape(-1), *(branch.reshape(-1) for branch in shortcut))
    dscale, dbias = (part.reshape(programs, channels).sum(0) for part in (dscale, dbias))
    return dx.reshape(x.shape), dscale, dbias


def _gradient(scale_ref, *refs, tile, shape, steps, epsilon):
    """Writes dx of some rows of pixels, and the sums of dscale and dbias over them."""
    *inputs, dx_ref, dscale_ref, dbias_ref = refs
    pixels, channels = shape
    channel = jax.lax.broadcasted_iota(jnp.int32, tile, 1)
    scale = plt.load(scale_ref.at[channel], mask=channel < channels, other=0)
    first = pl.program_id(0) * steps * tile[0] + jax.lax.broadcasted_iota(jnp.int32, tile, 0)

    def mean(values):
        return jnp.sum(values, axis=1, keepdims=True) / channels

    def add_rows(step, sums):
        pixel = first + step * tile[0]
        index = pixel * channels + channel
        mask = (channel < channels) & (pixel < pixels)
        x, dy, *shortcut = (
            plt.load(ref.at[index], mask=mask, other=0).astype(jnp.float32) for ref in inputs
        )
        centred = jnp.where(mask, x - mean(x), 0)
        factor = jax.lax.rsqrt(mean(centred * centred) + epsilon)
        normalised = centred * factor
        scaled = dy * scale
        dx = factor * (scaled - mean(scaled) - normalised * mean(scaled * normalised))
        dx = sum(shortcut, start=dx)
        plt.store(dx_ref.at[index], dx.astype(dx_ref.dtype), mask=mask)
        dscale, dbias = sums
        return dscale + dy * normalised, dbias + dy

    zeros = jnp.zeros(tile, jnp.float32)
    sums = jax.lax.fori_loop(0, steps, add_rows, (zeros, zeros))
    channel = jax.lax.iota(jnp.int32, tile[1])
    place = pl.program_id(0) * channels + channel
    for ref, value in zip((dscale_ref, dbias_ref), sums, strict=True):
        plt.store(ref.at[place], value.sum(0), mask=channel < channels)
