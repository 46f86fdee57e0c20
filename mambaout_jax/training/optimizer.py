"""AdamW as the reference uses it, with layer-wise learning-rate decay for fine-tuning."""

from typing import Any

import jax
import optax
from jax.tree_util import keystr

from mambaout_jax.weights.finetune import layer_scales

_NO_DECAY = ("a_log", "cls_token", "pos_embed")


def decay_mask(params: Any) -> Any:
    """Marks the parameters with weight decay: those of more than one axis, so no bias or scale.

    The decay rates of an SSM, `a_log`, have none either, as in Mamba, nor have a ViT's embeddings,
    as in timm.
    """

    def decays(path: Any, leaf: Any) -> bool:
        return leaf.ndim > 1 and keystr(path[-1:], simple=True) not in _NO_DECAY

    return jax.tree.map_with_path(decays, params)


def make_optimizer(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    layer_decay: float = 1.0,
    clip_norm: float = 0.0,
) -> optax.GradientTransformation:
    """Returns AdamW with decoupled weight decay.

    Args:
        learning_rate: a number, or a function of the step.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: of the parameters that `decay_mask` marks.
        layer_decay: factor on the learning rate from one layer to the layer below it; 1: none.
        clip_norm: global norm that gradients are clipped to; 0: not clipped.
    """
    adamw = optax.adamw(
        learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask
    )
    parts = [adamw]
    if clip_norm:
        parts.insert(0, optax.clip_by_global_norm(clip_norm))
    if layer_decay != 1:
        parts.append(scale_by_layer(layer_decay))
    return optax.chain(*parts)


def scale_by_layer(decay: float) -> optax.GradientTransformation:
    """Scales updates by decay ** (number of layers above the parameter's layer)."""
    return optax.stateless(
        lambda updates, params: jax.tree.map(
            lambda update, scale: update * scale, updates, layer_scales(params, decay)
        )
    )
