"""Parameter names in PyTorch's two layouts and in ours: one table, read in both directions.

"original" is the layout of the paper's repository, "timm" is timm's. A segmentation network has the
names of mmsegmentation's UperNet, and its backbone those of either layout after "backbone.". Both
sides are numpy arrays.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from mambaout_jax.errors import UserError
from mambaout_jax.models.mambaout import MambaOut, create_model
from mambaout_jax.models.mixers import stage_mixers
from mambaout_jax.models.upernet import PREFIX
from mambaout_jax.weights.identify import (
    BACKBONE,
    Layout,
    Shapes,
    candidates,
    find_classes,
    find_layout,
)
from mambaout_jax.weights.shapes import mismatches, param_shapes

# Ours, original, timm. {s} is a stage, {b} a block; a row is a module or a parameter.
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
    # ViT
    ("patch_embed", None, "patch_embed.proj"),
    ("cls_token", None, "cls_token"),
    ("pos_embed", None, "pos_embed"),
    ("blocks_{b}/norm1", None, "blocks.{b}.norm1"),
    ("blocks_{b}/attn/qkv", None, "blocks.{b}.attn.qkv"),
    ("blocks_{b}/attn/proj", None, "blocks.{b}.attn.proj"),
    ("blocks_{b}/norm2", None, "blocks.{b}.norm2"),
    ("blocks_{b}/fc1", None, "blocks.{b}.mlp.fc1"),
    ("blocks_{b}/fc2", None, "blocks.{b}.mlp.fc2"),
    ("norm", None, "norm"),
    ("head", None, "head"),
)
# The heads of a segmentation network: ours, mmsegmentation's. {s} is a number.
HEADS: tuple[tuple[str, str], ...] = (
    ("norms_{s}", "backbone.norm{s}"),
    ("decode_head/psp_modules_{s}/conv", "decode_head.psp_modules.{s}.1.conv"),
    ("decode_head/psp_modules_{s}/bn", "decode_head.psp_modules.{s}.1.bn"),
    ("decode_head/bottleneck/conv", "decode_head.bottleneck.conv"),
    ("decode_head/bottleneck/bn", "decode_head.bottleneck.bn"),
    ("decode_head/lateral_convs_{s}/conv", "decode_head.lateral_convs.{s}.conv"),
    ("decode_head/lateral_convs_{s}/bn", "decode_head.lateral_convs.{s}.bn"),
    ("decode_head/fpn_convs_{s}/conv", "decode_head.fpn_convs.{s}.conv"),
    ("decode_head/fpn_convs_{s}/bn", "decode_head.fpn_convs.{s}.bn"),
    ("decode_head/fpn_bottleneck/conv", "decode_head.fpn_bottleneck.conv"),
    ("decode_head/fpn_bottleneck/bn", "decode_head.fpn_bottleneck.bn"),
    ("decode_head/conv_seg", "decode_head.conv_seg"),
    ("auxiliary_head/convs_0/conv", "auxiliary_head.convs.0.conv"),
    ("auxiliary_head/convs_0/bn", "auxiliary_head.convs.0.bn"),
    ("auxiliary_head/conv_seg", "auxiliary_head.conv_seg"),
)
# Counts of batches in torch's BatchNorm, which nothing here needs.
COUNTER = ".num_batches_tracked"
# Our names of a module's parameters to torch's.
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# Axes of a torch kernel in our order, and back: OIHW and HWIO; (out, in) and (in, out).
TO_OURS = {4: (2, 3, 1, 0), 3: (0, 1, 2), 2: (1, 0), 1: (0,)}
TO_TORCH = {4: (3, 2, 0, 1), 3: (0, 1, 2), 2: (1, 0), 1: (0,)}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A parameter: its path in our tree, and its name and shape in torch's layout."""

    path: tuple[str, ...]
    name: str
    shape: tuple[int, ...]


def torch_name(path: tuple[str, ...], layout: Layout) -> str:
    """Returns the torch name of the parameter at `path`.

    Raises:
        UserError: the layout has no such parameter.
    """
    if path[0] == "backbone":
        return f"{BACKBONE}{torch_name(path[1:], layout)}"
    found = []
    for ours, original, timm in (*TABLE, *((ours, name, name) for ours, name in HEADS)):
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
    """Yields every parameter of `model` with its name in `layout`.

    Raises:
        UserError: the layout has no such parameters.
    """
    _check_mixer(model)
    for path, shape in param_shapes(model).items():
        yield Tensor(path, torch_name(path, layout), _torch_shape(shape))


def _check_mixer(model: Any) -> None:
    model = getattr(model, "backbone", model)
    if not isinstance(model, MambaOut):  # a ViT
        return
    if set(stage_mixers(model.token_mixer, len(model.depths))) != {"conv"}:
        raise UserError(
            f"PyTorch's MambaOut has no token_mixer {model.token_mixer!r}: weights of 'conv' alone "
            "can be converted; use a checkpoint of mambaout_jax"
        )


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in TO_TORCH.get(len(shape), range(len(shape))))


