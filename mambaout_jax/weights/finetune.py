"""Fine-tuning: the initial parameters, and learning rates that decrease towards the stem."""

from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from mambaout_jax.errors import UserError
from mambaout_jax.models.mambaout import MambaOut
from mambaout_jax.weights.head import fit_head
from mambaout_jax.weights.load import read_weights
from mambaout_jax.weights.shapes import mismatches, param_shapes, tree_shapes


def initial_params(
    init_from: epath.PathLike, model: MambaOut, key: jax.Array
) -> tuple[dict[str, Any], str]:
    """Returns the parameters that fine-tuning starts from.

    If the weights have another number of classes, the last layer is new; all other parameters must
    be the model's. The network takes any resolution, so nothing is resized.

    Args:
        init_from: weights, as `read_weights` takes them.
        model: the network to train.
        key: typed key of the new last layer; the same on every process of a run.

    Returns:
        The parameters, numpy arrays of float32, and a sentence for the log.

    Raises:
        UserError: the weights cannot be read or belong to another network.
    """
    params, info = read_weights(init_from)
    params, change = fit_head(params, info.num_classes, model, key)
    if errors := mismatches(tree_shapes(params), param_shapes(model)):
        raise UserError(
            f"the weights of {init_from} are {info.model}'s and do not fit the model to be "
            f"trained: {'; '.join(errors)}"
        )
    report = f"parameters start from {init_from} ({info.model}, {info.num_classes} classes)"
    return params, f"{report}; {change}" if change else report


def layer_indices(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns each parameter's layer: 0 for the stem, then one a block, the head last.

    A stage's downsampling belongs to the layer of its first block. Of a ViT, the embeddings are the
    stem, and the last norm belongs to the layer of the last block. Source: timm's
    `param_groups_layer_decay` with the grouping of its networks.
    """
    flat = flatten_dict(params)
    blocks = sorted({key for path in flat if (key := _block(path))})
    layers = {key: 1 + i for i, key in enumerate(blocks)}

    def layer(path: tuple[str, ...]) -> int:
        if path[0] in ("stem", "patch_embed", "cls_token", "pos_embed"):
            return 0
        if path[0] in ("head", "norm"):
            return len(blocks) + (path[0] == "head")
        return layers[_block(path) or (_number(path[0]), 0)]

    return unflatten_dict({path: layer(path) for path in flat})


def layer_scales(params: Mapping[str, Any], decay: float) -> dict[str, Any]:
    """Returns each parameter's factor on the learning rate: decay ** (number of layers above).

    `params` may be abstract. The result is a tree of Python floats, 1 at the head.
    """
    indices = layer_indices(params)
    last = max(jax.tree.leaves(indices))
    return jax.tree.map(lambda index: float(decay ** (last - index)), indices)


def _block(path: tuple[str, ...]) -> tuple[int, int] | None:
    """Returns (stage, block) of a block's parameter, None for others; a ViT is one stage."""
    if path[0].startswith("blocks_"):
        return 0, _number(path[0])
    if path[0].startswith("stages_") and path[1].startswith("blocks_"):
        return _number(path[0]), _number(path[1])
    return None


def _number(name: str) -> int:
    return int(name.rpartition("_")[2])
