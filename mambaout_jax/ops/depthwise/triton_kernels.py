"""Triton kernels of the depthwise convolution for GPUs.

A tile is [rows, channels] of one column of the maps. The rows of all images follow one another in
memory, so that a tap is an address offset. A column is read and converted to float32 once, and used
by every tap that needs it. Each thread keeps the sums of a few channels of a few neighbouring
columns in registers: a list of tiles, which loops over `tl.static_range` unroll.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from mambaout_jax.ops.triton_launch import add_at, launch, load, store

# Columns that a program sums at once; half as many on narrower maps, and where there would be fewer
# programs than these, about one for each multiprocessor. Then its tiles have a quarter of the rows.
_WIDE, _FEW = 14, 132
# Of the filter gradient: rows of dy that a thread takes at once, its channels, most taps that it
# sums, warps of a program, and programs: 8 warps for each multiprocessor of an H200. Columns of a
# loop's body: seven take 6% fewer instructions, and three times as long to compile.
_STRIP, _CHANNELS, _TAPS, _WARPS, _PROGRAMS, _UNROLL = 2, 2, 49, 4, 264, 2


def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves x [N, H, W, C] with kernel [k, k, 1, C], padding k // 2."""
    tiles = _Tiles.of(x.shape, kernel)
    (y,) = launch(
        depthwise_convolution,
        x,
        kernel.astype(jnp.float32),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
        grid=tiles.grid,
        num_warps=2,
        **tiles.constants,
    )
    return y


