"""MambaOut in Flax: the models, their weights and their preprocessing.

Importing this costs what jax and flax cost; the data stack, the hub, plotting and torch load where
they are used.
"""

from mambaout_jax.models.mambaout import create_model, list_models
from mambaout_jax.models.pretrained import list_pretrained, preprocessing
from mambaout_jax.weights.torch_layout import from_torch, to_torch

__all__ = [
    "create_model",
    "from_torch",
    "list_models",
    "list_pretrained",
    "preprocessing",
    "to_torch",
]
