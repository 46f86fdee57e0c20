"""The convolution and the gate on NVIDIA GPUs: Triton kernels that read and write in place."""

import jax
import jax.numpy as jnp

from mambaout_jax.ops.activations import gate_product
from mambaout_jax.ops.depthwise import gpu, triton_kernels
from mambaout_jax.ops.gated_conv.gate_triton import gate_gradient
from mambaout_jax.ops.gated_conv.xla import split


def forward(
    x: jax.Array, bias: jax.Array, taps: jax.Array, conv_bias: jax.Array, *, act: str
) -> tuple[jax.Array, jax.Array]:
    """As `xla.forward`."""
    convolved = triton_kernels.convolve_from(x, bias, taps, conv_bias)
    gate, identity, _ = split(x, bias, taps)
    return gate_product(act, gate, identity, convolved), convolved


def backward(
    x: jax.Array,
    bias: jax.Array,
    taps: jax.Array,
    conv_bias: jax.Array,
    convolved: jax.Array,
    dy: jax.Array,
    *,
    act: str,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """As `xla.backward`."""
    del conv_bias
    size = taps.shape[0]
    dx, dconvolved, dgate_sum, dvalue_sum = gate_gradient(x, bias, convolved, dy, act)
    dx, dconv_sum = triton_kernels.convolve_into(dconvolved, taps[::-1, ::-1], dx)
    *_, conv = split(x, bias, taps)
    dtaps = gpu.filter_gradient(conv, dconvolved, kernel_size=size)
    identity_sum, convolved_sum = jnp.split(dvalue_sum, (dvalue_sum.size - dconv_sum.size,))
    dbias = jnp.concatenate((dgate_sum, identity_sum, dconv_sum))
    return dx, dbias, dtaps, convolved_sum
