"""Operations that XLA alone does not make fast."""

from mambaout_jax.ops.activations import activate, gate_product
from mambaout_jax.ops.depthwise.dispatch import depthwise_conv2d
from mambaout_jax.ops.norm import layer_norm

__all__ = ["activate", "depthwise_conv2d", "gate_product", "layer_norm"]
