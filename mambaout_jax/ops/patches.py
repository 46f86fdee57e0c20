"""Convolutions with a stride, as matrix products of patches where those are faster.

XLA's CPU backend gathers images, whose few channels fill no vector, element by element. As a
product of patches, the first convolution of a network takes half of the time or less. On GPUs,
cuDNN's convolutions are not part of XLA's CUDA graphs, and with few images launching takes longer
than computing. docs/performance.md has the figures.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mambaout_jax.ops.lowering import Target, call_for_target

_FEW_CHANNELS = 8  # fewer do not fill a vector of a CPU
_FEW_TAPS = 2**24  # elements of all patches; 8 images of mambaout_base have 14 million


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def strided_conv(
    x: jax.Array, kernel: jax.Array, stride: int, padding: tuple[tuple[int, int], ...]
) -> jax.Array:
    """Convolves [N, H, W, C] with a kernel [k, k, C, features]: [N, H', W', features].

    Reverse-mode differentiation only; the derivatives are those of XLA's convolution.

    Args:
        x: images or maps.
        kernel: of x's dtype.
        stride: in rows and columns.
        padding: pixels before and after the rows, and the columns.
    """
    return call_for_target(_choose, xla_conv, x, kernel, stride=stride, padding=padding)


def _forward(x: jax.Array, kernel: jax.Array, stride: int, padding: Any):
    return jax.vjp(functools.partial(xla_conv, stride=stride, padding=padding), x, kernel)


def _backward(stride: int, padding: Any, pull: Callable, dy: jax.Array):
    return pull(dy)


strided_conv.defvjp(_forward, _backward)


def _choose(target: Target) -> Callable:
    if target.symbolic:
        return xla_conv
    return {"cpu": _on_cpu, "cuda": _on_gpu}.get(target.platform, xla_conv)


def _on_cpu(x: jax.Array, kernel: jax.Array, **options: Any) -> jax.Array:
    images = x.shape[-1] < _FEW_CHANNELS and x.dtype == jnp.float32
    return (patch_product if images else xla_conv)(x, kernel, **options)


def _on_gpu(x: jax.Array, kernel: jax.Array, *, stride: int, padding: Any) -> jax.Array:
    few = x.size * kernel.shape[0] ** 2 // stride**2 <= _FEW_TAPS
    return (patch_product if few else xla_conv)(x, kernel, stride=stride, padding=padding)


def xla_conv(
    x: jax.Array, kernel: jax.Array, *, stride: int, padding: str | Sequence[tuple[int, int]]
) -> jax.Array:
    """Computes `strided_conv` by XLA's convolution; the padding may be one that JAX names."""
    layout, strides = ("NHWC", "HWIO", "NHWC"), (stride, stride)
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=layout)


def patch_product(
    x: jax.Array, kernel: jax.Array, *, stride: int, padding: Sequence[tuple[int, int]]
) -> jax.Array:
    """Computes `strided_conv` as a matrix product of patches [N H' W', k k C]."""
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
