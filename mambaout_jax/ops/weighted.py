"""Weights that are rounded for a computation, with gradients of a type of their own."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mambaout_jax.ops.sharded import gathered, on_mesh_of, on_parts


def weighted(
    function: Callable[..., jax.Array], gradient_dtype: Any, x: jax.Array, *weights: jax.Array
) -> jax.Array:
    """Returns function(x, *weights), of weights rounded to x's dtype.

    Left to itself, XLA sums the gradients of rounded weights over the devices in x's dtype. Here,
    each device turns its sum into `gradient_dtype` first.

    Reverse-mode differentiation only, where the two dtypes differ.

    Args:
        function: affine in all its weights together.
        gradient_dtype: in which the weights' gradients are summed over the devices.
        x: [N, ...], the batch on axis 0.
        *weights: float32.
    """
    weights = tuple(on_mesh_of(x, weight) for weight in weights)
    if x.dtype == gradient_dtype:
        return function(x, *_rounded(x, weights))
    return _weighted(function, jnp.dtype(gradient_dtype), x, weights)


def _rounded(x: jax.Array, weights: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(gathered(x, weight.astype(x.dtype)) for weight in weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weighted(function, gradient_dtype, x, weights):
    return _forward(function, gradient_dtype, x, weights)[0]


def _forward(function, gradient_dtype, x, weights):
    rounded = _rounded(x, weights)
    return function(x, *rounded), (x, weights, rounded)


def _backward(function, gradient_dtype, residuals, dy):
    x, weights, rounded = residuals
    _, transpose = jax.vjp(lambda x: function(x, *rounded), x)

    def on_part(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        # The function is affine: its gradient is the same at all weights.
        zeros = [jnp.zeros(weight.shape, x.dtype) for weight in rounded]
        _, transpose = jax.vjp(functools.partial(function, x), *zeros)
        return tuple(gradient.astype(gradient_dtype) for gradient in transpose(dy))

    gradients = on_parts(on_part, (True, True), (False,) * len(rounded))(x, dy)
    pairs = zip(gradients, weights, strict=True)
    return (*transpose(dy), tuple(gradient.astype(weight.dtype) for gradient, weight in pairs))


_weighted.defvjp(_forward, _backward)
