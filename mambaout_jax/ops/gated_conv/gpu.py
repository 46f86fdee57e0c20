"""The convolution and the gate, and the whole small block, on NVIDIA GPUs: Triton kernels."""

import jax
import jax.numpy as jnp

from mambaout_jax.ops.depthwise import gpu, triton_kernels
from mambaout_jax.ops.gated_conv import dense_triton, gate_triton
from mambaout_jax.ops.gated_conv.xla import add_bias


def forward(
    x: jax.Array, bias: jax.Array, taps: jax.Array, conv_bias: jax.Array, *, act: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `xla.forward`. XLA adds the bias in the matrix product that makes x."""
    x = add_bias(x, bias)
    convolved = triton_kernels.convolve_from(x, taps, conv_bias)
    return gate_triton.gate_product(x, convolved, act), x, convolved


def backward(
    x: jax.Array, taps: jax.Array, convolved: jax.Array, dy: jax.Array, *, act: str
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """As `xla.backward`."""
    dx, dconvolved, dgate_sum, dvalue_sum = gate_triton.gate_gradient(x, convolved, dy, act)
    dx, dconv_sum = triton_kernels.convolve_into(dconvolved, taps[::-1, ::-1], dx)
    dtaps = gpu.filter_gradient(x, dconvolved, kernel_size=taps.shape[0])
    identity_sum, convolved_sum = jnp.split(dvalue_sum, (dvalue_sum.size - dconv_sum.size,))
    dbias = jnp.concatenate((dgate_sum, identity_sum, dconv_sum))
    return dx, dbias, dtaps, convolved_sum


def small_block(x: jax.Array, *weights: jax.Array, act: str, epsilon: float) -> jax.Array:
    """As `xla.small_block`, in three kernels."""
    scale, shift, kernel, bias, taps, conv_bias, out_kernel, out_bias = weights
    y = dense_triton.norm_dense(x, scale, shift, kernel, bias, epsilon=epsilon)
    convolved = triton_kernels.convolve_from(y, taps, conv_bias)
    return dense_triton.gate_dense(y, convolved, x, out_kernel, out_bias, act=act)
