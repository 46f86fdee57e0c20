"""GELU and SiLU, and the gate's product: computed in float32 and rounded once.

Their gradients are written by hand and keep only the arguments. In JAX's own gradient of GELU in
bfloat16 the constants are rounded, and values are stored that are cheaper to compute again.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mambaout_jax.errors import UserError


def _gelu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the exact GELU (by the error function) of float32 x, and its derivative."""
    cumulative = 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))
    density = jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return x * cumulative, cumulative + x * density


def _silu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the SiLU of float32 x, and its derivative."""
    sigmoid = jax.nn.sigmoid(x)
    return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))


# Coefficients of the even polynomial p with tanh(x p(x)) near erf(x / sqrt(2)) for |x| up to 4: the
# largest relative error of GELU between -3 and 4 was minimised.
TANH_COEFFICIENTS = (
    -3.612359474602948e-08,
    1.9641147131864386e-06,
    -3.550292307797506e-05,
    -0.00012762946050928132,
    0.03653069826356457,
    0.797761615395044,
)


def _near_gelu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns `_gelu` with an error that rounding to bfloat16 hides, in fewer operations.

    The relative error is below 2^-13 for x > -3, and the absolute error below 3e-5 everywhere.
    """
    square = jnp.minimum(x * x, 16.0)
    polynomial = jnp.zeros_like(x)
    for coefficient in TANH_COEFFICIENTS:
        polynomial = polynomial * square + coefficient
    cumulative = 0.5 + 0.5 * jnp.tanh(x * polynomial)
    density = jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return x * cumulative, cumulative + x * density


_ACTIVATIONS: dict[str, Callable] = {"gelu": _gelu, "silu": _silu}
# The same in few operations, for results that are rounded to bfloat16.
ACTIVATIONS_NEAR: dict[str, Callable] = {"gelu": _near_gelu, "silu": _silu}


def _with_derivative(act: str) -> Callable:
    if act not in _ACTIVATIONS:
        raise UserError(f"unknown activation {act!r} (known: {', '.join(_ACTIVATIONS)})")
    return _ACTIVATIONS[act]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def activate(act: str, x: jax.Array) -> jax.Array:
    """Returns the activation of x, in x's dtype: act is "gelu" (exact) or "silu"."""
    return _with_derivative(act)(x.astype(jnp.float32))[0].astype(x.dtype)


def _activate_forward(act: str, x: jax.Array):
    return activate(act, x), x


def _activate_backward(act: str, x: jax.Array, dy: jax.Array):
    derivative = _with_derivative(act)(x.astype(jnp.float32))[1]
    return ((derivative * dy.astype(jnp.float32)).astype(x.dtype),)


activate.defvjp(_activate_forward, _activate_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gate_product(act: str, gate: jax.Array, identity: jax.Array, conv: jax.Array) -> jax.Array:
    """Returns act(gate) * concatenate(identity, conv), the product of the Gated CNN block.

    All arrays have the same dtype.

    Args:
        act: "gelu" or "silu".
        gate: [..., I + C].
        identity: [..., I].
        conv: [..., C].

    Returns:
        [..., I + C].
    """
    active = _with_derivative(act)(gate.astype(jnp.float32))[0]
    return (active * _value(identity, conv)).astype(gate.dtype)


def _value(identity: jax.Array, conv: jax.Array) -> jax.Array:
    return jnp.concatenate((identity, conv), axis=-1).astype(jnp.float32)


def _gate_product_forward(act: str, gate: jax.Array, identity: jax.Array, conv: jax.Array):
    return gate_product(act, gate, identity, conv), (gate, identity, conv)


def _gate_product_backward(act: str, residuals, dy: jax.Array):
    gate, identity, conv = residuals
    active, derivative = _with_derivative(act)(gate.astype(jnp.float32))
    dy = dy.astype(jnp.float32)
    dgate = (dy * derivative * _value(identity, conv)).astype(gate.dtype)
    dvalue = (dy * active).astype(gate.dtype)
    split = identity.shape[-1]
    return dgate, dvalue[..., :split], dvalue[..., split:]


gate_product.defvjp(_gate_product_forward, _gate_product_backward)
