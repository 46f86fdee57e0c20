"""Convolution of images, whose few channels fill no vector of a CPU.

XLA's CPU backend gathers such images element by element. As a matrix product of their patches, the
first convolution of a network takes half of the time or less; docs/performance.md has the figures.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mambaout_jax.ops.lowering import Target, call_for_target


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def image_conv(
    x: jax.Array, kernel: jax.Array, stride: int, padding: tuple[tuple[int, int], ...]
) -> jax.Array:
    """Convolves [N, H, W, C] with a kernel [k, k, C, features]: [N, H', W', features].

    Reverse-mode differentiation only; the derivatives are those of XLA's convolution.

    Args:
        x: images.
        kernel: of x's dtype.
        stride: in rows and columns.
        padding: pixels before and after the rows, and the columns.
    """
    return call_for_target(_choose, xla_conv, x, kernel, stride=stride, padding=padding)


def _forward(x: jax.Array, kernel: jax.Array, stride: int, padding: Any):
    return jax.vjp(functools.partial(xla_conv, stride=stride, padding=padding), x, kernel)


def _backward(stride: int, padding: Any, pull: Callable, dy: jax.Array):
    return pull(dy)


image_conv.defvjp(_forward, _backward)


def _choose(target: Target) -> Callable:
    return patch_product if target.platform == "cpu" and not target.symbolic else xla_conv


def xla_conv(
    x: jax.Array, kernel: jax.Array, *, stride: int, padding: str | Sequence[tuple[int, int]]
) -> jax.Array:
    """Computes `image_conv` by XLA's convolution; the padding may be one that JAX names."""
    layout, strides = ("NHWC", "HWIO", "NHWC"), (stride, stride)
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=layout)


def patch_product(
    x: jax.Array, kernel: jax.Array, *, stride: int, padding: Sequence[tuple[int, int]]
) -> jax.Array:
    """Computes `image_conv` as a matrix product of patches [N H' W', k k C]."""
    size = kernel.shape[0]
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = ((side - size) // stride + 1 for side in x.shape[1:3])

    def shifted(row: int, column: int) -> jax.Array:
        rows = slice(row, row + (height - 1) * stride + 1, stride)
        return x[:, rows, slice(column, column + (width - 1) * stride + 1, stride)]

    patches = jnp.concatenate([shifted(i, j) for i in range(size) for j in range(size)], axis=-1)
    matrix = kernel.reshape(-1, kernel.shape[-1])
    y = patches.reshape(-1, matrix.shape[0]) @ matrix
    return y.reshape(x.shape[0], height, width, -1)
