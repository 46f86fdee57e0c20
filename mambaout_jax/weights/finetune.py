"""Fine-tuning: parameters to start from, and learning rates that fall towards the stem."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from mambaout_jax.errors import UserError
from mambaout_jax.models.layers import kernel_init
from mambaout_jax.models.mambaout import MambaOut
from mambaout_jax.weights.load import read_weights
from mambaout_jax.weights.shapes import mismatches, param_shapes

LAST_LAYER = ("head", "fc2")


def initial_params(
    init_from: epath.PathLike, model: MambaOut, key: jax.Array
) -> tuple[dict[str, Any], str]:
    """Returns the parameters that fine-tuning starts from.

    Where the weights are of another number of classes, the last layer is made anew; everything
    else must be the model's. The network takes any resolution, so nothing is resized.

    Args:
        init_from: weights, as `read_weights` takes them.
        model: the network to be trained.
        key: typed key of the new last layer; every process of a run must give the same.

    Returns:
        The parameters, numpy arrays of float32, and a sentence on what was taken and what not.

    Raises:
        UserError: when the weights cannot be read or are another network's.
    """
    params, info = read_weights(init_from)
    flat = flatten_dict(params)
    expected = param_shapes(model)
    report = f"parameters start from {init_from} ({info.model}, {info.num_classes} classes)"
    if model.num_classes not in (0, info.num_classes):
        for path in [path for path in expected if path[:2] == LAST_LAYER]:
            shape = expected[path]
            new = kernel_init(key, shape) if path[-1] == "kernel" else np.zeros(shape)
            flat[path] = np.asarray(new, np.float32)
        report += f"; the last layer is new, for {model.num_classes} classes"
    if not model.num_classes:
        flat = {path: leaf for path, leaf in flat.items() if path[0] != "head"}
        report += "; the head is left out"
    if errors := mismatches({path: leaf.shape for path, leaf in flat.items()}, expected):
        raise UserError(
            f"the weights of {init_from} are {info.model}'s and do not fit the model to be "
            f"trained: {'; '.join(errors)}"
        )
    return unflatten_dict(flat), report


def layer_indices(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns each parameter's layer: 0 the stem, then block by block, the head last.

    A stage's downsampling is of its first block's layer. Source: timm's `param_groups_layer_decay`
    with the grouping of its MambaOut.
    """
    flat = flatten_dict(params)
    blocks = sorted({key for path in flat if (key := _block(path))})
    layers = {key: 1 + i for i, key in enumerate(blocks)}

    def layer(path: tuple[str, ...]) -> int:
        if path[0] == "stem":
            return 0
        if path[0] == "head":
            return 1 + len(blocks)
        return layers[_block(path) or (_number(path[0]), 0)]

    return unflatten_dict({path: layer(path) for path in flat})


def layer_scales(params: Mapping[str, Any], decay: float) -> dict[str, Any]:
    """Returns each parameter's factor on the learning rate: decay ** (layers above its own).

    `params` may be abstract; the answer is a tree of Python floats, 1 at the head.
    """
    indices = layer_indices(params)
    last = max(jax.tree.leaves(indices))
    return jax.tree.map(lambda index: float(decay ** (last - index)), indices)


def _block(path: tuple[str, ...]) -> tuple[int, int] | None:
    """Returns (stage, block) of a block's parameter, None for any other."""
    if path[0].startswith("stages_") and path[1].startswith("blocks_"):
        return _number(path[0]), _number(path[1])
    return None


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])
