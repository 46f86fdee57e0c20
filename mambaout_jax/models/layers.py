"""The network's layers.

Parameters are float32, `dtype` is the type of the computation, and `gradient_dtype` the type in
which the parameters' gradients are summed over devices. Norms sum theirs in float32.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mambaout_jax.ops import (
    dense,
    depthwise_conv2d,
    layer_norm,
    merge_dense,
    split_dense,
    strided_conv,
    weighted,
)
from mambaout_jax.ops.patches import xla_conv

EPSILON = 1e-6  # of all norms

# torch's trunc_normal_(std=0.02) cuts at +-2; JAX takes the cut in standard deviations.
kernel_init = nn.initializers.truncated_normal(0.02, lower=-2 / 0.02, upper=2 / 0.02)


def types(module: nn.Module) -> dict[str, Any]:
    """Returns the types that a module passes to the layers in it."""
    return {"dtype": module.dtype, "gradient_dtype": module.gradient_dtype}


class LayerNorm(nn.Module):
    """LayerNorm over channels, epsilon 1e-6, with float32 statistics.

    The variance is the mean of (x - mean)^2: the faster E[x^2] - E[x]^2 is not exact enough.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, with_shortcut: bool = False) -> Any:
        """[..., C] to [..., C]; `with_shortcut` returns (x, that), x to start a residual from."""
        scale = self.param("scale", nn.initializers.ones_init(), x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros_init(), x.shape[-1:])
        shortcut, y = layer_norm(x, scale, bias, EPSILON, self.dtype)
        return (shortcut, y) if with_shortcut else y


class Conv3x3Stride2(nn.Module):
    """3x3 convolution of stride 2 that pads one pixel on each side, which "SAME" does not."""

    features: int
    padding: Any = ((1, 1), (1, 1))
    dtype: Any = jnp.float32
    gradient_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] to [N, ceil(H / 2), ceil(W / 2), features]."""
        kernel = self.param("kernel", kernel_init, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        padding = self.padding
        if isinstance(padding, str):
            padding = jax.lax.padtype_to_pads(x.shape[1:3], (3, 3), (2, 2), padding)
        strided = functools.partial(_halve, padding=tuple(padding))
        return weighted(strided, self.gradient_dtype, x.astype(self.dtype), kernel, bias)


def convolve(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, *, stride: int, padding: Any
) -> jax.Array:
    """Convolves [N, H, W, C] with a kernel [kh, kw, C, features], and adds the bias if given."""
    y = xla_conv(x, kernel, stride=stride, padding=padding)
    return y if bias is None else y + bias.reshape(1, 1, 1, -1)


def _halve(
    x: jax.Array, kernel: jax.Array, bias: jax.Array, *, padding: tuple[tuple[int, int], ...]
) -> jax.Array:
    return strided_conv(x, kernel, 2, padding) + bias.reshape(1, 1, 1, -1)


class Dense(nn.Module):
    """Dense layer with the reference's initialisation."""

    features: int
    dtype: Any = jnp.float32
    gradient_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] to [..., features]."""
        weights = _weights(self, x.shape[-1], self.features)
        return dense(x.astype(self.dtype), *weights, self.gradient_dtype)


class SplitDense(nn.Module):
    """Dense layer to the block's 2 * hidden channels, split as `ops.split_dense` says."""

    hidden: int
    conv: int
    dtype: Any = jnp.float32
    gradient_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[..., C] to gate [..., hidden], identity [..., hidden - conv] and conv [..., conv]."""
        weights = _weights(self, x.shape[-1], 2 * self.hidden)
        return split_dense(x.astype(self.dtype), *weights, self.conv, self.gradient_dtype)


class MergeDense(nn.Module):
    """Dense layer from the block's hidden channels, as `ops.split_dense` leaves them."""

    features: int
    hidden: int
    conv: int
    dtype: Any = jnp.float32
    gradient_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., hidden] to [..., features]."""
        weights = _weights(self, self.hidden, self.features)
        return merge_dense(x.astype(self.dtype), *weights, self.conv, self.gradient_dtype)


def _weights(module: nn.Module, inputs: int, features: int) -> tuple[jax.Array, jax.Array]:
    kernel = module.param("kernel", kernel_init, (inputs, features))
    return kernel, module.param("bias", nn.initializers.zeros_init(), (features,))


class Weights(nn.Module):
    """The parameters of a layer, for a computation that spans several layers."""

    shape: tuple[int, ...]
    init: Any = kernel_init
    kernel: str = "kernel"  # its name

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        """Returns the kernel, and the bias of its last axis."""
        kernel = self.param(self.kernel, self.init, self.shape)
        return kernel, self.param("bias", nn.initializers.zeros_init(), self.shape[-1:])


class DepthwiseConv(nn.Module):
    """Depthwise convolution with bias and stride 1; keeps height and width."""

    kernel_size: int = 7
    implementation: str = "auto"
    dtype: Any = jnp.float32
    gradient_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, C] to [N, H, W, C]."""
        channels = x.shape[-1]
        shape = (self.kernel_size, self.kernel_size, 1, channels)
        kernel = self.param("kernel", kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros_init(), (channels,))
        y = depthwise_conv2d(x.astype(self.dtype), kernel, implementation=self.implementation)
        return weighted(_add, self.gradient_dtype, y, bias)


def _add(x: jax.Array, bias: jax.Array) -> jax.Array:
    return x + bias.reshape(1, 1, 1, -1)
