"""Reads weights from the hub, a PyTorch file, a converted checkpoint or a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mambaout_jax.bucket import absolute, is_bucket
from mambaout_jax.errors import UserError, did_you_mean
from mambaout_jax.models.mambaout import MambaOut, create_model
from mambaout_jax.models.pretrained import (
    DEFAULT_TAGS,
    HUB_OWNER,
    PRETRAINED,
    find_pretrained,
    preprocessing,
)
from mambaout_jax.models.upernet import PREFIX
from mambaout_jax.models.variants import VARIANTS, find_variant
from mambaout_jax.models.vit import VITS
from mambaout_jax.weights.head import fit_head
from mambaout_jax.weights.identify import Shapes, find_classes, find_variant_of
from mambaout_jax.weights.info import WeightsInfo
from mambaout_jax.weights.integrity import check_finite
from mambaout_jax.weights.shapes import mismatches, param_shapes, tree_shapes
from mambaout_jax.weights.store import load_weights
from mambaout_jax.weights.torch_file import SUFFIXES, StateDict, read_state_dict
from mambaout_jax.weights.torch_layout import check_shapes, from_torch


def load_pretrained(
    name_or_path: epath.PathLike,
    *,
    model: str | None = None,
    num_classes: int | None = None,
    seed: int = 0,
    dtype: Any = jnp.float32,
    allow_non_finite: bool = False,
    **options: Any,
) -> tuple[MambaOut, dict[str, Any]]:
    """Returns a model and its weights.

    Args:
        name_or_path: as in `read_weights`, which also returns the preprocessing and the classes.
        model: as in `read_weights`.
        num_classes: width of the logits; that of the weights if None. Another number gives the
            model a new last layer, initialised as for training; 0 leaves the head out.
        seed: of the new last layer: it is drawn from `jax.random.key(seed)`.
        dtype: type of the computation; the parameters are float32.
        allow_non_finite: as in `read_weights`.
        **options: further options of `create_model`, such as `drop_path_rate=0.1`.

    Returns:
        The module and the nested dict of float32 arrays for `module.apply({"params": ...}, ...)`.

    Raises:
        UserError: as `read_weights`, and when an option is unknown or changes the parameters.
    """
    params, info = read_weights(name_or_path, model=model, allow_non_finite=allow_non_finite)
    if num_classes is not None:
        options["num_classes"] = num_classes
    network = info.create_model(dtype=dtype, **options)
    params, _ = fit_head(params, info.num_classes, network, jax.random.key(seed))
    if errors := mismatches(tree_shapes(params), param_shapes(network)):
        raise UserError(
            f"the weights {name_or_path} do not fit {info.model} with these options: "
            f"{'; '.join(errors)}"
        )
    return network, params


def read_weights(
    name_or_path: epath.PathLike, *, model: str | None = None, allow_non_finite: bool = False
) -> tuple[dict[str, Any], WeightsInfo]:
    """Reads weights and their description.

    Args:
        name_or_path: a name on the hub or in this package (see `mambaout_jax.list_pretrained`); a
            variant, for its default weights; a .safetensors, .pth or .pt file in either layout; a
            converted checkpoint; a run's working directory, for its best step; one step of a run;
            or "hf-hub:OWNER/NAME[@REVISION]", a repository of `push_to_hub` or of timm.
        model: the variant, or the name on the hub, of a file's weights; found by the tensors if
            None. A name on the hub also selects its preprocessing.
        allow_non_finite: whether to accept NaN and infinity.

    Raises:
        UserError: there is nothing of that name, or it cannot be read, is damaged or does not fit
            the model.
    """
    if str(name_or_path).startswith("hf-hub:"):
        from mambaout_jax.weights.hub_repository import read_repository

        params, info = read_repository(str(name_or_path), allow_non_finite=allow_non_finite)
        if model is not None and _variant(model) != info.model:
            raise UserError(f"the weights of {name_or_path} are {info.model}'s, not {model}'s")
        return params, info
    path = epath.Path(name_or_path).expanduser()
    if is_bucket(path):
        path = absolute(path)
    if path.is_dir():
        params, info = load_weights(path)
        if model is not None and _variant(model) != info.model:
            raise UserError(f"the weights in {path} are {info.model}'s, not {model}'s")
        if not allow_non_finite:
            check_finite(params, f"the checkpoint {path}")
        return params, info
    file, hub_name = locate(name_or_path)
    model = model or hub_name
    tensors = read_file(file, model).tensors
    return convert(tensors, model, hub_name or file.name, allow_non_finite=allow_non_finite)


def locate(name_or_path: epath.PathLike) -> tuple[Path, str | None]:
    """Returns the local file of weights, downloaded if necessary, and their name if they have one.

    Raises:
        UserError: there is no such file, and no such name on the hub.
    """
    path, name = Path(name_or_path).expanduser(), str(name_or_path)
    if is_bucket(name):
        raise UserError(
            f"there is no checkpoint in {name}: expected the folder of a checkpoint or of a run; "
            "copy a file of weights to a local disk first"
        )
    if path.suffix in SUFFIXES or path.exists():
        return path, None
    name = name.removeprefix(f"{HUB_OWNER}/")
    if name in VARIANTS or name in VITS:
        if name not in DEFAULT_TAGS:
            raise UserError(f"{name} has no pretrained weights")
        name = DEFAULT_TAGS[name]
    elif "." not in name or "/" in name:
        raise UserError(
            f"there are no weights {str(name_or_path)!r}{did_you_mean(name, PRETRAINED)} (expected "
            f"a directory, a file that ends in {', '.join(SUFFIXES)}, or a name on the hub such as "
            f"{next(iter(PRETRAINED))})"
        )
    if file := find_pretrained(name).file:
        return Path(__file__).parent / file, name
    from mambaout_jax.weights import hub

    return hub.fetch(name), name


def read_file(path: Path, model: str | None) -> StateDict:
    """Reads a file of PyTorch weights; refuses names and shapes that do not fit the model.

    Args:
        path: a .safetensors, .pth or .pt file.
        model: as in `convert`.

    Raises:
        UserError: the file cannot be read, or is another model's.
    """

    def check(shapes: Shapes) -> None:
        variant, num_classes = _identify(shapes, model)
        network = create_model(variant, num_classes=num_classes or None)
        check_shapes(shapes, network, variant)

    return read_state_dict(path, check)


def convert(
    tensors: Mapping[str, np.ndarray],
    model: str | None,
    source: str,
    *,
    allow_non_finite: bool = False,
) -> tuple[dict[str, Any], WeightsInfo]:
    """Converts a torch state dict to parameters and their description.

    Args:
        tensors: torch's names to arrays, in either layout.
        model: a variant, or a name on the hub; None to find the variant by the tensors.
        source: where the tensors come from.
        allow_non_finite: whether to accept NaN and infinity.

    Raises:
        UserError: the model cannot be found, or the tensors do not fit it.
    """
    shapes = {name: np.shape(array) for name, array in tensors.items()}
    variant, num_classes = _identify(shapes, model)
    params = from_torch(
        tensors, variant, num_classes=num_classes or None, allow_non_finite=allow_non_finite
    )
    return params, WeightsInfo(
        model=variant,
        num_classes=num_classes,
        preprocessing=preprocessing(model or variant),
        class_names=find_pretrained(model).class_names if model and "." in model else None,
        source=source,
    )


def _identify(shapes: Shapes, model: str | None) -> tuple[str, int]:
    """Returns the variant and the number of classes of a state dict."""
    if model is None:
        return find_variant_of(shapes), find_classes(shapes)
    variant = _variant(model)
    return variant, find_classes(shapes) if model == variant else find_pretrained(model).num_classes


def _variant(name: str) -> str:
    """Returns the variant of a variant's name or a name on the hub."""
    if "." in name:
        return find_pretrained(name).variant
    if name not in VITS:
        find_variant(name.removeprefix(PREFIX))
    return name
