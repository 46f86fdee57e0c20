"""Triton kernel of the gate's gradient for GPUs; it reads each map once."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from mambaout_jax.ops.activations import TANH_COEFFICIENTS
from mambaout_jax.ops.triton_launch import launch, load, store

_LANES = 128  # channels of a tile
_ROWS = 4  # pixels of a tile
_TANH_5, _TANH_4, _TANH_3, _TANH_2, _TANH_1, _TANH_0 = map(tl.constexpr, TANH_COEFFICIENTS)
_PROGRAMS = 16896  # 128 for each multiprocessor of an H100


def gate_gradient(
    x: jax.Array, bias: jax.Array, convolved: jax.Array, dy: jax.Array, act: str
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns x's gradient, that of `convolved`, and the sums of those of the gate and the value.

    The last channels of x's gradient, which are the convolution's, are not written. The value is
    the identity and `convolved`. The sums, float32 [hidden], are those over all pixels.
    """
    hidden = dy.shape[-1]
    pixels = dy.size // hidden
    blocks = triton.cdiv(hidden, _LANES)
    steps = triton.cdiv(pixels, _ROWS * max(_PROGRAMS // blocks, 1))
    programs = triton.cdiv(pixels, _ROWS * steps)
    dx, dconvolved, sums = launch(
        gate_product_gradient,
        x,
        bias,
        convolved,
        dy,
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(convolved.shape, x.dtype),
            jax.ShapeDtypeStruct((programs, 2, hidden), jnp.float32),
        ],
        grid=(blocks, programs),
        num_warps=2,
        pixels=pixels,
        hidden=hidden,
        identity=hidden - convolved.shape[-1],
        rows=_ROWS,
        lanes=_LANES,
        steps=steps,
        act=act,
        exact=x.dtype == jnp.float32,
    )
    dgate_sum, dvalue_sum = sums.sum(0)
    return dx, dconvolved, dgate_sum, dvalue_sum


@triton.jit
def gate_product_gradient(
    x_ptr,
    bias_ptr,
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
    tile: tl.constexpr = (rows, lanes)
    conv: tl.constexpr = hidden - identity
    row = tl.broadcast_to(tl.arange(0, rows)[:, None], tile)
    lane = tl.program_id(0) * lanes + tl.arange(0, lanes)
    channel = tl.broadcast_to(lane[None, :], tile)
    is_identity = channel < identity
    exists = channel < hidden
    gate_bias = load(bias_ptr + channel, exists)
    value_bias = load(bias_ptr + hidden + channel, is_identity)
    gate_sum = tl.zeros(tile, tl.float32)
    value_sum = tl.zeros(tile, tl.float32)
    for step in range(steps):
        first = (tl.program_id(1).to(tl.int64) * steps + step) * rows
        mask = exists & (row < pixels - first)
        place = first * 2 * hidden + (row * 2 * hidden + channel)
        conv_place = first * conv + (row * conv + channel - identity)
        gate = load(x_ptr + place, mask) + gate_bias
        value = load(x_ptr + place + hidden, mask & is_identity) + value_bias
        value += load(convolved_ptr + conv_place, mask & (channel >= identity))
        dy = load(dy_ptr + first * hidden + (row * hidden + channel), mask)
        active, slope = _activation(gate, act, exact)
        dgate = dy * slope * value
        dvalue = dy * active
        store(dx_ptr + place, dgate, mask)
        store(dx_ptr + place + hidden, dvalue, mask & is_identity)
        store(dconvolved_ptr + conv_place, dvalue, mask & (channel >= identity))
        gate_sum += dgate
        value_sum += dvalue
    place = sums_ptr + tl.program_id(1) * 2 * hidden + lane
    store(place, tl.sum(gate_sum, axis=0), lane < hidden)
    store(place + hidden, tl.sum(value_sum, axis=0), lane < hidden)


@triton.jit
def _activation(x, act: tl.constexpr, exact: tl.constexpr):
    """Returns the activation of float32 x, "gelu" or "silu", and its derivative.

    Where it is not exact, the error is that of `activations.ACTIVATIONS_NEAR`.
    """
    if act == "gelu":
        if exact:
            factor = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        else:
            square = tl.minimum(x * x, 16.0)
            polynomial = _TANH_5 * square + _TANH_4
            polynomial = polynomial * square + _TANH_3
            polynomial = polynomial * square + _TANH_2
            polynomial = polynomial * square + _TANH_1
            polynomial = polynomial * square + _TANH_0
            factor = tl.sigmoid(2 * x * polynomial)  # (1 + tanh) / 2
        slope = factor + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        factor = tl.sigmoid(x)
        slope = factor * (1 + x * (1 - factor))
    return x * factor, slope
