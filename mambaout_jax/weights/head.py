"""A pretrained network for another number of classes or another task: a new or no head."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mambaout_jax.models.layers import kernel_init
from mambaout_jax.models.mambaout import MambaOut
from mambaout_jax.models.upernet import UperNet, classifier_init
from mambaout_jax.weights.shapes import param_shapes

# Of a MambaOut, of a ViT, and of a segmentation network's two heads.
LAST_LAYERS = ("head/fc2", "head", "decode_head/conv_seg", "auxiliary_head/conv_seg")


def fit_head(
    params: Mapping[str, Any], num_classes: int, model: MambaOut, key: jax.Array
) -> tuple[dict[str, Any], str]:
    """Returns the parameters with the head that `model` needs.

    Args:
        params: numpy arrays of float32.
        num_classes: of `params`.
        model: the network that takes the result.
        key: typed key of a new last layer.

    Returns:
        The parameters, and what was changed: "" for nothing. With another number of classes the
        last layer is initialised as in training; with 0 classes there is no head. A segmentation
        network takes those of a classifier for its backbone, and all else is new.
    """
    if isinstance(model, UperNet) and "backbone" not in params:
        new = jax.jit(lambda: model.init(key, jnp.zeros((1, 64, 64, 3)))["params"])()
        backbone = {name: tree for name, tree in params.items() if name != "head"}
        new = jax.tree.map(np.asarray, {**new, "backbone": backbone})
        return new, "they are the backbone's, and the rest is new"
    flat = flatten_dict(params)
    if model.num_classes == num_classes:
        return unflatten_dict(flat), ""
    if not model.num_classes:
        flat = {path: leaf for path, leaf in flat.items() if path[0] != "head"}
        return unflatten_dict(flat), "the head is left out"
    for path, shape in param_shapes(model).items():
        if "/".join(path[:-1]) in LAST_LAYERS:
            init = classifier_init if path[-2] == "conv_seg" else kernel_init
            new = init(key, shape) if path[-1] == "kernel" else np.zeros(shape)
            flat[path] = np.asarray(new, np.float32)
    return unflatten_dict(flat), f"the last layer is new, for {model.num_classes} classes"
