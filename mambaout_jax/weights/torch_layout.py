"""The two PyTorch layouts of MambaOut's weights and ours: one table, read in both directions.

The original layout is the paper's repository's, "timm" is timm's. Numpy in, numpy out.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mambaout_jax.errors import UserError
from mambaout_jax.models.mambaout import MambaOut, create_model

Layout = Literal["timm", "original"]

# Ours, original, timm. {s} is a stage and {b} a block; a row stands for a module or a parameter.
TABLE: tuple[tuple[str, str | None, str], ...] = (
    ("stem/conv1", "downsample_layers.0.conv1", "stem.conv1"),
    ("stem/norm1", "downsample_layers.0.norm1", "stem.norm1"),
    ("stem/conv2", "downsample_layers.0.conv2", "stem.conv2"),
    ("stem/norm2", "downsample_layers.0.norm2", "stem.norm2"),
    ("stages_{s}/downsample/conv", "downsample_layers.{s}.conv", "stages.{s}.downsample.conv"),
    ("stages_{s}/downsample/norm", "downsample_layers.{s}.norm", "stages.{s}.downsample.norm"),
    ("stages_{s}/blocks_{b}/norm", "stages.{s}.{b}.norm", "stages.{s}.blocks.{b}.norm"),
    ("stages_{s}/blocks_{b}/fc1", "stages.{s}.{b}.fc1", "stages.{s}.blocks.{b}.fc1"),
    ("stages_{s}/blocks_{b}/conv", "stages.{s}.{b}.conv", "stages.{s}.blocks.{b}.conv"),
    ("stages_{s}/blocks_{b}/fc2", "stages.{s}.{b}.fc2", "stages.{s}.blocks.{b}.fc2"),
    ("stages_{s}/blocks_{b}/layer_scale", None, "stages.{s}.blocks.{b}.ls.gamma"),
    ("head/norm1", "norm", "head.norm"),
    ("head/fc1", "head.fc1", "head.pre_logits.fc"),
    ("head/norm2", "head.norm", "head.pre_logits.norm"),
    ("head/fc2", "head.fc2", "head.fc"),
)
# A module's parameter, ours to torch's.
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
# Axes of a torch kernel in the order of ours, and back: OIHW and HWIO; out, in and in, out.
TO_OURS = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}
TO_TORCH = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A parameter in both worlds: its path in ours, and its name and shape in torch's."""

    path: tuple[str, ...]
    name: str
    shape: tuple[int, ...]


def torch_name(path: tuple[str, ...], layout: Layout) -> str:
    """Returns the torch name of the parameter at `path`.

    Raises:
        UserError: when the layout has no such parameter.
    """
    found = []
    for ours, original, timm in TABLE:
        theirs = original if layout == "original" else timm
        pattern = re.escape(ours).replace(r"\{s\}", r"(?P<s>\d+)").replace(r"\{b\}", r"(?P<b>\d+)")
        match = re.fullmatch(rf"{pattern}(?:/(?P<leaf>\w+))?", "/".join(path))
        if match and theirs:
            groups = match.groupdict()
            leaf = groups.pop("leaf")
            found.append(theirs.format(**groups) + (f".{LEAVES[leaf]}" if leaf else ""))
    if len(found) != 1:
        raise UserError(
            f"the {layout} layout has {len(found) or 'no'} names for the parameter "
            f"{'/'.join(path)}: expected one; the _rw series exists in the timm layout only"
        )
    return found[0]


def torch_tensors(model: MambaOut, layout: Layout) -> Iterator[Tensor]:
    """Yields every parameter of `model` with its place in `layout`."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    for path, leaf in flatten_dict(shapes).items():
        shape = tuple(leaf.shape[axis] for axis in TO_TORCH[leaf.ndim])
        yield Tensor(path, torch_name(path, layout), shape)


def find_layout(names: Mapping[str, Any]) -> Layout:
    """Tells the layout of a state dict by its names.

    Raises:
        UserError: when it is neither.
    """
    if any(name.startswith("downsample_layers.") for name in names):
        return "original"
    if any(name.startswith("stem.") for name in names):
        return "timm"
    raise UserError(
        "these are no MambaOut weights: expected tensors named downsample_layers.* (the paper's "
        f"layout) or stem.* (timm's), found {', '.join(list(names)[:3]) or 'no tensor'}"
    )


def from_torch(
    state_dict: Mapping[str, np.ndarray], name: str | MambaOut, *, num_classes: int | None = None
) -> dict[str, Any]:
    """Converts a torch state dict, of either layout, to parameters.

    Args:
        state_dict: torch's names to arrays.
        name: the variant, or the model itself.
        num_classes: width of the logits where `name` is a variant; 1000 where it is None.

    Returns:
        The nested dict of float32 arrays that `model.apply({"params": ...}, ...)` takes.

    Raises:
        UserError: when a tensor is missing, unexpected or of another shape; all are listed.
    """
    model = create_model(name, num_classes=num_classes) if isinstance(name, str) else name
    layout = find_layout(state_dict)
    tensors = {tensor.name: tensor for tensor in torch_tensors(model, layout)}
    errors = [f"{name} is missing" for name in tensors if name not in state_dict]
    errors += [f"{name} is unexpected" for name in state_dict if name not in tensors]
    for name, tensor in tensors.items():
        if name in state_dict and np.shape(state_dict[name]) != tensor.shape:
            errors.append(f"{name} is {np.shape(state_dict[name])}, expected {tensor.shape}")
    if errors:
        raise UserError(f"the weights do not fit the model: {'; '.join(sorted(errors))}")
    params = {}
    for name, tensor in tensors.items():
        array = np.asarray(state_dict[name], np.float32)
        params[tensor.path] = np.ascontiguousarray(array.transpose(TO_OURS[array.ndim]))
    return unflatten_dict(params)


def to_torch(
    params: Mapping[str, Any], name: str | MambaOut, layout: Layout = "timm"
) -> dict[str, np.ndarray]:
    """Converts parameters to a torch state dict of numpy arrays: `from_torch` backwards.

    Raises:
        UserError: when the layout has no name for a parameter.
    """
    flat = flatten_dict(params)
    state_dict = {}
    for path, leaf in flat.items():
        array = np.asarray(leaf)
        state_dict[torch_name(path, layout)] = np.ascontiguousarray(
            array.transpose(TO_TORCH[array.ndim])
        )
    return state_dict
