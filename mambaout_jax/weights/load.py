"""Weights from wherever they are: the hub, a PyTorch file, a checkpoint of ours."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from mambaout_jax.bucket import absolute, is_bucket
from mambaout_jax.errors import UserError
from mambaout_jax.models.mambaout import MambaOut
from mambaout_jax.models.pretrained import PRETRAINED, find_pretrained, preprocessing
from mambaout_jax.models.variants import VARIANTS, find_variant
from mambaout_jax.weights.identify import find_classes, find_variant_of
from mambaout_jax.weights.store import WeightsInfo, load_weights
from mambaout_jax.weights.torch_file import SUFFIXES, read_state_dict
from mambaout_jax.weights.torch_layout import from_torch


def load_pretrained(
    name_or_path: epath.PathLike, *, model: str | None = None, dtype: Any = jnp.float32
) -> tuple[MambaOut, dict[str, Any]]:
    """Returns a model and its weights.

    Args:
        name_or_path: as in `read_weights`, which also tells the preprocessing and the classes.
        model: as in `read_weights`.
        dtype: type of the computation; the parameters are float32.

    Returns:
        The module and the nested dict of float32 arrays for `module.apply({"params": ...}, ...)`.

    Raises:
        UserError: as `read_weights`.
    """
    params, info = read_weights(name_or_path, model=model)
    return info.create_model(dtype=dtype), params


def read_weights(
    name_or_path: epath.PathLike, *, model: str | None = None
) -> tuple[dict[str, Any], WeightsInfo]:
    """Reads weights and what belongs to them.

    Args:
        name_or_path: a name of the hub's (see `mambaout_jax.list_pretrained`), a .safetensors,
            .pth or .pt file in either layout, a converted checkpoint, a run's working directory
            (its best step is taken) or one step of its checkpoints.
        model: the variant, or the hub's name, of a file's weights; told by the tensors where it is
            None. The hub's name brings the preprocessing along.

    Raises:
        UserError: when there is nothing of that name, or what there is cannot be read or does not
            fit the model.
    """
    path = epath.Path(name_or_path).expanduser()
    if is_bucket(path):
        path = absolute(path)
    if path.is_dir():
        params, info = load_weights(path)
        if model is not None and _variant(model) != info.model:
            raise UserError(f"the weights in {path} are {info.model}'s, not {model}'s")
        return params, info
    file, hub_name = locate(name_or_path)
    return convert(read_state_dict(file).tensors, model or hub_name, hub_name or file.name)


def locate(name_or_path: epath.PathLike) -> tuple[Path, str | None]:
    """Returns the local file of weights, downloaded where need be, and the hub's name of it.

    Raises:
        UserError: when there is no such file and the hub has nothing of that name.
    """
    path, name = Path(name_or_path).expanduser(), str(name_or_path)
    if is_bucket(name):
        raise UserError(
            f"there is no checkpoint in {name}: expected a folder of a checkpoint or of a run; a "
            "file of weights is to be copied to a disk first"
        )
    if path.suffix in SUFFIXES or path.exists():
        return path, None
    if name in VARIANTS:
        tags = [known for known, entry in PRETRAINED.items() if entry.variant == name]
        hint = f"its weights are {', '.join(tags)}" if tags else "there are no weights of it"
        raise UserError(f"{name!r} names a network, not weights: {hint}")
    if "." not in name or name.count("/") > 1:
        near = difflib.get_close_matches(name, PRETRAINED, 1)
        hint = f" did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"there are no weights {name!r}:{hint} expected a directory, a file that ends in "
            f"{', '.join(SUFFIXES)}, or a name of the hub's such as {next(iter(PRETRAINED))}"
        )
    find_pretrained(name)
    from mambaout_jax.weights import hub

    return hub.fetch(name), name


def convert(
    tensors: Mapping[str, np.ndarray], model: str | None, source: str
) -> tuple[dict[str, Any], WeightsInfo]:
    """Converts a torch state dict, and gathers what belongs to it.

    Args:
        tensors: torch's names to arrays, in either layout.
        model: a variant's or a hub's name; None to tell the variant by the tensors.
        source: where the tensors come from.

    Raises:
        UserError: when the model cannot be told, or the tensors do not fit it.
    """
    shapes = {name: np.shape(array) for name, array in tensors.items()}
    num_classes = find_classes(shapes)
    if model is None:
        model = find_variant_of(shapes)
    variant = _variant(model)
    if variant != model:
        num_classes = find_pretrained(model).num_classes
    params = from_torch(tensors, variant, num_classes=num_classes or None)
    return params, WeightsInfo(
        model=variant,
        num_classes=num_classes,
        preprocessing=preprocessing(model),
        source=source,
    )


def _variant(name: str) -> str:
    """Returns the variant of a variant's or a hub's name."""
    if "." in name:
        return find_pretrained(name).variant
    find_variant(name)
    return name
