"""LayerNorm over channels and its gradient, on NVIDIA GPUs each in one pass over the maps."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from mambaout_jax.ops import norm_xla
from mambaout_jax.ops.kernels import by_kernels
from mambaout_jax.ops.sharded import on_parts


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    """Normalises over channels; computes mean and variance in float32 and in two passes.

    Reverse-mode differentiation only.

    Args:
        x: [N, ..., C].
        scale: float32 [C].
        bias: float32 [C].
        epsilon: added to the variance.
        dtype: of the normalised x.

    Returns:
        x itself and the normalised x. A residual branch should start from the returned x: its
        gradient is then added in the same pass that computes the gradient of the norm.
    """
    normalise = _for_target("normalise", x, epsilon=epsilon, dtype=jnp.dtype(dtype))
    (y,) = on_parts(lambda *args: (normalise(*args),), (True, False, False), (True,))(
        x, scale, bias
    )
    return x, y


def _forward(x, scale, bias, epsilon, dtype):
    x, scale, bias = x.value, scale.value, bias.value
    return layer_norm(x, scale, bias, epsilon, dtype), (x, scale)


def _backward(epsilon, dtype, residuals, gradients):
    x, scale = residuals
    shortcut, dy = gradients
    if isinstance(dy, SymbolicZero):
        dy = jnp.zeros(dy.shape, dy.dtype)
    shortcuts = () if isinstance(shortcut, SymbolicZero) else (shortcut,)
    gradient = _for_target("gradient", x, epsilon=epsilon)
    split = (True, False, True, *(True for _ in shortcuts))
    return on_parts(gradient, split, (True, False, False))(x, scale, dy, *shortcuts)


layer_norm.defvjp(_forward, _backward, symbolic_zeros=True)


def _for_target(name: str, x: jax.Array, **options: Any) -> Callable:
    if x.ndim <= 2:  # for vectors, as in the head, a kernel compiles longer than it saves
        return functools.partial(getattr(norm_xla, name), **options)
    return by_kernels("cuda", "mambaout_jax.ops.norm_triton", norm_xla, name, **options)
