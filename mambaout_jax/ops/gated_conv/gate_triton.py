"""Triton kernels of the gate and its gradient for GPUs; they read each map once."""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from mambaout_jax.ops.activation_triton import activation
from mambaout_jax.ops.triton_launch import launch, load, store

_LANES = 128  # channels of a tile
# Pixels of a tile, and programs: as many as the second axis of a grid may have, and 128 for each
# multiprocessor of an H200.
_ROWS, _PROGRAMS = 8, 65535
_GRADIENT_ROWS, _GRADIENT_PROGRAMS = 4, 16896


def gate_product(x: jax.Array, convolved: jax.Array, act: str) -> jax.Array:
    """Returns act(gate) * value, [N, H, W, I + C].

    Args:
        x: [N, H, W, 2 (I + C)]: the gate, I channels of the identity, and C that are not read.
        convolved: [N, H, W, C]. The value is the identity and `convolved`.
        act: "gelu" or "silu".
    """
    *maps, channels = x.shape
    grid, constants = _tiles(x, convolved, _ROWS, _PROGRAMS)
    (y,) = launch(
        gate_product_forward,
        x,
        convolved,
        out_shape=[jax.ShapeDtypeStruct((*maps, channels // 2), x.dtype)],
        grid=grid,
        num_warps=4,
        act=act,
        **constants,
    )
    return y


def gate_gradient(
    x: jax.Array, convolved: jax.Array, dy: jax.Array, act: str
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns x's gradient, that of `convolved`, and the sums of those of the gate and the value.

    x is the one with its bias, and the value is the identity and `convolved`. The last channels of
    x's gradient, which are the convolution's, are not written. The sums, float32 [hidden], are
    those over all pixels.
    """
    grid, constants = _tiles(x, convolved, _GRADIENT_ROWS, _GRADIENT_PROGRAMS)
    dx, dconvolved, sums = launch(
        gate_product_gradient,
        x,
        convolved,
        dy,
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(convolved.shape, x.dtype),
            jax.ShapeDtypeStruct((grid[1], 2, dy.shape[-1]), jnp.float32),
        ],
        grid=grid,
        num_warps=2,
        act=act,
        **constants,
    )
    dgate_sum, dvalue_sum = sums.sum(0)
    return dx, dconvolved, dgate_sum, dvalue_sum


def _tiles(
    x: jax.Array, convolved: jax.Array, rows: int, programs: int
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Returns the grid of programs, and the constants of each."""
    hidden = x.shape[-1] // 2
    pixels = x.size // x.shape[-1]
    blocks = triton.cdiv(hidden, _LANES)
    steps = triton.cdiv(pixels, rows * max(programs // blocks, 1))
    constants = {
        "pixels": pixels,
        "hidden": hidden,
        "identity": hidden - convolved.shape[-1],
        "rows": rows,
        "lanes": _LANES,
        "steps": steps,
        "exact": x.dtype == jnp.float32,
    }
    return (blocks, triton.cdiv(pixels, rows * steps)), constants


@triton.jit
def gate_product_forward(
    x_ptr,
    convolved_ptr,
    y_ptr,
    pixels: tl.constexpr,
    hidden: tl.constexpr,
    identity: tl.constexpr,
    rows: tl.constexpr,
    lanes: tl.constexpr,
    steps: tl.constexpr,
    act: tl.constexpr,
    exact: tl.constexpr,
):
    """Writes the product of some rows of pixels."""
    for step in range(steps):
        first = (tl.program_id(1).to(tl.int64) * steps + step) * rows
        row, channel, mask, gate, value = _load(
            x_ptr, convolved_ptr, first, pixels, hidden, identity, rows, lanes
        )
        active, _ = activation(gate, act, exact)
        store(y_ptr + first * hidden + (row * hidden + channel), active * value, mask)


@triton.jit
def gate_product_gradient(
    x_ptr,
    convolved_ptr,
    dy_ptr,
    dx_ptr,
    dconvolved_ptr,
    sums_ptr,
    pixels: tl.constexpr,
    hidden: tl.constexpr,
    identity: tl.constexpr,
    rows: tl.constexpr,
    lanes: tl.constexpr,
    steps: tl.constexpr,
    act: tl.constexpr,
    exact: tl.constexpr,
):
    """Writes the gradients of gate and value of some rows of pixels, and the sums over them."""
    conv: tl.constexpr = hidden - identity
    gate_sum = tl.zeros((rows, lanes), tl.float32)
    value_sum = tl.zeros((rows, lanes), tl.float32)
    for step in range(steps):
        first = (tl.program_id(1).to(tl.int64) * steps + step) * rows
        row, channel, mask, gate, value = _load(
            x_ptr, convolved_ptr, first, pixels, hidden, identity, rows, lanes
        )
        place = first * 2 * hidden + (row * 2 * hidden + channel)
        conv_place = first * conv + (row * conv + channel - identity)
        dy = load(dy_ptr + first * hidden + (row * hidden + channel), mask)
        active, slope = activation(gate, act, exact)
        dgate = dy * slope * value
        dvalue = dy * active
        store(dx_ptr + place, dgate, mask)
        store(dx_ptr + place + hidden, dvalue, mask & (channel < identity))
        store(dconvolved_ptr + conv_place, dvalue, mask & (channel >= identity))
        gate_sum += dgate
        value_sum += dvalue
    lane = tl.program_id(0) * lanes + tl.arange(0, lanes)
    place = sums_ptr + tl.program_id(1) * 2 * hidden + lane
    store(place, tl.sum(gate_sum, axis=0), lane < hidden)
    store(place + hidden, tl.sum(value_sum, axis=0), lane < hidden)


@triton.jit
def _load(
    x_ptr,
    convolved_ptr,
    first,
    pixels: tl.constexpr,
    hidden: tl.constexpr,
    identity: tl.constexpr,
    rows: tl.constexpr,
    lanes: tl.constexpr,
):
    """Returns tiles of some rows of pixels: their place, the gate and the value.

    The place is the pixel, counted from the first, the channel, and whether both exist.
    """
    tile: tl.constexpr = (rows, lanes)
    conv: tl.constexpr = hidden - identity
    row = tl.broadcast_to(tl.arange(0, rows)[:, None], tile)
    channel = tl.program_id(0) * lanes + tl.broadcast_to(tl.arange(0, lanes)[None, :], tile)
    mask = (row < pixels - first) & (channel < hidden)
    x_ptr += first * 2 * hidden + (row * 2 * hidden + channel)
    convolved_ptr += first * conv + (row * conv + channel - identity)
    value = load(x_ptr + hidden, mask & (channel < identity))
    value += load(convolved_ptr, mask & (channel >= identity))
    return row, channel, mask, load(x_ptr, mask), value
