"""The Gated CNN block between its dense layers: convolution and gate in one operation, for GPUs.

The first dense layer's result has three parts: the gate, the identity's channels, and those of the
convolution. Left to XLA, the convolution's are copied, and its result and the gradients of all
three are read again for the gate and for the sums of the biases' gradients. Here kernels read and
write them in place; docs/performance.md has the figures. Elsewhere than on NVIDIA GPUs, or where
the kernels cannot be used, these are JAX operations.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mambaout_jax.ops.gated_conv import xla
from mambaout_jax.ops.kernels import by_kernels
from mambaout_jax.ops.sharded import on_mesh_of, on_parts, summed_in


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def gated_conv(
    act: str, gradient_dtype: Any, x: jax.Array, weights: tuple[jax.Array, jax.Array, jax.Array]
) -> jax.Array:
    """Returns act(gate) * concatenate(identity, convolution), [N, H, W, I + O], in x's dtype.

    Reverse-mode differentiation only.

    Args:
        act: "gelu" or "silu". On NVIDIA GPUs, GELU in bfloat16 and its gradient have an error
            that rounding hides.
        gradient_dtype: in which the weights' gradients are summed over devices.
        x: [N, H, W, 2 (I + O)], bfloat16 or float32: the gate, I channels of the identity, and O
            of the convolution, without their bias.
        weights: float32: x's bias [2 (I + O)], and the convolution's kernel [k, k, 1, O] and bias
            [O]. They are rounded to x's dtype.
    """
    return _forward(act, gradient_dtype, x, weights)[0]


def _forward(act, gradient_dtype, x, weights):  # type: ignore[no-untyped-def]
    bias, taps, conv_bias = (on_mesh_of(x, weight).astype(x.dtype) for weight in weights)
    call = on_parts(_for_target("forward", act), (True, False, False, False), (True, True, True))
    y, biased, convolved = call(x, bias, taps, conv_bias)
    return y, (biased, taps, convolved)


def _backward(act, gradient_dtype, residuals, dy):  # type: ignore[no-untyped-def]
    call = summed_in(gradient_dtype, 1, _for_target("backward", act))
    call = on_parts(call, (True, False, True, True), (True, False, False, False))
    dx, *gradients = call(*residuals, dy)
    return dx, tuple(gradient.astype(jnp.float32) for gradient in gradients)


gated_conv.defvjp(_forward, _backward)


def _for_target(name: str, act: str) -> Callable:
    return by_kernels("cuda", "mambaout_jax.ops.gated_conv.gpu", xla, name, act=act)
