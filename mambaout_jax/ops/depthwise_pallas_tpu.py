"""Pallas TPU kernels of the depthwise convolution: channels in lanes, images in sublanes.

Maps are [H, W, N, C] here, so that a tile holds 8 images by 128 channels of one pixel and a tap is
another address, never a shuffle. XLA gives the maps around the kernel the same layout, and the
transposition from NHWC costs nothing. A v5e's four vector units take two operations a tap; the
taps that would meet padding at the left and right are left out. docs/performance.md has the counts.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_IMAGES = 8  # sublanes of a float32 register
_LANES = 128
_COLUMNS = 14  # pixels of a row that are summed in registers at once, of 64 registers
_TAP_ROWS = 3  # rows of the filter whose gradients are summed in registers at once
_VMEM = 13 * 2**20  # bytes of a kernel's blocks: every generation has at least 16 MiB


def convolve(x: jax.Array, kernel: jax.Array, *, interpret: bool = False) -> jax.Array:
    """Convolves x [H, W, N, C], N a multiple of 8, with kernel float32 [k, k, 1, C]."""
    height, _, images, channels = x.shape
    size = kernel.shape[0]
    rows, lanes = _rows(x, size), min(channels, _LANES)
    maps, block = _row_blocks(x, rows, lanes, size, lambda n, c, r: (r, n, c))
    return pl.pallas_call(
        functools.partial(_convolve_kernel, height=height, size=size),
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(images // _IMAGES, pl.cdiv(channels, lanes), pl.cdiv(height, rows)),
        in_specs=[*maps, pl.BlockSpec((size * size, lanes), lambda n, c, r: (0, c))],
        out_specs=block,
        scratch_shapes=[_padded_rows(x, rows, lanes, size)],
        compiler_params=_compiler_params(x, size, ("parallel", "parallel", "parallel")),
        name="depthwise_convolution",
        interpret=interpret,
    )(*[x] * len(maps), kernel.reshape(size * size, channels))


def filter_gradient(
    x: jax.Array, dy: jax.Array, size: int, *, interpret: bool = False
) -> jax.Array:
    """Returns the kernel's gradient, float32 [k, k, 1, C], for x and dy [H, W, N, C]."""
    height, _, images, channels = x.shape
    rows, lanes = _rows(x, size), min(channels, _LANES)
    maps, block = _row_blocks(x, rows, lanes, size, lambda c, n, r: (r, n, c))
    gradient = pl.pallas_call(
        functools.partial(_filter_gradient_kernel, height=height, size=size),
        out_shape=jax.ShapeDtypeStruct((size * size, channels), jnp.float32),
        grid=(pl.cdiv(channels, lanes), images // _IMAGES, pl.cdiv(height, rows)),
        in_specs=[*maps, block],
        out_specs=pl.BlockSpec((size * size, lanes), lambda c, n, r: (0, c)),
        scratch_shapes=[
            _padded_rows(x, rows, lanes, size),
            pltpu.VMEM((size * size, _IMAGES, lanes), jnp.float32),
        ],
        compiler_params=_compiler_params(x, size, ("parallel", "arbitrary", "arbitrary")),
        name="depthwise_filter_gradient",
        interpret=interpret,
    )(*[x] * len(maps), dy)
    return gradient.reshape(size, size, 1, channels)


def _block_bytes(x: jax.Array, size: int, rows: int) -> int:
    """Returns the VMEM that blocks of so many rows need: two of each map and the scratch."""
    row = x.shape[1] * _IMAGES * _LANES
    return row * ((rows + size) * 4 + (4 * rows + 2 * size) * x.dtype.itemsize)


def _rows(x: jax.Array, size: int) -> int:
    """Returns the rows of a block: what fits, rather a divisor of the height than a little more."""
    height = x.shape[0]
    fitting = [rows for rows in range(1, height + 1) if _block_bytes(x, size, rows) <= _VMEM] or [1]
    divisors = [rows for rows in fitting if height % rows == 0]
    return divisors[-1] if 2 * divisors[-1] >= fitting[-1] else fitting[-1]


def _compiler_params(x: jax.Array, size: int, semantics: tuple) -> pltpu.CompilerParams:
    needed = _block_bytes(x, size, _rows(x, size))
    return pltpu.CompilerParams(
        dimension_semantics=semantics,
        vmem_limit_bytes=needed * 5 // 4 if needed > _VMEM else None,
    )


def _padded_rows(x: jax.Array, rows: int, lanes: int, size: int):
    return pltpu.VMEM((rows + size - 1, x.shape[1], _IMAGES, lanes), jnp.float32)


def _row_blocks(
    x: jax.Array, rows: int, lanes: int, size: int, order: Callable
) -> tuple[list[pl.BlockSpec], pl.BlockSpec]:
    """Returns the blocks of x: each row above and below one, if any, then the rows themselves.

    `order` sorts the grid's three indices into those of row block, images and channels.
    """
    height, width, _, _ = x.shape

    def halo(offset: int) -> pl.BlockSpec:
        def index(*grid):
            row_block, images, channels = order(*grid)
            return jnp.clip(row_block * rows + offset, 0, height - 1), 0, images, channels

        return pl.BlockSpec((1, width, _IMAGES, lanes), index)

    def index(*grid):
        row_block, images, channels = order(*grid)
        return row_block, 0, images, channels

    block = pl.BlockSpec((rows, width, _IMAGES, lanes), index)
    edge = size // 2
    offsets = [*range(-edge, 0), *range(rows, rows + edge)] if rows < height else []
    return [*(halo(offset) for offset in offsets), block], block


def _pad_rows(refs: Sequence, padded, height: int, size: int) -> None:
    """Writes the block of x with its rows above and below to `padded`, float32, zeros outside."""
    *halos, x_ref = refs
    rows, width = x_ref.shape[:2]
    edge = size // 2
    first = pl.program_id(2) * rows

    def write(to: int, ref, row: int) -> None:
        inside = jnp.logical_and(first + to >= edge, first + to < height + edge)
        for column in range(width):
            padded[to, column] = jnp.where(inside, ref[row, column].astype(jnp.float32), 0.0)

    for i in range(edge):
        for to, halo in ((i, i), (edge + rows + i, edge + i)):
            if halos:
                write(to, halos[halo], 0)
            else:
                padded[to] = jnp.zeros(padded.shape[1:], jnp.float32)

    @pl.loop(0, rows)
    def _(row):
        write(row + edge, x_ref, row)


def _taps(column: int, start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Returns (tap, result) for the results within start to stop that an input column reaches."""
    reached = [(tap, column - tap + size // 2) for tap in range(size)]
    return [(tap, result) for tap, result in reached if start <= result < stop]


def _column_blocks(width: int) -> list[tuple[int, int]]:
    """Returns the (start, stop) of even parts of a row that registers can hold."""
    step = math.ceil(width / math.ceil(width / _COLUMNS))
    return [(start, min(start + step, width)) for start in range(0, width, step)]


def _inputs(start: int, stop: int, width: int, size: int) -> range:
    return range(max(0, start - size // 2), min(width, stop + size // 2))


def _convolve_kernel(*refs, height: int, size: int) -> None:
    *x_refs, kernel_ref, y_ref, padded = refs
    rows, width, images, lanes = y_ref.shape
    _pad_rows(x_refs, padded, height, size)

    @pl.loop(0, rows)
    def _(row):
        for start, stop in _column_blocks(width):
            sums = [jnp.zeros((images, lanes), jnp.float32)] * (stop - start)
            for i in range(size):
                taps = [
                    jnp.broadcast_to(kernel_ref[pl.ds(i * size + j, 1)], (images, lanes))
                    for j in range(size)
                ]
                for column in _inputs(start, stop, width, size):
                    value = padded[row + i, column]
                    for tap, result in _taps(column, start, stop, size):
                        sums[result - start] += value * taps[tap]
            for result in range(start, stop):
                y_ref[row, result] = sums[result - start].astype(y_ref.dtype)


def _filter_gradient_kernel(*refs, height: int, size: int) -> None:
    *x_refs, dy_ref, gradient_ref, padded, total = refs
    rows, width = dy_ref.shape[:2]
    images, row_block = pl.program_id(1), pl.program_id(2)
    _pad_rows(x_refs, padded, height, size)

    @pl.when(jnp.logical_and(images == 0, row_block == 0))
    def _():
        total[...] = jnp.zeros(total.shape, jnp.float32)

    def add_row(row, carry: tuple[jax.Array, ...], first_tap_row: int) -> tuple[jax.Array, ...]:
        sums = list(carry)
        for start, stop in _column_blocks(width):
            dy = [dy_ref[row, column].astype(jnp.float32) for column in range(start, stop)]
            for i in range(len(sums) // size):
                for column in _inputs(start, stop, width, size):
                    value = padded[row + first_tap_row + i, column]
                    for tap, result in _taps(column, start, stop, size):
                        sums[i * size + tap] += value * dy[result - start]
        return tuple(sums)

    # The rows of dy below the map hold anything.
    inside = rows if height % rows == 0 else jnp.minimum(rows, height - row_block * rows)
    for i in range(0, size, _TAP_ROWS):
        taps = range(i * size, min(i + _TAP_ROWS, size) * size)
        sums = jax.lax.fori_loop(
            0,
            inside,
            functools.partial(add_row, first_tap_row=i),
            tuple(total[tap] for tap in taps),
        )
        for tap, value in zip(taps, sums, strict=True):
            total[tap] = value

    @pl.when(jnp.logical_and(images == pl.num_programs(1) - 1, row_block == pl.num_programs(2) - 1))
    def _():
        for tap in range(size * size):
            gradient_ref[pl.ds(tap, 1)] = total[tap].sum(0, keepdims=True)
