"""Pallas TPU kernels of the depthwise convolution: channels in lanes, images in sublanes.

Maps are [H, W, N, C] here: a tile holds one pixel of 8 images and 128 channels, and a tap is an
address offset, never a shuffle. XLA gives the maps around a kernel the same layout, so that the
transposition from NHWC is free. The floor is two operations a tap on the four vector units of a
v5e; docs/performance.md compares the kernels with it. The code is short because XLA compiles every
call separately.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_IMAGES = 8  # sublanes of a float32 register
_LANES = 128
_COLUMNS = 16  # pixels of a row that are summed in registers at once, of 64 registers
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
    taps = size * size
    gradient = pl.pallas_call(
        functools.partial(_filter_gradient_kernel, height=height, size=size),
        out_shape=jax.ShapeDtypeStruct((taps, _IMAGES, channels), jnp.float32),
        grid=(pl.cdiv(channels, lanes), images // _IMAGES, pl.cdiv(height, rows)),
        in_specs=[*maps, block],
        out_specs=pl.BlockSpec((taps, _IMAGES, lanes), lambda c, n, r: (0, 0, c)),
        scratch_shapes=[_padded_rows(x, rows, lanes, size)],
        compiler_params=_compiler_params(x, size, ("parallel", "arbitrary", "arbitrary")),
        name="depthwise_filter_gradient",
        interpret=interpret,
    )(*[x] * len(maps), dy)
    return gradient.sum(1).reshape(size, size, 1, channels)


def _block_bytes(x: jax.Array, size: int, rows: int) -> int:
    """Returns the bytes of VMEM for blocks of `rows` rows: two of each map, and the scratch."""
    pixel = _IMAGES * _LANES
    padded = (rows + size - 1) * (x.shape[1] + size - 1) * pixel * 4
    return padded + 2 * (2 * rows + size - 1) * x.shape[1] * pixel * x.dtype.itemsize


def _rows(x: jax.Array, size: int) -> int:
    """Returns the rows of a block: as many as fit, or a divisor of H of at least half that."""
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
    return pltpu.VMEM((rows + size - 1, x.shape[1] + size - 1, _IMAGES, lanes), jnp.float32)


def _row_blocks(
    x: jax.Array, rows: int, lanes: int, size: int, order: Callable
) -> tuple[list[pl.BlockSpec], pl.BlockSpec]:
    """Returns the blocks of x: the rows above and below a block, if any, and the block itself.

    `order` maps the grid's three indices to those of row block, images and channels.
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
    """Copies a block of x and the rows around it to `padded`, in float32, with zeros outside."""
    *halos, x_ref = refs
    rows, width = x_ref.shape[:2]
    edge = size // 2
    first = pl.program_id(2) * rows
    zeros = jnp.zeros(padded.shape[2:], jnp.float32)

    def write(to: int, column: int, ref, row: int) -> None:
        inside = jnp.logical_and(first + to >= edge, first + to < height + edge)
        value = ref[row, column].astype(jnp.float32)
        padded[to, column + edge] = jnp.where(inside, value, 0.0)

    @pl.loop(0, width)
    def _(column):
        for i in range(edge):
            for to, halo in ((i, i), (edge + rows + i, edge + i)):
                if halos:
                    write(to, column, halos[halo], 0)
                else:
                    padded[to, column + edge] = zeros

    @pl.loop(0, rows)
    def _(row):
        for column in range(width):
            write(row + edge, column, x_ref, row)

    @pl.loop(0, padded.shape[0])
    def _(row):
        for column in range(edge):
            padded[row, column] = zeros
            padded[row, edge + width + column] = zeros


def _fold_columns(width: int, body: Callable, carry):
    """Folds body(first column, columns, carry) over parts of a row that fit into registers."""
    columns = max(part for part in range(1, _COLUMNS + 1) if width % part == 0)
    if 2 * columns >= min(width, _COLUMNS):
        return jax.lax.fori_loop(
            0, width // columns, lambda i, carry: body(i * columns, columns, carry), carry
        )
    for start in range(0, width, _COLUMNS):
        carry = body(start, min(_COLUMNS, width - start), carry)
    return carry


def _taps(columns: int, width: int, size: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """Lists the padded columns for a part of a row, with the (tap, result) pairs that use them."""
    edge = size // 2
    used = range(edge, edge + width) if columns == width else range(columns + 2 * edge)
    return [
        (column, [(tap, column - tap) for tap in range(size) if 0 <= column - tap < columns])
        for column in used
    ]


def _convolve_kernel(*refs, height: int, size: int) -> None:
    *x_refs, kernel_ref, y_ref, padded = refs
    rows, width, images, lanes = y_ref.shape
    _pad_rows(x_refs, padded, height, size)

    def convolve(row, start: int, columns: int) -> None:
        sums = [jnp.zeros((images, lanes), jnp.float32)] * columns
        for i in range(size):
            taps = [
                jnp.broadcast_to(kernel_ref[pl.ds(i * size + j, 1)], (images, lanes))
                for j in range(size)
            ]
            for column, pairs in _taps(columns, width, size):
                value = padded[row + i, start + column]
                for tap, result in pairs:
                    sums[result] += value * taps[tap]
        for result in range(columns):
            y_ref[row, start + result] = sums[result].astype(y_ref.dtype)

    @pl.loop(0, rows)
    def _(row):
        _fold_columns(width, lambda start, columns, _: convolve(row, start, columns), None)


def _filter_gradient_kernel(*refs, height: int, size: int) -> None:
    *x_refs, dy_ref, gradient_ref, padded = refs
    rows, width = dy_ref.shape[:2]
    images, row_block = pl.program_id(1), pl.program_id(2)
    _pad_rows(x_refs, padded, height, size)

    @pl.when(jnp.logical_and(images == 0, row_block == 0))
    def _():
        gradient_ref[...] = jnp.zeros(gradient_ref.shape, jnp.float32)

    def add(row, start: int, columns: int, carry: tuple[jax.Array, ...], first: int):
        sums = list(carry)
        dy = [dy_ref[row, start + column].astype(jnp.float32) for column in range(columns)]
        for i in range(len(sums) // size):
            for column, pairs in _taps(columns, width, size):
                value = padded[row + first + i, start + column]
                for tap, result in pairs:
                    sums[i * size + tap] += value * dy[result]
        return tuple(sums)

    # Rows of dy below the map are undefined.
    inside = rows if height % rows == 0 else jnp.minimum(rows, height - row_block * rows)
    for first in range(0, size, _TAP_ROWS):
        taps = range(first * size, min(first + _TAP_ROWS, size) * size)

        def add_row(row, sums, first=first):
            return _fold_columns(
                width, lambda start, columns, sums: add(row, start, columns, sums, first), sums
            )

        sums = jax.lax.fori_loop(0, inside, add_row, tuple(gradient_ref[tap] for tap in taps))
        for tap, value in zip(taps, sums, strict=True):
            gradient_ref[tap] = value
