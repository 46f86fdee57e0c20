"""The network's operations: those that XLA alone does not make fast."""

from mambaout_jax.ops.activations import activate, gate_product
from mambaout_jax.ops.cpu_loop import few_images
from mambaout_jax.ops.dense import dense, merge_dense, merge_weights, split_dense, split_weights
from mambaout_jax.ops.depthwise.dispatch import depthwise_conv2d
from mambaout_jax.ops.first_conv.dispatch import first_conv
from mambaout_jax.ops.gated_block.dispatch import gated_block, gated_block_vmem
from mambaout_jax.ops.gated_conv.dispatch import gated_conv, is_small, small_block
from mambaout_jax.ops.norm import layer_norm
from mambaout_jax.ops.patches import strided_conv
from mambaout_jax.ops.selective_scan.dispatch import selective_scan
from mambaout_jax.ops.weighted import weighted

__all__ = [
    "activate",
    "dense",
    "depthwise_conv2d",
    "few_images",
    "first_conv",
    "gate_product",
    "gated_block",
    "gated_block_vmem",
    "gated_conv",
    "is_small",
    "layer_norm",
    "merge_dense",
    "merge_weights",
    "selective_scan",
    "small_block",
    "split_dense",
    "split_weights",
    "strided_conv",
    "weighted",
]
