"""Triton kernels of the stem up to its activation, and of its gradient, for GPUs.

A tile is [pixels, features] of the result. It is the product of a tile of patches, [pixels, taps],
with the convolution's kernel; a tap more, which is always 1, has the bias.
"""

from typing import Any

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from mambaout_jax.ops.activation_triton import activation
from mambaout_jax.ops.norm_triton import normalised, normalised_gradient
from mambaout_jax.ops.triton_launch import launch, load, store

_ROWS, _WARPS = 64, 4  # pixels of a tile, warps of a program
_PROGRAMS, _GRADIENT_PROGRAMS = 4224, 528  # 32 and 4 for each multiprocessor of an H200


def forward(
    images: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    *,
    act: str,
    epsilon: float,
) -> jax.Array:
    """As `xla.forward`."""
    shape, programs, constants = _tiles(images, kernel, _PROGRAMS)
    (y,) = launch(
        first_convolution,
        images,
        _matrix(kernel, bias),
        scale,
        shift,
        out_shape=[jax.ShapeDtypeStruct(shape, images.dtype)],
        grid=(programs,),
        num_warps=_WARPS,
        act=act,
        epsilon=epsilon,
        **constants,
    )
    return y


def backward(
    images: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    dy: jax.Array,
    *,
    act: str,
    epsilon: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """As `xla.backward`."""
    _, programs, constants = _tiles(images, kernel, _GRADIENT_PROGRAMS)
    matrix = _matrix(kernel, bias)
    sums = jax.ShapeDtypeStruct((programs, *matrix.shape), jnp.float32)
    channel_sums = jax.ShapeDtypeStruct((programs, 2, scale.size), jnp.float32)
    dmatrix, dnorm = launch(
        first_convolution_gradient,
        images,
        matrix,
        scale,
        shift,
        dy,
        out_shape=[sums, channel_sums],
        grid=(programs,),
        num_warps=_WARPS,
        act=act,
        epsilon=epsilon,
        **constants,
    )
    dmatrix, dnorm = dmatrix.sum(0), dnorm.sum(0)
    return dmatrix[:-1].reshape(kernel.shape), dmatrix[-1], dnorm[0], dnorm[1]


def _matrix(kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns the kernel as [9 C + 1, F], with the bias in its last row."""
    return jnp.concatenate((kernel.reshape(-1, bias.size), bias[None]))


def _tiles(
    images: jax.Array, kernel: jax.Array, programs: int
) -> tuple[tuple[int, ...], int, dict[str, Any]]:
    """Returns the shape of the result, the number of programs, and the constants of each."""
    count, height, width, channels = images.shape
    features = kernel.shape[-1]
    shape = (count, (height + 1) // 2, (width + 1) // 2, features)
    pixels = shape[0] * shape[1] * shape[2]
    steps = triton.cdiv(pixels, _ROWS * programs)
    constants = {
        "pixels": pixels,
        "height": height,
        "width": width,
        "channels": channels,
        "features": features,
        "rows": _ROWS,
        "taps": max(triton.next_power_of_2(9 * channels + 1), 16),
        "lanes": max(triton.next_power_of_2(features), 16),
        "steps": steps,
        "exact": images.dtype == jnp.float32,
    }
    return shape, triton.cdiv(pixels, _ROWS * steps), constants


@triton.jit
def first_convolution(
    images_ptr,
    matrix_ptr,
    scale_ptr,
    shift_ptr,
    y_ptr,
    pixels: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    channels: tl.constexpr,
    features: tl.constexpr,
    rows: tl.constexpr,
    taps: tl.constexpr,
    lanes: tl.constexpr,
    steps: tl.constexpr,
    act: tl.constexpr,
    epsilon: tl.constexpr,
    exact: tl.constexpr,
):
    """Writes the activation of some rows of pixels."""
    lane = tl.arange(0, lanes)
    matrix = _load_matrix(matrix_ptr, channels, features, taps, lanes)
    scale = load(scale_ptr + lane, lane < features)[None, :]
    shift = load(shift_ptr + lane, lane < features)[None, :]
    row = tl.arange(0, rows)
    for step in range(steps):
        first = (tl.program_id(0).to(tl.int64) * steps + step) * rows
        patches = _load_patches(images_ptr, first, pixels, height, width, channels, rows, taps)
        convolved = _product(patches, matrix, exact)  # 0 where there is no feature
        y, _ = normalised(convolved, (lane < features)[None, :], features, epsilon)
        active, _ = activation(y * scale + shift, act, exact)
        mask = (row < pixels - first)[:, None] & (lane < features)[None, :]
        store(y_ptr + first * features + (row[:, None] * features + lane[None, :]), active, mask)


@triton.jit
def first_convolution_gradient(
    images_ptr,
    matrix_ptr,
    scale_ptr,
    shift_ptr,
    dy_ptr,
    dmatrix_ptr,
    dnorm_ptr,
    pixels: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    channels: tl.constexpr,
    features: tl.constexpr,
    rows: tl.constexpr,
    taps: tl.constexpr,
    lanes: tl.constexpr,
    steps: tl.constexpr,
    act: tl.constexpr,
    epsilon: tl.constexpr,
    exact: tl.constexpr,
):
    """Writes the sums of the weights' gradients over some rows of pixels."""
    lane = tl.arange(0, lanes)
    matrix = _load_matrix(matrix_ptr, channels, features, taps, lanes)
    scale = load(scale_ptr + lane, lane < features)[None, :]
    shift = load(shift_ptr + lane, lane < features)[None, :]
    row = tl.arange(0, rows)
    dmatrix = tl.zeros((taps, lanes), tl.float32)
    dscale = tl.zeros((rows // 2, lanes), tl.float32)
    dshift = tl.zeros((rows // 2, lanes), tl.float32)
    place = row[:, None] * features + lane[None, :]
    first = tl.program_id(0).to(tl.int64) * steps * rows
    mask = (row < pixels - first)[:, None] & (lane < features)[None, :]
    next_dy = tl.load(dy_ptr + first * features + place, mask=mask, other=0)
    for _ in range(steps):
        patches = _load_patches(images_ptr, first, pixels, height, width, channels, rows, taps)
        present, dy = mask, next_dy.to(tl.float32)
        # The next tile is loaded while this one is computed.
        first += rows
        mask = (row < pixels - first)[:, None] & (lane < features)[None, :]
        next_dy = tl.load(dy_ptr + first * features + place, mask=mask, other=0)
        convolved = _product(patches, matrix, exact)  # 0 where there is no feature
        y, factor = normalised(convolved, (lane < features)[None, :], features, epsilon)
        _, slope = activation(y * scale + shift, act, exact)
        dy *= slope
        dscale += _pairs(dy * y, rows, lanes)
        dshift += _pairs(dy, rows, lanes)
        # Not 0 where there is no feature: the mean is subtracted there too.
        dconv = normalised_gradient(y, factor, dy * scale, features)
        dconv = tl.where(present, dconv, 0)
        dmatrix += _product(tl.trans(patches), dconv.to(patches.dtype), exact)
    tap = tl.arange(0, taps)[:, None]
    place = (tl.program_id(0) * (9 * channels + 1) + tap) * features + lane[None, :]
    mask = (tap <= 9 * channels) & (lane < features)[None, :]
    store(dmatrix_ptr + place, dmatrix, mask)
    place = dnorm_ptr + tl.program_id(0) * 2 * features + lane
    store(place, tl.sum(dscale, axis=0), lane < features)
    store(place + features, tl.sum(dshift, axis=0), lane < features)


@triton.jit
def _pairs(values, rows: tl.constexpr, lanes: tl.constexpr):
    """Returns the sums of rows 8 apart: a thread has both in the result of a matrix product."""
    pairs = tl.sum(tl.reshape(values, (rows // 16, 2, 8, lanes)), axis=1)
    return tl.reshape(pairs, (rows // 2, lanes))


@triton.jit
def _load_matrix(
    matrix_ptr,
    channels: tl.constexpr,
    features: tl.constexpr,
    taps: tl.constexpr,
    lanes: tl.constexpr,
):
    """Returns the kernel and the bias, [taps, features], in the dtype of the array."""
    tap = tl.arange(0, taps)[:, None]
    lane = tl.arange(0, lanes)[None, :]
    mask = (tap <= 9 * channels) & (lane < features)
    return tl.load(matrix_ptr + tap * features + lane, mask=mask, other=0)


@triton.jit
def _load_patches(
    images_ptr,
    first,
    pixels: tl.constexpr,
    height: tl.constexpr,
    width: tl.constexpr,
    channels: tl.constexpr,
    rows: tl.constexpr,
    taps: tl.constexpr,
):
    """Returns the patches of some pixels, in the dtype of the images, with a tap of ones."""
    out_width: tl.constexpr = (width + 1) // 2
    out_height: tl.constexpr = (height + 1) // 2
    image = first // (out_width * out_height)
    pixel = (first % (out_width * out_height)).to(tl.int32) + tl.arange(0, rows)
    top = pixel // out_width % out_height * 2 - 1
    left = pixel % out_width * 2 - 1
    tap = tl.arange(0, taps)
    y = top[:, None] + (tap // (3 * channels))[None, :]
    x = left[:, None] + (tap // channels % 3)[None, :]
    mask = (tl.arange(0, rows) < pixels - first)[:, None] & (tap < 9 * channels)[None, :]
    mask = mask & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    corner = ((pixel // (out_width * out_height) * height + top) * width + left) * channels
    offset = (tap // (3 * channels) * width + tap // channels % 3) * channels + tap % channels
    images_ptr += image * (height * width * channels)
    one = (tap == 9 * channels)[None, :].to(tl.float32).to(images_ptr.dtype.element_ty)
    return tl.load(images_ptr + (corner[:, None] + offset[None, :]), mask=mask, other=one)


@triton.jit
def _product(a, b, exact: tl.constexpr):
    """Returns the float32 matrix product."""
    return tl.dot(a, b, input_precision="ieee" if exact else "tf32")
