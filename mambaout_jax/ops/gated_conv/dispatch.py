"""The Gated CNN block on GPUs: between its dense layers, and, for few pixels, as a whole.

The first dense layer's result has three parts: the gate, the identity's channels, and those of the
convolution. Left to XLA, the convolution's are copied, and its result and the gradients of all
three are read again for the gate and for the sums of the biases' gradients. Here kernels read and
write them in place; docs/performance.md has the figures.

With few pixels, starting its kernels takes most of a block's time. XLA needs up to nine, including
those that pad for matrix units; `small_block` needs three. Elsewhere than on NVIDIA GPUs, or
where the kernels cannot be used, these are JAX operations.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from mambaout_jax.ops.gated_conv import xla
from mambaout_jax.ops.kernels import by_kernels
from mambaout_jax.ops.sharded import images_on_device, on_mesh_of, on_parts, summed_in

# Multiplications of the second dense layer, at most, of a small block: those of 1 image of 224
# pixels by mambaout_femto. On an H200 small blocks made it faster, and slower with 2, 4 and 8.
_SMALL = 20_000_000


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


def is_small(x: jax.Array, hidden: int) -> bool:
    """Returns whether `small_block` should compute a block of x [N, H, W, C]."""
    images, (_, height, width, channels) = images_on_device(x), x.shape
    return not is_symbolic_dim(images) and images * height * width * channels * hidden <= _SMALL


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def small_block(
    act: str,
    epsilon: float,
    gradient_dtype: Any,
    x: jax.Array,
    norm: tuple[jax.Array, jax.Array],
    weights: tuple[jax.Array, ...],
) -> jax.Array:
    """Returns x + branch(x), [N, H, W, C], in x's dtype, where the branch is that of the block.

    For inference: reverse-mode differentiation works, by JAX operations in float32.

    Args:
        act: as in `gated_conv`.
        epsilon: added to the variance.
        gradient_dtype: in which the weights' gradients are summed over devices.
        x: [N, H, W, C], bfloat16.
        norm: float32 scale and bias [C].
        weights: float32: of the first dense layer the kernel [C, 2 (I + O)] and the bias, whose
            channels are those of `gated_conv`; of the convolution the kernel [k, k, 1, O] and the
            bias; of the second dense layer the kernel [I + O, C] and the bias. They are rounded to
            x's dtype.
    """
    return _small_forward(act, epsilon, gradient_dtype, x, norm, weights)[0]


def _small_forward(act, epsilon, gradient_dtype, x, norm, weights):  # type: ignore[no-untyped-def]
    parameters = [on_mesh_of(x, array) for array in norm]
    parameters += [on_mesh_of(x, weight).astype(x.dtype) for weight in weights]
    function = _for_target("small_block", act, epsilon=epsilon)
    split = (True, *[False] * len(parameters))
    (y,) = on_parts(lambda *args: (function(*args),), split, (True,))(x, *parameters)
    return y, (x, parameters)


def _small_backward(act, epsilon, gradient_dtype, residuals, dy):  # type: ignore[no-untyped-def]
    x, parameters = residuals

    def on_part(*args: jax.Array) -> tuple[jax.Array, ...]:
        dy, *inputs = (array.astype(jnp.float32) for array in args)
        _, pull = jax.vjp(functools.partial(xla.small_block, act=act, epsilon=epsilon), *inputs)
        return pull(dy)

    call = summed_in(gradient_dtype, 3, on_part)  # the norm's in float32
    flags = [False] * len(parameters)
    dx, *gradients = on_parts(call, (True, True, *flags), (True, *flags))(dy, x, *parameters)
    gradients = [gradient.astype(jnp.float32) for gradient in gradients]
    return dx.astype(x.dtype), tuple(gradients[:2]), tuple(gradients[2:])


small_block.defvjp(_small_forward, _small_backward)


def _for_target(name: str, act: str, **options: float) -> Callable:
    return by_kernels("cuda", "mambaout_jax.ops.gated_conv.gpu", xla, name, act=act, **options)
