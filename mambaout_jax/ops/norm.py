"""LayerNorm over channels and its gradient, on NVIDIA GPUs each in one pass over the maps."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from mambaout_jax.ops.kernels import kernels_usable
from mambaout_jax.ops.lowering import Target, call_for_target
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


def _per_channel(array: jax.Array, x: jax.Array) -> jax.Array:
    return array.reshape((1,) * (x.ndim - 1) + (-1,))


def _normalise(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Returns x with mean 0 and variance 1, and 1 / standard deviation, both in float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    factor = lax.rsqrt((centred * centred).mean(-1, keepdims=True) + epsilon)
    return centred * factor, factor


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
    """Returns the function that is chosen when it is lowered, with the options."""
    reference = _XLA[name]
    if x.ndim <= 2:  # for vectors, as in the head, a kernel compiles longer than it saves
        return functools.partial(reference, **options)
    return functools.partial(call_for_target, _Choice(name), reference, **options)


@dataclasses.dataclass(frozen=True)
class _Choice:
    function: str

    def __call__(self, target: Target) -> Callable:
        if target.platform != "cuda" or not kernels_usable(target):
            return _XLA[self.function]
        from mambaout_jax.ops import norm_triton

        return getattr(norm_triton, self.function)


def xla_normalise(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float, dtype: jnp.dtype
) -> jax.Array:
    """Returns the normalised x [..., C], with scale and bias [C]."""
    normalised, _ = _normalise(x, epsilon)
    return (normalised * _per_channel(scale, x) + _per_channel(bias, x)).astype(dtype)


def xla_gradient(
    x: jax.Array, scale: jax.Array, dy: jax.Array, *shortcut: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of x [..., C], plus the shortcut's, of scale and of bias, [C]."""
    normalised, factor = _normalise(x, epsilon)
    dy = dy.astype(jnp.float32)
    scaled = dy * _per_channel(scale, x)
    mean = scaled.mean(-1, keepdims=True)
    slope = (scaled * normalised).mean(-1, keepdims=True)
    dx = factor * (scaled - mean - normalised * slope)
    dx = sum((branch.astype(jnp.float32) for branch in shortcut), start=dx)
    batch = tuple(range(x.ndim - 1))
    return dx.astype(x.dtype), (dy * normalised).sum(batch), dy.sum(batch)


_XLA: dict[str, Callable] = {"normalise": xla_normalise, "gradient": xla_gradient}
