"""AdamW as the reference uses it."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict


def decay_mask(params: Any) -> Any:
    """Marks the parameters that decay: those of more than one axis, so no bias and no scale."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def make_optimizer(config: ConfigDict, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns AdamW with decoupled decay, after clipping by the global norm where that is set."""
    optimizer = config.optimizer
    adamw = optax.adamw(
        schedule,
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        mask=decay_mask,
    )
    if optimizer.clip_norm:
        return optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), adamw)
    return adamw
