"""Depthwise convolution for CPUs: shifted multiply-adds, which XLA fuses into one loop.

XLA's CPU backend runs a grouped convolution as scalar loops. Written as one multiply-add a tap, it
becomes one loop over the result with the channels in the vector lanes. Sums are in float32.
"""

import jax
import jax.numpy as jnp
from jax import lax

# Positions of the map that one step of the filter gradient's loop unrolls: more are faster on small
# maps, and slower to compile on all.
_UNROLLED_POSITIONS = 64


def forward(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves x [N, H, W, C] with kernel [k, k, 1, C] of x's dtype, padding k // 2."""
    _, height, width, _ = x.shape
    rows, columns = _reach(kernel.shape[0], height), _reach(kernel.shape[0], width)
    taps = lax.slice_in_dim(kernel, *_middle(kernel.shape[0], rows))
    taps = lax.slice_in_dim(taps, *_middle(kernel.shape[0], columns), axis=1).astype(jnp.float32)
    padded = _pad(x, rows // 2, columns // 2)
    total = jnp.zeros(x.shape, jnp.float32)
    for i in range(rows):
        for j in range(columns):
            total += padded[:, i : i + height, j : j + width] * taps[i, j].reshape(1, 1, 1, -1)
    return total.astype(x.dtype)


def input_gradient(dy: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns the gradient of x [N, H, W, C] for the result's gradient dy [N, H, W, C]."""
    return forward(dy, kernel[::-1, ::-1])


def filter_gradient(x: jax.Array, dy: jax.Array, *, kernel_size: int) -> jax.Array:
    """Returns the gradient of the kernel, float32 [k, k, 1, C], for x and dy [N, H, W, C]."""
    batch, height, width, channels = x.shape
    rows, columns = _reach(kernel_size, height), _reach(kernel_size, width)
    padded, dy = _pad(x, rows // 2, columns // 2), dy.astype(jnp.float32)

    def add_row(total: jax.Array, row: jax.Array) -> tuple[jax.Array, None]:
        window = lax.dynamic_slice_in_dim(padded, row, rows, axis=1)
        row_dy = lax.dynamic_slice_in_dim(dy, row, 1, axis=1)
        for column in range(width):
            total += window[:, :, column : column + columns] * row_dy[:, :, column : column + 1]
        return total, None

    total, _ = lax.scan(
        add_row,
        jnp.zeros((batch, rows, columns, channels), jnp.float32),
        jnp.arange(height),
        unroll=max(1, min(height, _UNROLLED_POSITIONS // width)),
    )
    unreached = ((kernel_size - rows) // 2,) * 2, ((kernel_size - columns) // 2,) * 2
    return jnp.pad(total.sum(0)[:, :, None], (*unreached, (0, 0), (0, 0)))


def _reach(kernel_size: int, size: int) -> int:
    """Returns how many of the middle taps can reach the map; the others see only padding."""
    return min(kernel_size, 2 * size - 1)


def _middle(size: int, part: int) -> tuple[int, int]:
    return (size - part) // 2, (size + part) // 2


def _pad(x: jax.Array, rows: int, columns: int) -> jax.Array:
    return jnp.pad(x.astype(jnp.float32), ((0, 0), (rows, rows), (columns, columns), (0, 0)))
