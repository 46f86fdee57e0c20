"""The shapes of a model's parameters, and how others differ from them."""

import functools
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from mambaout_jax.models.mambaout import MambaOut


@functools.lru_cache(maxsize=16)  # tracing is the slowest part of converting a small model
def param_shapes(model: MambaOut) -> Mapping[tuple[str, ...], tuple[int, ...]]:
    """Returns the paths and shapes of all parameters of `model`, without computing them."""
    size = getattr(model, "image_size", 32)  # a ViT has one size alone
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x)["params"], images)
    return types.MappingProxyType(tree_shapes(params))


def tree_shapes(params: Mapping[str, Any]) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Returns the paths and shapes of a tree of arrays, abstract or not."""
    return {path: tuple(leaf.shape) for path, leaf in flatten_dict(params).items()}


def mismatches(found: Mapping[Any, Any], expected: Mapping[Any, Any]) -> list[str]:
    """Returns a sorted list of what is missing, unexpected or of another shape.

    Args:
        found: names or paths to shapes.
        expected: names or paths to shapes.
    """
    errors = [f"{_name(key)} is missing" for key in expected.keys() - found.keys()]
    errors += [f"{_name(key)} is unexpected" for key in found.keys() - expected.keys()]
    errors += [
        f"{_name(key)} is {found[key]}, expected {shape}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    return sorted(errors)


def _name(key: str | tuple[str, ...]) -> str:
    return key if isinstance(key, str) else "/".join(key)