def convolve_from(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Convolves the last C channels of x [N, H, W, P] with kernel [k, k, 1, C], and adds a bias."""
    *maps, pitch = x.shape
    shape = (*maps, kernel.shape[-1])
    tiles = _Tiles.of(shape, kernel)
    (y,) = launch(
        convolution_from,
        x,
        kernel.astype(jnp.float32),
        bias,
        out_shape=[jax.ShapeDtypeStruct(shape, x.dtype)],
        grid=tiles.grid,
        num_warps=2,
        pitch=pitch,
        **tiles.constants,
    )
    return y


def convolve_into(x: jax.Array, kernel: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns y [N, H, W, O] with x's convolution in its last C channels, and the sums of these.

    The sums are float32 [C], over all pixels.
    """
    tiles = _Tiles.of(x.shape, kernel)
    parts = tiles.grid[1] * triton.cdiv(x.shape[2], tiles.constants["columns"])
    sums, y = launch(
        convolution_into,
        x,
        kernel.astype(jnp.float32),
        y,
        out_shape=[jax.ShapeDtypeStruct((parts, x.shape[-1]), jnp.float32)],
        grid=tiles.grid,
        num_warps=2,
        written=2,
        pitch=y.shape[-1],
        **tiles.constants,
    )
    return y, sums.sum(0)


class _Tiles(NamedTuple):
    """The grid of a convolution's programs, and the constants of each."""

    grid: tuple[int, int]
    constants: dict[str, Any]

    @classmethod
    def of(cls, shape: Sequence[int], kernel: jax.Array) -> "_Tiles":
        images, height, width, channels = shape
        rows, lanes = (8, 32) if channels % 32 == 0 else (16, 16)
        columns = _WIDE if width >= _WIDE else _WIDE // 2
        pixels = triton.cdiv(images * height, rows) * triton.cdiv(width, columns)
        if pixels * triton.cdiv(channels, lanes) < _FEW:
            rows, columns = rows // 4, _WIDE // 2
        blocks = triton.cdiv(channels, lanes) * triton.cdiv(width, columns)
        constants = {
            "images": images,
            "height": height,
            "width": width,
            "channels": channels,
            "size": kernel.shape[0],
            "rows": rows,
            "lanes": lanes,
            "columns": columns,
        }
        return cls((blocks, triton.cdiv(images * height, rows)), constants)


def filter_gradient(x: jax.Array, dy: jax.Array, size: int) -> jax.Array:
    """Returns the kernel's gradient, float32 [k, k, 1, C], for dy [N, H, W, C].

    x is [N, H, W, P]: its last C channels were convolved.
    """
    images, height, width, channels = dy.shape
    tap_rows = min(size, max(_TAPS // size, 1))
    lanes = next((n for n in (64, 32, 16) if channels % n == 0), 32)
    rows = 32 * _WARPS * _CHANNELS // lanes
    strip = min(_STRIP, height)
    tiles = triton.cdiv(images * triton.cdiv(height, strip), rows)
    blocks = triton.cdiv(channels, lanes) * triton.cdiv(size, tap_rows)
    steps = triton.cdiv(tiles * blocks, _PROGRAMS)
    parts = triton.cdiv(tiles, steps)
    (gradient,) = launch(
        depthwise_filter_gradient,
        x,
        dy,
        out_shape=[jax.ShapeDtypeStruct((parts, size, size, channels), jnp.float32)],
        grid=(blocks, parts),
        num_warps=_WARPS,
        images=images,
        height=height,
        width=width,
        channels=channels,
        pitch=x.shape[-1],
        size=size,
        tap_rows=tap_rows,
        strip=strip,
        rows=rows,
        lanes=lanes,
        steps=steps,
        unroll=min(_UNROLL, width),
    )
    return gradient.sum(0)[:, :, None]


@triton.constexpr_function
def _inside(index, size):
    return 0 <= index < size


@triton.constexpr_function
def _is_read(column, columns, width):
    """Returns whether an input column can lie on the map.

    If one block spans the map, columns outside the map are skipped.
    """
    return columns < width or 0 <= column < width


@triton.jit
def _load_column(
    x_ptr,
    start,
    first_column,
    inside,
    column: tl.constexpr,
    columns: tl.constexpr,
    width: tl.constexpr,
    pitch: tl.constexpr,
):
    """Loads the tile of an input column; `start` is of the column of the first result.

    `pitch` is the distance of pixels in x.
    """
    if columns < width:
        at = first_column + column
        inside = inside & (at >= 0) & (at < width)
    return load(x_ptr + start + column * pitch, inside)


@triton.jit
def _convolved(
    x_ptr,
    kernel_ptr,
    images: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    channels: tl.constexpr,
    pitch: tl.constexpr,
    size: tl.constexpr,
    rows: tl.constexpr,
    lanes: tl.constexpr,
    columns: tl.constexpr,
):
    """Returns a list with a tile of float32 results for each of a few columns, and their place.

    The place is the first pixel, its column, and tiles: the row, counted from that of the first
    pixel, the channel, and whether both exist. `pitch` is the distance of pixels in x.
    """
    tile: tl.constexpr = (rows, lanes)
    blocks: tl.constexpr = (width + columns - 1) // columns
    edge: tl.constexpr = size // 2
    first_column = tl.program_id(0) % blocks * columns
    first_row = tl.program_id(1).to(tl.int64) * rows
    row = tl.broadcast_to(tl.arange(0, rows)[:, None], tile)
    channel = tl.program_id(0) // blocks * lanes
    channel += tl.broadcast_to(tl.arange(0, lanes)[None, :], tile)
    exists = (row < images * height - first_row) & (channel < channels)
    first = first_row * width + first_column
    x_ptr += first * pitch
    map_row = ((first_row % height).to(tl.int32) + row) % height
    sums = [tl.zeros(tile, tl.float32)] * columns
    for i in range(size):
        input_row = map_row + i - edge
        inside = exists & (input_row >= 0) & (input_row < height)
        start = (row + i - edge) * (width * pitch) + channel
        taps = []
        for j in tl.static_range(size):
            taps += [load(kernel_ptr + (i * size + j) * channels + channel, exists)]
        for column in tl.static_range(-edge, columns + edge):
            if _is_read(column, columns, width):
                values = _load_column(
                    x_ptr, start, first_column, inside, column, columns, width, pitch
                )
                for result in tl.static_range(columns):
                    if _inside(column + edge - result, size):
                        sums = add_at(sums, result, values * taps[column + edge - result])
    return sums, first, first_column, row, channel, exists


@triton.jit
def depthwise_convolution(
    x_ptr,
    kernel_ptr,
    y_ptr,
    images: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    channels: tl.constexpr,
    size: tl.constexpr,
    rows: tl.constexpr,
    lanes: tl.constexpr,
    columns: tl.constexpr,
):
    """Writes a tile of results for each of a few columns."""
    sums, first, first_column, row, channel, exists = _convolved(
        x_ptr,
        kernel_ptr,
        images,
        height,
        width,
        channels,
        channels,
        size,
        rows,
        lanes,
        columns,
    )
    y_ptr += first * channels
    for column in tl.static_range(columns):
        mask = exists & (first_column + column < width)
        store(y_ptr + (row * width + column) * channels + channel, sums[column], mask)


@triton.jit
def convolution_from(
    x_ptr,
    kernel_ptr,
    bias_ptr,
    y_ptr,
    images: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    channels: tl.constexpr,
    pitch: tl.constexpr,
    size: tl.constexpr,
    rows: tl.constexpr,
    lanes: tl.constexpr,
    columns: tl.constexpr,
):
    """Writes the convolution of x's last channels, with a bias."""
    sums, first, first_column, row, channel, exists = _convolved(
        x_ptr + (pitch - channels),
        kernel_ptr,
        images,
        height,
        width,
        channels,
        pitch,
        size,
        rows,
        lanes,
        columns,
    )
    bias = load(bias_ptr + channel, channel < channels)
    y_ptr += first * channels
    for column in tl.static_range(columns):
        mask = exists & (first_column + column < width)
        store(y_ptr + (row * width + column) * channels + channel, sums[column] + bias, mask)


@triton.jit
def convolution_into(
    x_ptr,
    kernel_ptr,
    y_ptr,
    sums_ptr,
    written_ptr,
    images: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    channels: tl.constexpr,
    pitch: tl.constexpr,
    size: tl.constexpr,
    rows: tl.constexpr,
    lanes: tl.constexpr,
    columns: tl.constexpr,
):
    """Writes the last channels of y, and their sums."""
    blocks: tl.constexpr = (width + columns - 1) // columns
    sums, first, first_column, row, channel, exists = _convolved(
        x_ptr,
        kernel_ptr,
        images,
        height,
        width,
        channels,
        channels,
        size,
        rows,
        lanes,
        columns,
    )
    y_ptr += first * pitch + (pitch - channels)
    total = tl.zeros(row.shape, tl.float32)
    for column in tl.static_range(columns):
        mask = exists & (first_column + column < width)
        store(y_ptr + (row * width + column) * pitch + channel, sums[column], mask)
        total += tl.where(mask, sums[column], 0)
    lane = tl.program_id(0) // blocks * lanes + tl.arange(0, lanes)
    part = tl.program_id(1) * blocks + tl.program_id(0) % blocks
    store(sums_ptr + part * channels + lane, tl.sum(total, axis=0), lane < channels)


@triton.jit
def depthwise_filter_gradient(
    x_ptr,
    dy_ptr,
    gradient_ptr,
    images: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    channels: tl.constexpr,
    pitch: tl.constexpr,
    size: tl.constexpr,
    tap_rows: tl.constexpr,
    strip: tl.constexpr,
    rows: tl.constexpr,
    lanes: tl.constexpr,
    steps: tl.constexpr,
    unroll: tl.constexpr,
):
    """Writes the sums over some strips of rows; a tile is [strips, channels].

    A thread goes along its strip. It keeps the columns of dy that the taps of one column of x meet
    in registers, and the sums of its taps.
    """
    edge: tl.constexpr = size // 2
    tile: tl.constexpr = (rows, lanes)
    groups: tl.constexpr = (size + tap_rows - 1) // tap_rows
    x_rows: tl.constexpr = strip + tap_rows - 1
    of_image: tl.constexpr = (height + strip - 1) // strip
    blocks: tl.constexpr = (width + unroll - 1) // unroll
    part = tl.program_id(1)
    first_tap = tl.program_id(0) % groups * tap_rows
    lane = tl.program_id(0) // groups * lanes + tl.arange(0, lanes)
    channel = tl.broadcast_to(lane[None, :], tile)
    x_ptr += pitch - channels
    sums = [tl.zeros(tile, tl.float32)] * (tap_rows * size)
    for step in range(steps):
        number = (part * steps + step) * rows
        number += tl.broadcast_to(tl.arange(0, rows)[:, None], tile)
        exists = (channel < channels) & (number < images * of_image)
        top = number % of_image * strip
        row = (number // of_image * height + top).to(tl.int64)
        x_at = x_ptr + (row + first_tap - edge) * (width * pitch) + channel
        dy_at = dy_ptr + row * (width * channels) + channel
        x_masks, dy_masks = [], []
        for i in tl.static_range(x_rows):
            input_row = top + (first_tap + i - edge)
            x_masks += [exists & (input_row >= 0) & (input_row < height)]
        for i in tl.static_range(strip):
            dy_masks += [exists & (top + i < height)]
        window = [tl.zeros(tile, tl.float32)] * (edge * strip)
        for column in tl.static_range(edge):
            window += _load_rows(dy_at, dy_masks, 0, column, 0, width, channels)
        for block in range(blocks):
            first = block * unroll
            last: tl.constexpr = (blocks - 1) * unroll
            for column in tl.static_range(unroll):
                window += _load_rows(dy_at, dy_masks, first, column + edge, last, width, channels)
                values = _load_rows(x_at, x_masks, first, column, last, width, pitch)
                added = []
                for i in tl.static_range(tap_rows):
                    for j in tl.static_range(size):
                        total = sums[i * size + j]
                        for r in tl.static_range(strip):
                            gradient = window[(size - 1 - j) * strip + r]
                            total = tl.fma(values[i + r], gradient, total)
                        added += [total]
                sums = added
                window = window[strip:]
            x_at += unroll * pitch
            dy_at += unroll * channels
    for i in tl.static_range(tap_rows):
        for j in tl.static_range(size):
            place = ((part * size + first_tap + i) * size + j) * channels + lane
            mask = (lane < channels) & (first_tap + i < size)
            store(gradient_ptr + place, tl.sum(sums[i * size + j], axis=0), mask)


@triton.jit
def _load_rows(
    pointers,
    masks,
    first,
    column: tl.constexpr,
    last: tl.constexpr,
    width: tl.constexpr,
    pitch: tl.constexpr,
):
    """Loads the tiles of a column of some rows, one for each mask.

    The column is counted from `first`, where the pointers are, and which is at most `last`. `pitch`
    is the distance of pixels.
    """
    values = []
    for row in tl.static_range(len(masks)):
        mask = masks[row]
        if last + column >= width:
            mask = mask & (first + column < width)
        values += [load(pointers + (row * width + column) * pitch, mask)]
    return values
