"""The network as a flax NNX module."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mambaout_jax.errors import UserError
from mambaout_jax.models.mambaout import MambaOut
from mambaout_jax.weights.shapes import mismatches, param_shapes, tree_shapes


def to_nnx(
    model: MambaOut, params: Mapping[str, Any], *, rngs: nnx.Rngs | None = None
) -> nnx.bridge.ToNNX:
    """Returns the network with its parameters as an `nnx.Module`, by flax's own bridge.

    Calls and methods are the linen module's: `module(images)` gives the same logits, bit for bit,
    and `module.features(images)` the same maps. The parameters are `nnx.Param`s under the same
    names.

    Args:
        model: the linen module.
        params: its parameters, as `load_pretrained` returns them.
        rngs: with a stream "dropout", as `module(images, train=True)` needs for drop path and
            dropout; calls with `train=False` need none.

    Raises:
        UserError: the parameters do not fit the model.
    """
    if errors := mismatches(tree_shapes(params), param_shapes(model)):
        raise UserError(f"the parameters do not fit the model: {'; '.join(errors)}")
    module = nnx.bridge.ToNNX(model, rngs=rngs)
    for name, part in params.items():
        variables = jax.tree.map(lambda leaf: nnx.Param(jnp.asarray(leaf)), part)
        setattr(module, name, nnx.data(variables))
    return module