def from_torch(
    state_dict: Mapping[str, np.ndarray],
    name: str | MambaOut,
    *,
    num_classes: int | None = None,
    allow_non_finite: bool = False,
) -> dict[str, Any]:
    """Converts a torch state dict, of either layout, to parameters.

    A segmentation network is read from the names of mmsegmentation.

    Args:
        state_dict: torch's names to arrays of float16, bfloat16, float32 or float64.
        name: the variant, or the model itself.
        num_classes: width of the logits if `name` is a variant; that of `create_model` if None.
        allow_non_finite: whether to accept NaN and infinity.

    Returns:
        The nested dict of float32 arrays that `model.apply({"params": ...}, ...)` takes.

    Raises:
        UserError: a tensor is missing, unexpected, of another shape or type, or not finite. All are
            listed, with the variant that fits if there is one.
    """
    model = create_model(name, num_classes=num_classes) if isinstance(name, str) else name
    state_dict = {key: x for key, x in state_dict.items() if not key.endswith(COUNTER)}
    check_shapes({name: np.shape(array) for name, array in state_dict.items()}, model, name)
    params, errors = {}, []
    for tensor in sorted(torch_tensors(model, find_layout(state_dict)), key=lambda x: x.name):
        array = np.asarray(state_dict[tensor.name])
        if not jnp.issubdtype(array.dtype, np.floating) or array.dtype.itemsize < 2:
            errors.append(f"{tensor.name} is of type {array.dtype}, expected float32")
            continue
        with np.errstate(over="ignore"):
            array = np.array(array.transpose(TO_OURS[array.ndim]), np.float32, order="C")
        if not allow_non_finite and not np.isfinite(array).all():
            errors.append(f"{tensor.name} holds values that are not finite (NaN or infinity)")
        params[tensor.path] = array
    if errors:
        raise UserError(f"the weights cannot be used: {'; '.join(errors)}")
    return unflatten_dict(params)


def check_shapes(shapes: Shapes, model: MambaOut, name: str | MambaOut) -> None:
    """Checks that a state dict has the tensors of a model.

    Args:
        shapes: torch's names to shapes, in either layout.
        model: the network.
        name: the variant's name for the error, or the model.

    Raises:
        UserError: lists what is missing, unexpected or of another shape, and names the variant that
            fits if there is one.
    """
    layout = find_layout(shapes)
    shapes = {key: shape for key, shape in shapes.items() if not key.endswith(COUNTER)}
    errors = mismatches(shapes, {x.name: x.shape for x in torch_tensors(model, layout)})
    if errors:
        title = name if isinstance(name, str) else "the model"
        fitting = _fitting(shapes, layout)
        hint = f", they fit {fitting}" if fitting else ""
        raise UserError(f"the weights do not fit {title}{hint}: {'; '.join(errors)}")


def to_torch(
    params: Mapping[str, Any], name: str | MambaOut, layout: Layout = "timm"
) -> dict[str, np.ndarray]:
    """Converts parameters to a torch state dict of numpy arrays: the inverse of `from_torch`.

    Args:
        params: nested dict of arrays.
        name: the variant, with any number of classes, or the model itself.
        layout: "timm", or "original" for the paper's, which has no names for the _rw series.

    Raises:
        UserError: the parameters are not the model's, or the layout has no name for one.
    """
    if layout not in ("timm", "original"):
        raise UserError(f"unknown layout {layout!r}: expected 'timm' or 'original'")
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(params).items()}
    if isinstance(name, str):
        last = ("decode_head", "conv_seg") if name.startswith(PREFIX) else ("head", "fc2")
        classes = flat.get((*last, "bias"), np.empty(0)).size
        model, title = create_model(name, num_classes=classes), name
    else:
        model, title = name, "the model"
    _check_mixer(model)
    if errors := mismatches({path: leaf.shape for path, leaf in flat.items()}, param_shapes(model)):
        raise UserError(f"the parameters do not fit {title}: {'; '.join(errors)}")
    return {
        torch_name(path, layout): np.array(leaf.transpose(TO_TORCH[leaf.ndim]), order="C")
        for path, leaf in flat.items()
    }


def _fitting(shapes: Shapes, layout: Layout) -> str:
    """Returns the variant and the number of classes that fit the tensors exactly, "" for none."""
    num_classes = find_classes(shapes)
    for name in candidates(shapes):
        model = create_model(name, num_classes=num_classes)
        expected = {tensor.name: tensor.shape for tensor in torch_tensors(model, layout)}
        if not mismatches(shapes, expected):
            return f"{name} with num_classes={num_classes}"
    return ""
