"""The stem up to its activation: convolution of images, LayerNorm and activation, for GPUs.

The maps of this convolution are the widest of the network. Left to XLA and cuDNN, they are written
and read several times, and the three channels of the images are padded. Here one kernel computes
them from the images; its backward pass computes them again, so that nothing is kept. Elsewhere than
on NVIDIA GPUs, or where the kernels cannot be used, these are JAX operations.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mambaout_jax.ops.first_conv import xla
from mambaout_jax.ops.kernels import by_kernels
from mambaout_jax.ops.sharded import on_mesh_of, on_parts


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def first_conv(
    act: str,
    epsilon: float,
    gradient_dtype: Any,
    images: jax.Array,
    conv: tuple[jax.Array, jax.Array],
    norm: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """Returns act(LayerNorm(convolution)), [N, ceil(H / 2), ceil(W / 2), F], in the images' dtype.

    The convolution is 3x3, of stride 2, and pads one pixel on each side. Reverse-mode
    differentiation only.

    Args:
        act: "gelu" or "silu". On NVIDIA GPUs, GELU in bfloat16 and its gradient have an error
            that rounding hides.
        epsilon: added to the variance.
        gradient_dtype: in which the gradients of the convolution's weights are summed over
            devices. Those of the norm's are summed in float32.
        images: [N, H, W, C], bfloat16 or float32.
        conv: float32 kernel [3, 3, C, F] and bias [F]; they are rounded to the images' dtype.
        norm: float32 scale and bias [F].
    """
    return _forward(act, epsilon, gradient_dtype, images, conv, norm)[0]


def _forward(act, epsilon, gradient_dtype, images, conv, norm):  # type: ignore[no-untyped-def]
    weights = [on_mesh_of(images, weight).astype(images.dtype) for weight in conv]
    weights += [on_mesh_of(images, weight) for weight in norm]
    forward = _for_target("forward", act, epsilon)
    call = on_parts(lambda *args: (forward(*args),), (True, False, False, False, False), (True,))
    (y,) = call(images, *weights)
    return y, (images, weights)


def _backward(act, epsilon, gradient_dtype, residuals, dy):  # type: ignore[no-untyped-def]
    images, weights = residuals
    backward = _for_target("backward", act, epsilon)

    def on_part(*args: jax.Array) -> tuple[jax.Array, ...]:
        *conv, dscale, dbias = backward(*args)
        return *(gradient.astype(gradient_dtype) for gradient in conv), dscale, dbias

    call = on_parts(on_part, (True, False, False, False, False, True), (False,) * 4)
    *conv, dscale, dbias = call(images, *weights, dy)
    # XLA leaves this out where nobody asks for it.
    _, transpose = jax.vjp(
        lambda images: xla.forward(images, *weights, act=act, epsilon=epsilon), images
    )
    (dimages,) = transpose(dy)
    return dimages, tuple(gradient.astype(jnp.float32) for gradient in conv), (dscale, dbias)


first_conv.defvjp(_forward, _backward)


def _for_target(name: str, act: str, epsilon: float) -> Callable:
    module = "mambaout_jax.ops.first_conv.triton_kernels"
    return by_kernels("cuda", module, xla, name, act=act, epsilon=epsilon)
