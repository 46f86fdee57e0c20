"""AdamW as the reference uses it."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from mambaout_jax.weights.finetune import layer_scales


def decay_mask(params: Any) -> Any:
    """Marks the parameters that decay: those of more than one axis, so no bias and no scale."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def make_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns AdamW with decoupled decay; clipping and layer decay where they are set."""
    optimizer = config.optimizer
    adamw = optax.adamw(
        schedule,
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        mask=decay_mask,
    )
    parts = [adamw]
    if optimizer.clip_norm:
        parts.insert(0, optax.clip_by_global_norm(optimizer.clip_norm))
    if optimizer.layer_decay != 1:
        parts.append(scale_by_layer(optimizer.layer_decay))
    return optax.chain(*parts)


def scale_by_layer(decay: float) -> optax.GradientTransformation:
    """Scales updates by decay ** (layers above the parameter's), as if by the learning rate."""
    return optax.stateless(
        lambda updates, params: jax.tree.map(
            lambda update, scale: update * scale, updates, layer_scales(params, decay)
        )
    )
