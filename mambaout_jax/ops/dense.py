"""Dense layers, and the two of the Gated CNN block, whose hidden channels are padded.

The block's hidden channels are of two kinds: the last ones of the gate and of the value go with the
convolution, those before them with the identity. Matrix units want rows of whole 16 bytes, which
the 341 or 1365 hidden channels of mambaout_base are not. So `split_dense` pads the identity's
channels with zeros, in the gate and in the value, and `merge_dense` ignores them. The kernels keep
the shapes that they have without padding.

Kernels and biases are rounded to x's dtype; `ops.weighted` says what `gradient_dtype` is.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mambaout_jax.ops.weighted import weighted

_MULTIPLE = 8  # channels of 2 bytes


def dense(x: jax.Array, kernel: jax.Array, bias: jax.Array, gradient_dtype: Any) -> jax.Array:
    """Returns x @ kernel + bias, [..., O], for x [..., I], kernel [I, O] and bias [O]."""
    return weighted(_affine, gradient_dtype, x, kernel, bias)


def _affine(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return x @ kernel + bias.reshape((1,) * (x.ndim - 1) + (-1,))


def split_dense(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, conv: int, gradient_dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns `dense`, split into the gate, the identity's channels and the convolution's.

    Args:
        x: [..., I].
        kernel: [I, 2 H].
        bias: [2 H].
        conv: the convolution's channels, at most H.
        gradient_dtype: as in `dense`.

    Returns:
        The gate [..., H + P], the identity's channels [..., H - conv + P] and the convolution's
        [..., conv]; P of the channels are zero.
    """
    kernel, bias = split_weights(kernel, bias, conv)
    hidden = bias.shape[0] // 2
    y = dense(x, kernel, bias, gradient_dtype)
    gate, identity, convolved = jnp.split(y, (hidden, 2 * hidden - conv), axis=-1)
    return gate, identity, convolved


def split_weights(kernel: jax.Array, bias: jax.Array, conv: int) -> tuple[jax.Array, jax.Array]:
    """Returns `split_dense`'s kernel [I, 2 (H + P)] and bias, padded with zeros."""
    hidden = bias.shape[0] // 2
    padding = -(hidden - conv) % _MULTIPLE
    if padding:
        for place in (2 * hidden - conv, hidden - conv):
            kernel = _insert_zeros(kernel, place, padding, axis=1)
            bias = _insert_zeros(bias, place, padding, axis=0)
    return kernel, bias


def merge_dense(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, conv: int, gradient_dtype: Any
) -> jax.Array:
    """Returns `dense` of x [..., H + P] as `split_dense` pads it, for a kernel [H, O]: [..., O]."""
    return dense(x, merge_weights(kernel, conv), bias, gradient_dtype)


def merge_weights(kernel: jax.Array, conv: int) -> jax.Array:
    """Returns `merge_dense`'s kernel [H + P, O], padded with zeros."""
    identity = kernel.shape[0] - conv
    padding = -identity % _MULTIPLE
    return _insert_zeros(kernel, identity, padding, axis=0) if padding else kernel


def _insert_zeros(array: jax.Array, place: int, width: int, axis: int) -> jax.Array:
    before, after = jnp.split(array, (place,), axis=axis)
    shape = (*array.shape[:axis], width, *array.shape[axis + 1 :])
    return jnp.concatenate((before, jnp.zeros(shape, array.dtype), after), axis=axis)
