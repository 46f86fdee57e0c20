"""Operations that XLA alone does not make fast."""

from mambaout_jax.ops.depthwise import depthwise_conv2d

__all__ = ["depthwise_conv2d"]
