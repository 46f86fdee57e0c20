"""Triton kernels of a small block's dense layers, with what surrounds them, in bfloat16.

A tile is [pixels, channels] of the result: the sum of matrix products over chunks of the input's
channels. A chunk is computed in registers: `norm_dense` normalises x, and `gate_dense` multiplies
the active gate by the value. With few pixels a program mostly waits for memory, so it loads the
next chunk while it computes one.
"""

import jax
import triton
import triton.language as tl

from mambaout_jax.ops.activation_triton import activation
from mambaout_jax.ops.norm_triton import moments
from mambaout_jax.ops.triton_launch import launch, load, store

# Rows and columns of a tile: the first that give this many programs, about one for each
# multiprocessor, else the last.
_TILES, _PROGRAMS = ((64, 64), (32, 64), (16, 64), (16, 32)), 128
_CHUNK = 128  # channels, at most
_NORM_TILE = 8192  # elements: with more in its rows, a program would need too many registers
_WARPS = 8


def norm_dense(
    x: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    epsilon: float,
) -> jax.Array:
    """Returns LayerNorm(x) @ kernel + bias for x [N, H, W, C] and kernel [C, O]: [N, H, W, O]."""
    channels, outputs = kernel.shape
    pixels = x.size // channels
    lanes = triton.next_power_of_2(channels)
    rows, columns, chunk = _tile(pixels, channels, outputs, max(_NORM_TILE // lanes, 16))
    (y,) = launch(
        norm_dense_product,
        x,
        scale,
        shift,
        kernel,
        bias,
        out_shape=[jax.ShapeDtypeStruct((*x.shape[:-1], outputs), x.dtype)],
        grid=(triton.cdiv(pixels, rows), triton.cdiv(outputs, columns)),
        num_warps=_WARPS,
        pixels=pixels,
        channels=channels,
        outputs=outputs,
        rows=rows,
        columns=columns,
        lanes=lanes,
        chunk=chunk,
        epsilon=epsilon,
    )
    return y


def gate_dense(
    x: jax.Array,
    convolved: jax.Array,
    shortcut: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    act: str,
) -> jax.Array:
    """Returns shortcut + (act(gate) * value) @ kernel + bias, [N, H, W, O].

    Args:
        x: [N, H, W, 2 (I + C)]: the gate, I channels of the identity, and C that are not read.
        convolved: [N, H, W, C]. The value is the identity and `convolved`.
        shortcut: [N, H, W, O].
        kernel: [I + C, O].
        bias: [O].
        act: "gelu" or "silu".
    """
    hidden, outputs = kernel.shape
    pixels = shortcut.size // outputs
    # At least two chunks: Triton removes a loop over one, and each warp computes the whole chunk.
    rows, columns, chunk = _tile(pixels, hidden // 2, outputs)
    (y,) = launch(
        gate_dense_product,
        x,
        convolved,
        shortcut,
        kernel,
        bias,
        out_shape=[jax.ShapeDtypeStruct(shortcut.shape, x.dtype)],
        grid=(triton.cdiv(pixels, rows), triton.cdiv(outputs, columns)),
        num_warps=_WARPS,
        pixels=pixels,
        hidden=hidden,
        identity=hidden - convolved.shape[-1],
        outputs=outputs,
        rows=rows,
        columns=columns,
        chunk=chunk,
        act=act,
    )
    return y


def _tile(pixels: int, channels: int, outputs: int, most_rows: int = 64) -> tuple[int, int, int]:
    """Returns the rows and columns of a program's tile, and the channels of a chunk."""

    def fits(rows: int, columns: int) -> bool:
        programs = triton.cdiv(pixels, rows) * triton.cdiv(outputs, columns)
        return rows <= most_rows and programs >= _PROGRAMS

    rows, columns = next((tile for tile in _TILES if fits(*tile)), _TILES[-1])
    return rows, columns, min(max(triton.next_power_of_2(channels), 16), _CHUNK)


@triton.jit
def norm_dense_product(
    x_ptr,
    scale_ptr,
    shift_ptr,
    kernel_ptr,
    bias_ptr,
    y_ptr,
    pixels: tl.constexpr,
    channels: tl.constexpr,
    outputs: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    lanes: tl.constexpr,
    chunk: tl.constexpr,
    epsilon: tl.constexpr,
):
    """Writes a tile of LayerNorm(x) @ kernel + bias."""
    first, row, exists, column = _place(pixels, rows, columns)
    x_ptr += first * channels
    part = tl.arange(0, chunk)[None, :]
    next_scale = load(scale_ptr + part, part < channels)
    next_shift = load(shift_ptr + part, part < channels)
    next_kernel = _load_kernel(kernel_ptr, column, 0, channels, outputs, chunk)
    bias = load(bias_ptr + column, column < outputs)
    lane = tl.arange(0, lanes)[None, :]
    mask = exists & (lane < channels)
    mean, factor = moments(load(x_ptr + (row * channels + lane), mask), mask, channels, epsilon)
    sums = tl.zeros((rows, columns), tl.float32)
    for start in range(0, channels, chunk):
        scale, shift, kernel = next_scale, next_shift, next_kernel
        # x is in the cache since its mean was computed.
        channel = start + part
        x = load(x_ptr + (row * channels + channel), exists & (channel < channels))
        channel += chunk
        next_scale = load(scale_ptr + channel, channel < channels)
        next_shift = load(shift_ptr + channel, channel < channels)
        next_kernel = _load_kernel(kernel_ptr, column, start + chunk, channels, outputs, chunk)
        y = (x - mean) * factor * scale + shift  # 0 where there is no channel
        sums = tl.dot(y.to(kernel.dtype), kernel, sums)
    y_ptr += first * outputs
    store(y_ptr + (row * outputs + column), sums + bias, exists & (column < outputs))


@triton.jit
def gate_dense_product(
    x_ptr,
    convolved_ptr,
    shortcut_ptr,
    kernel_ptr,
    bias_ptr,
    y_ptr,
    pixels: tl.constexpr,
    hidden: tl.constexpr,
    identity: tl.constexpr,
    outputs: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    chunk: tl.constexpr,
    act: tl.constexpr,
):
    """Writes a tile of shortcut + (act(gate) * value) @ kernel + bias."""
    first, row, exists, column = _place(pixels, rows, columns)
    x_ptr += first * 2 * hidden
    convolved_ptr += first * (hidden - identity)
    next_gate, next_value = _load_gate(
        x_ptr, convolved_ptr, row, exists, 0, hidden, identity, chunk
    )
    next_kernel = _load_kernel(kernel_ptr, column, 0, hidden, outputs, chunk)
    place = first * outputs + (row * outputs + column)
    mask = exists & (column < outputs)
    shortcut = tl.load(shortcut_ptr + place, mask=mask, other=0)
    bias = load(bias_ptr + column, column < outputs)
    sums = tl.zeros((rows, columns), tl.float32)
    for start in range(0, hidden, chunk):
        gate, value, kernel = next_gate, next_value, next_kernel
        next_gate, next_value = _load_gate(
            x_ptr, convolved_ptr, row, exists, start + chunk, hidden, identity, chunk
        )
        next_kernel = _load_kernel(kernel_ptr, column, start + chunk, hidden, outputs, chunk)
        active, _ = activation(gate.to(tl.float32), act, False)
        sums = tl.dot((active * value.to(tl.float32)).to(value.dtype), kernel, sums)
    store(y_ptr + place, sums + bias + shortcut.to(tl.float32), mask)


@triton.jit
def _place(pixels: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """Returns the tile's first pixel, its rows, whether they exist, and its columns."""
    first = tl.program_id(0).to(tl.int64) * rows
    row = tl.arange(0, rows)[:, None]
    column = tl.program_id(1) * columns + tl.arange(0, columns)[None, :]
    return first, row, row < pixels - first, column


@triton.jit
def _load_gate(
    x_ptr,
    convolved_ptr,
    row,
    exists,
    start,
    hidden: tl.constexpr,
    identity: tl.constexpr,
    chunk: tl.constexpr,
):
    """Returns chunks [rows, chunk] of gate and value, 0 elsewhere."""
    channel = start + tl.arange(0, chunk)[None, :]
    mask = exists & (channel < hidden)
    gate = x_ptr + (row * (2 * hidden) + channel)
    convolved = convolved_ptr + (row * (hidden - identity) + channel - identity)
    value = tl.where(channel < identity, gate + hidden, convolved)
    return tl.load(gate, mask=mask, other=0), tl.load(value, mask=mask, other=0)


@triton.jit
def _load_kernel(
    kernel_ptr,
    column,
    start,
    channels: tl.constexpr,
    outputs: tl.constexpr,
    chunk: tl.constexpr,
):
    """Returns a chunk [chunk, columns] of the matrix, 0 outside of it."""
    channel = start + tl.arange(0, chunk)[:, None]
    mask = (channel < channels) & (column < outputs)
    return tl.load(kernel_ptr + (channel * outputs + column), mask=mask, other=0)
