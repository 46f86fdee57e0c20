"""Pallas kernels of the depthwise convolution for GPUs, compiled by Triton.

A tile is [rows, channels] of one column of the maps. The rows of all images follow one another in
memory, so that a tap is an address offset. A column is read and converted to float32 once, and used
by every tap that needs it. Each thread keeps the sums of a few channels of a few neighbouring
columns in registers.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

_WIDE = 14  # columns that a program sums at once; half as many on narrower maps
_FILTER_TILE = (8, 64)  # rows of taps, channels
_FILTER_ROWS = 16  # rows of the maps that a program of the filter gradient sums


def convolve(x: jax.Array, kernel: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Convolves x [N, H, W, C] with kernel [k, k, 1, C], padding k // 2."""
    images, height, width, channels = x.shape
    tile = (8, 32) if channels % 32 == 0 else (16, 16)
    columns = _columns(width)
    blocks = pl.cdiv(channels, tile[1]) * pl.cdiv(width, columns)
    y = pl.pallas_call(
        functools.partial(
            _convolve, size=kernel.shape[0], shape=x.shape, tile=tile, columns=columns
        ),
        out_shape=jax.ShapeDtypeStruct((x.size,), x.dtype),
        grid=(blocks, pl.cdiv(images * height, tile[0])),
        compiler_params=plt.CompilerParams(num_warps=2, num_stages=1),
        interpret=interpret,
        name="depthwise_convolution",
    )(x.reshape(-1), kernel.astype(jnp.float32).reshape(-1))
    return y.reshape(x.shape)


def filter_gradient(
    x: jax.Array, dy: jax.Array, size: int, *, interpret: bool = False
) -> jax.Array:
    """Returns the kernel's gradient, float32 [k, k, 1, C], for x and dy [N, H, W, C]."""
    images, height, width, channels = x.shape
    tile = (max(_FILTER_TILE[0], pl.next_power_of_2(size)), _FILTER_TILE[1])
    parts = pl.cdiv(images * height, _FILTER_ROWS)
    shape = (parts, size, tile[0], channels)
    gradient = pl.pallas_call(
        functools.partial(_sum_taps, size=size, shape=x.shape, tile=tile, columns=_columns(width)),
        out_shape=jax.ShapeDtypeStruct((math.prod(shape),), jnp.float32),
        grid=(pl.cdiv(channels, tile[1]), parts),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="depthwise_filter_gradient",
    )(x.reshape(-1), dy.reshape(-1))
    gradient = gradient.reshape(shape).sum(0)[:, :size]
    return gradient.transpose(1, 0, 2)[:, :, None]


def _columns(width: int) -> int:
    return _WIDE if width >= _WIDE else _WIDE // 2


def _load(ref, index: jax.Array, mask: jax.Array) -> jax.Array:
    return plt.load(ref.at[index], mask=mask, other=0).astype(jnp.float32)


def _quotient(index: jax.Array, divisor: int) -> tuple[jax.Array, jax.Array]:
    """Returns quotient and remainder of a number that is not negative."""
    divisor = jnp.int32(divisor)
    return jax.lax.div(index, divisor), jax.lax.rem(index, divisor)


def _input_columns(x_ref, start, first_column, inside, size, columns, shape):
    """Yields the tile of each input column, with the (tap, result) pairs that use it.

    `start` holds the addresses in the column of the first result, `inside` which of them exist. If
    one block spans the map, columns outside the map are skipped.
    """
    *_, width, channels = shape
    edge = size // 2
    for column in range(-edge, columns + edge):
        if columns >= width and not 0 <= column < width:
            continue
        at = first_column + column
        mask = inside & (at >= 0) & (at < width) if columns < width else inside
        results = [(tap, column + edge - tap) for tap in range(size)]
        pairs = [(tap, result) for tap, result in results if 0 <= result < columns]
        yield _load(x_ref, start + column * channels, mask), pairs


def _convolve(x_ref, kernel_ref, y_ref, *, size, shape, tile, columns):
    """Writes a tile of results for each of a few columns."""
    images, height, width, channels = shape
    edge = size // 2
    channel_block, column_block = _quotient(pl.program_id(0), pl.cdiv(width, columns))
    first_column = column_block * columns
    row = pl.program_id(1) * tile[0] + jax.lax.broadcasted_iota(jnp.int32, tile, 0)
    channel = channel_block * tile[1] + jax.lax.broadcasted_iota(jnp.int32, tile, 1)
    _, own_row = _quotient(row, height)
    exists = (row < images * height) & (channel < channels)
    start = (row * width + first_column) * channels + channel

    def add_row(i, sums):
        input_row = own_row + i - edge
        inside = exists & (input_row >= 0) & (input_row < height)
        input_start = start + (i - edge) * width * channels
        taps = [_load(kernel_ref, (i * size + j) * channels + channel, exists) for j in range(size)]
        sums = list(sums)
        for values, pairs in _input_columns(
            x_ref, input_start, first_column, inside, size, columns, shape
        ):
            for tap, result in pairs:
                sums[result] += values * taps[tap]
        return tuple(sums)

    sums = (jnp.zeros(tile, jnp.float32),) * columns
    sums = jax.lax.fori_loop(0, size, add_row, sums)
    for column, value in enumerate(sums):
        mask = exists & (first_column + column < width)
        plt.store(y_ref.at[start + column * channels], value.astype(y_ref.dtype), mask=mask)


def _sum_taps(x_ref, dy_ref, gradient_ref, *, size, shape, tile, columns):
    """Writes the sums over a few rows of the maps; a tile is [rows of taps, channels]."""
    images, height, width, channels = shape
    edge = size // 2
    blocks = pl.cdiv(width, columns)
    tap_row = jax.lax.broadcasted_iota(jnp.int32, tile, 0)
    channel = pl.program_id(0) * tile[1] + jax.lax.broadcasted_iota(jnp.int32, tile, 1)
    part = pl.program_id(1)

    def add_columns(index, sums):
        step, column_block = _quotient(index, blocks)
        row = part * _FILTER_ROWS + step
        first_column = column_block * columns
        input_row = _quotient(row, height)[1] + tap_row - edge
        exists = (channel < channels) & (row < images * height)
        inside = exists & (input_row >= 0) & (input_row < height) & (tap_row < size)
        start = (row * width + first_column) * channels + channel
        input_start = start + (tap_row - edge) * width * channels
        gradients = [
            _load(dy_ref, start + column * channels, exists & (first_column + column < width))
            for column in range(columns)
        ]
        sums = list(sums)
        for values, pairs in _input_columns(
            x_ref, input_start, first_column, inside, size, columns, shape
        ):
            for tap, result in pairs:
                sums[tap] += values * gradients[result]
        return tuple(sums)

    sums = (jnp.zeros(tile, jnp.float32),) * size
    sums = jax.lax.fori_loop(0, _FILTER_ROWS * blocks, add_columns, sums)
    for tap, value in enumerate(sums):
        row = (part * size + tap) * tile[0] + tap_row
        plt.store(gradient_ref.at[row * channels + channel], value, mask=channel < channels)
