"""The Gated CNN block as two calls around its depthwise convolution, for TPUs.

Left to XLA, the hidden maps, 16/3 times as wide as x, are written and read several times, and most
of a block's time goes there. Here one kernel computes the convolution's input from x, and one the
result of the block from x and the convolution's result; neither writes a hidden map, and the
backward pass computes them again. docs/performance.md has the figures.

The order of the hidden channels is not the parameters': the convolution's come first, and zeros
last, up to whole registers of 128 lanes. `block_weights` orders the parameters so, and takes the
norm's scale and bias and the convolution's bias into them. Elsewhere than on TPUs the calls are
JAX operations.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mambaout_jax.ops.depthwise.dispatch import depthwise_conv2d
from mambaout_jax.ops.gated_block import xla
from mambaout_jax.ops.kernels import by_kernels
from mambaout_jax.ops.sharded import on_mesh_of, on_parts, summed_in

_LANES = 128
_OTHER_VMEM = 9 * 2**20  # of `pallas_tpu`: blocks of maps, and temporaries


class BlockWeights(NamedTuple):
    """Weights of a block, float32: C channels, O >= C of the convolution, H >= O hidden ones.

    Attributes:
        conv_input: kernel [C, O] and bias [O] of the convolution's input.
        taps: [k, k, 1, O].
        gated: of gate and value, kernel [C, H] and bias [H] each; of the result, the transposed
            kernel [C, H] and the bias [C].
    """

    conv_input: tuple[jax.Array, jax.Array]
    taps: jax.Array
    gated: tuple[jax.Array, ...]


def gated_block_vmem(channels: int, hidden: int) -> int:
    """Returns the bytes of vector memory that the largest kernel of a block needs, in bfloat16."""
    kernels, gradients = 3 * 2, 3 * 4
    return (kernels + gradients) * channels * (hidden + -hidden % _LANES) + _OTHER_VMEM


def block_weights(norm: Any, fc1: Any, conv: Any, fc2: Any) -> BlockWeights:
    """Orders the parameters of a block, each given as (kernel or scale, bias)."""
    scale, shift = norm
    convolved, hidden = conv[1].shape[0], fc2[0].shape[0]
    kernel = scale[:, None] * fc1[0]
    bias = fc1[1] + (shift[:, None] * fc1[0]).sum(0)
    others = hidden - convolved

    def ordered(array: jax.Array, first: jax.Array) -> jax.Array:
        """Puts `first` before the other channels of array [..., H], and zeros after them."""
        return _padded(jnp.concatenate((first, array[..., :others]), -1))

    gate, value = jnp.split(kernel, 2, 1)
    gate_bias, value_bias = jnp.split(bias, 2)
    out = fc2[0].T
    return BlockWeights(
        (_padded(value[:, others:]), _padded(value_bias[others:])),
        _padded(conv[0]),
        (
            ordered(gate, gate[:, others:]),
            ordered(gate_bias, gate_bias[others:]),
            ordered(value, jnp.zeros_like(value[:, others:])),
            ordered(value_bias, conv[1]),
            ordered(out, out[:, others:]),
            fc2[1],
        ),
    )


def _padded(array: jax.Array) -> jax.Array:
    """Pads the last axis with zeros to whole registers."""
    zeros = -array.shape[-1] % _LANES
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, zeros)])


def gated_block(
    x: jax.Array,
    scale: jax.Array,
    norm: Any,
    fc1: Any,
    conv: Any,
    fc2: Any,
    *,
    act: str,
    depthwise: str,
    gradient_dtype: Any,
) -> jax.Array:
    """Returns x + scale * branch(x), [N, H, W, C], where the branch is that of the block.

    Reverse-mode differentiation only; `scale` is taken as constant.

    Args:
        x: [N, H, W, C].
        scale: float32 [N].
        norm: scale and bias, [C].
        fc1: kernel [C, 2 H] and bias.
        conv: kernel [k, k, 1, O] and bias; O is at most H.
        fc2: kernel [H, C] and bias.
        act: "gelu" or "silu". On TPUs, GELU has an error that rounding to bfloat16 hides.
        depthwise: the implementation, as in `depthwise_conv2d`.
        gradient_dtype: in which the parameters' gradients are summed over devices.
    """
    parameters = jax.tree.map(functools.partial(on_mesh_of, x), (norm, fc1, conv, fc2))
    weights = block_weights(*parameters)
    x, y = norm_dense(gradient_dtype, x, *weights.conv_input)
    y = depthwise_conv2d(y, weights.taps, implementation=depthwise)
    return gated_residual(act, gradient_dtype, x, y, scale, weights.gated)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def norm_dense(
    gradient_dtype: Any, x: jax.Array, kernel: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns x [N, H, W, C], and its dense layer after a norm without parameters.

    What else depends on x should start from the returned x: its gradient is then added in the pass
    that computes the norm's. Reverse-mode differentiation only.

    Args:
        gradient_dtype: in which gradients are summed over devices.
        x: [N, H, W, C].
        kernel: float32 [C, O].
        bias: float32 [O].
    """
    call = _for_target("norm_dense")
    (y,) = on_parts(call, (True, False, False), (True,))(x, kernel.astype(x.dtype), bias)
    return x, y


