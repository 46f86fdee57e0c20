"""MambaOut in Flax: the models, their weights and their preprocessing.

Public names are imported on first use, so that `import mambaout_jax` takes no time: the command
`mambaout-jax train` handles signals before it imports jax.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any, Literal, overload

from mambaout_jax.errors import UserError
from mambaout_jax.version import __version__

if TYPE_CHECKING:
    from mambaout_jax.data.preprocess import Preprocessing, normalize, preprocess_image
    from mambaout_jax.inference.predictor import Predictor
    from mambaout_jax.models.mambaout import MambaOut
    from mambaout_jax.models.pretrained import list_pretrained, preprocessing
    from mambaout_jax.models.variants import list_models
    from mambaout_jax.push import push_to_hub
    from mambaout_jax.weights.load import load_pretrained, read_weights
    from mambaout_jax.weights.to_nnx import to_nnx
    from mambaout_jax.weights.torch_layout import from_torch, to_torch

__all__ = [
    "MambaOut",
    "Predictor",
    "Preprocessing",
    "UserError",
    "__version__",
    "create_model",
    "from_torch",
    "list_models",
    "list_pretrained",
    "load_pretrained",
    "normalize",
    "preprocess_image",
    "preprocessing",
    "push_to_hub",
    "read_weights",
    "to_nnx",
    "to_torch",
]

# Where the public names are that are not here.
_LAZY = {
    "MambaOut": "mambaout_jax.models.mambaout",
    "Predictor": "mambaout_jax.inference.predictor",
    "Preprocessing": "mambaout_jax.data.preprocess",
    "from_torch": "mambaout_jax.weights.torch_layout",
    "list_models": "mambaout_jax.models.variants",
    "list_pretrained": "mambaout_jax.models.pretrained",
    "load_pretrained": "mambaout_jax.weights.load",
    "normalize": "mambaout_jax.data.preprocess",
    "preprocess_image": "mambaout_jax.data.preprocess",
    "preprocessing": "mambaout_jax.models.pretrained",
    "push_to_hub": "mambaout_jax.push",
    "read_weights": "mambaout_jax.weights.load",
    "to_nnx": "mambaout_jax.weights.to_nnx",
    "to_torch": "mambaout_jax.weights.torch_layout",
}


@overload
def create_model(
    name: str, *, pretrained: Literal[False] = False, **options: Any
) -> "MambaOut": ...
@overload
def create_model(
    name: str, *, pretrained: Literal[True], **options: Any
) -> "tuple[MambaOut, dict[str, Any]]": ...
def create_model(name: str, *, pretrained: bool = False, **options: Any) -> Any:
    """Returns the module of a variant, or the module and its pretrained weights.

    Args:
        name: a variant's name, see `list_models`; with `pretrained` also a name of published
            weights, see `list_pretrained`.
        pretrained: whether to return weights too, as `load_pretrained` does.
        **options: `num_classes`, `drop_path_rate`, `head_dropout_rate`, `dtype` or other fields of
            `MambaOut`; with `pretrained` also the options of `load_pretrained`.

    Raises:
        UserError: the name or an option is unknown, or the weights cannot be read.
    """
    if pretrained:
        from mambaout_jax.weights.load import load_pretrained

        return load_pretrained(name, **options)
    from mambaout_jax.models import mambaout

    return mambaout.create_model(name, **options)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    module = f"{__name__}.{name}"
    if not name.startswith("_") and importlib.util.find_spec(module):
        return importlib.import_module(module)  # as in `mambaout_jax.ops.selective_scan`
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
