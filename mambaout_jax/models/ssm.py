"""Mamba's selective state space model, as a layer over the tokens of a feature map.

The defaults are Mamba-1's (Gu and Dao, 2023): 16 states a channel; the step size delta comes
through a projection of rank ceil(width / 16) and a softplus, with a bias that starts it between
0.001 and 0.1; A = -exp(a_log) starts at -1, ..., -16, and D at 1.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mambaout_jax.models.layers import kernel_init, types
from mambaout_jax.ops import selective_scan, weighted

STATE = 16  # numbers a channel
_DELTA = (1e-3, 1e-1)  # the range in which step sizes start


class SSM(nn.Module):
    """Selective SSM in raster order, so that a token sees those before it; or in reverse.

    `rank` is that of the projection to delta.
    """

    rank: int
    reverse: bool = False
    dtype: Any = jnp.float32
    gradient_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, H, W, E] to [N, H, W, E]; the recurrence is computed in float32."""
        shape, channels = x.shape, x.shape[-1]
        tokens = x.reshape(shape[0], -1, channels)
        if self.reverse:
            tokens = tokens[:, ::-1]
        projected = Projection(self.rank + 2 * STATE, **types(self), name="x_proj")(tokens)
        delta, b, c = jnp.split(projected, (self.rank, self.rank + STATE), axis=-1)
        delta = StepSize(channels, **types(self), name="dt_proj")(delta)
        a_log = self.param("a_log", _a_log_init, (channels, STATE))
        d = self.param("d", nn.initializers.ones_init(), (channels,))
        y = selective_scan(tokens, delta, -jnp.exp(a_log), b, c, d)
        return (y[:, ::-1] if self.reverse else y).reshape(shape)


class Projection(nn.Module):
    """Dense layer without bias."""

    features: int
    dtype: Any = jnp.float32
    gradient_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., C] to [..., features]."""
        kernel = self.param("kernel", kernel_init, (x.shape[-1], self.features))
        return weighted(jnp.matmul, self.gradient_dtype, x.astype(self.dtype), kernel)


class StepSize(nn.Module):
    """Dense layer and softplus, in float32: bfloat16 is too coarse for the small steps."""

    features: int
    dtype: Any = jnp.float32
    gradient_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., rank] to [..., features], positive, float32."""
        rank = x.shape[-1]
        init = functools.partial(_uniform, bound=rank**-0.5)
        kernel = self.param("kernel", init, (rank, self.features))
        bias = self.param("bias", _step_bias_init, (self.features,))
        y = weighted(jnp.matmul, self.gradient_dtype, x.astype(self.dtype), kernel)
        return jax.nn.softplus(y.astype(jnp.float32) + bias.reshape((1,) * (x.ndim - 1) + (-1,)))


def _uniform(key: jax.Array, shape: Any, dtype: Any = jnp.float32, *, bound: float) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _step_bias_init(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    """Inverse softplus of step sizes whose logarithms are uniform."""
    low, high = map(math.log, _DELTA)
    step = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
    return step + jnp.log(-jnp.expm1(-step))


def _a_log_init(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    """log(1), ..., log(S) for each channel."""
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype))[None], shape)