def _norm_dense_forward(gradient_dtype, x, kernel, bias):
    return norm_dense(gradient_dtype, x, kernel, bias), (x, kernel, bias)


def _norm_dense_backward(gradient_dtype, residuals, gradients):
    x, kernel, bias = residuals
    call = summed_in(gradient_dtype, 1, _for_target("norm_dense_gradient"))
    split, results = (True, True, True, False, False), (True, False, False)
    args = (x, *gradients, kernel.astype(x.dtype), bias)
    dx, dkernel, dbias = on_parts(call, split, results)(*args)
    return dx, dkernel.astype(jnp.float32), dbias.astype(jnp.float32)


norm_dense.defvjp(_norm_dense_forward, _norm_dense_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def gated_residual(
    act: str,
    gradient_dtype: Any,
    x: jax.Array,
    conv: jax.Array,
    scale: jax.Array,
    weights: tuple[jax.Array, ...],
) -> jax.Array:
    """Returns x + scale * ((act(gate) * value) @ kernel + bias), [N, H, W, C].

    Gate and value are dense layers of x after a norm without parameters; conv is added to the first
    channels of the value. Reverse-mode differentiation only; `scale` is taken as constant.

    Args:
        act: as in `gated_block`.
        gradient_dtype: in which gradients are summed over devices.
        x: [N, H, W, C].
        conv: [N, H, W, O].
        scale: float32 [N].
        weights: `BlockWeights.gated`.
    """
    call = _for_target("gated", act=act)
    split = (True, True, True, *[False] * len(weights))
    (y,) = on_parts(call, split, (True,))(x, conv, scale, *_rounded(weights, x.dtype))
    return y


def _gated_forward(act, gradient_dtype, x, conv, scale, weights):
    return gated_residual(act, gradient_dtype, x, conv, scale, weights), (x, conv, scale, weights)


def _gated_backward(act, gradient_dtype, residuals, dy):
    x, conv, scale, weights = residuals
    call = _for_target("gated_gradient", act=act)
    split = (True, True, True, True, *[False] * len(weights))
    results = (True, True, *[False] * len(weights))
    args = (x, conv, dy, scale, *_rounded(weights, x.dtype))
    call = summed_in(gradient_dtype, 2, call)
    dx, dconv, *gradients = on_parts(call, split, results)(*args)
    gradients = tuple(gradient.astype(jnp.float32) for gradient in gradients)
    return dx, dconv, jnp.zeros_like(scale), gradients


gated_residual.defvjp(_gated_forward, _gated_backward)


def _rounded(weights: tuple[jax.Array, ...], dtype: Any) -> tuple[jax.Array, ...]:
    """Rounds the kernels, and not the biases."""
    return tuple(array.astype(dtype) if array.ndim > 1 else array for array in weights)


def _for_target(name: str, **options: str) -> Callable:
    function = by_kernels("tpu", "mambaout_jax.ops.gated_block.tpu", xla, name, **options)

    def call(*args: jax.Array) -> tuple[jax.Array, ...]:
        results = function(*args)
        return results if isinstance(results, tuple) else (results,)

    return call
