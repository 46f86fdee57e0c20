"""The state of a training run, and its initialisation."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mambaout_jax.models.mambaout import MambaOut


class TrainState(flax.struct.PyTreeNode):
    """All that a step changes.

    Attributes:
        step: the number of steps done.
        params: of the network, float32.
        opt_state: of the optimizer.
        ema_params: exponential moving average of the parameters; None where the recipe has none.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    ema_params: Any = None

    @property
    def eval_params(self) -> Any:
        """The parameters that evaluation uses."""
        return self.params if self.ema_params is None else self.ema_params


def init_params(key: jax.Array, model: MambaOut, size: tuple[int, int]) -> Any:
    """Returns new parameters for images of `size`, (height, width). Traceable."""
    return model.init(key, jnp.zeros((1, *size, 3)))["params"]


def init_state(params: Any, optimizer: optax.GradientTransformation, *, ema: bool) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema_params=jax.tree.map(jnp.copy, params) if ema else None,
    )
