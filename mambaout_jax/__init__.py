"""MambaOut in Flax: the models, their weights and their preprocessing.

Importing this costs what jax and flax cost; the data stack, the hub, plotting and torch load where
they are used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mambaout_jax.models.mambaout import create_model
from mambaout_jax.models.pretrained import list_pretrained, preprocessing
from mambaout_jax.models.variants import list_models
from mambaout_jax.weights.torch_layout import from_torch, to_torch

if TYPE_CHECKING:
    from mambaout_jax.data.preprocess import preprocess_image
    from mambaout_jax.weights.load import load_pretrained, read_weights

__all__ = [
    "create_model",
    "from_torch",
    "list_models",
    "list_pretrained",
    "load_pretrained",
    "preprocess_image",
    "preprocessing",
    "read_weights",
    "to_torch",
]

# Public names whose modules load on first use.
_LAZY = {
    "load_pretrained": "mambaout_jax.weights.load",
    "preprocess_image": "mambaout_jax.data.preprocess",
    "read_weights": "mambaout_jax.weights.load",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
