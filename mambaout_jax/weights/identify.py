"""Finds the layout, the variant and the number of classes of a torch state dict."""

import re
from collections.abc import Mapping
from typing import Literal

from mambaout_jax.errors import UserError
from mambaout_jax.models.upernet import PREFIX
from mambaout_jax.models.variants import VARIANTS, Variant
from mambaout_jax.models.vit import VITS

Layout = Literal["timm", "original"]
Shapes = Mapping[str, tuple[int, ...]]

# Of mmsegmentation's segmentation networks; the backbone's tensors have names in either layout.
BACKBONE = "backbone."
SEGMENTATION_LAST = "decode_head.conv_seg.bias"
LAST_LAYER = {"timm": "head.fc.bias", "original": "head.fc2.bias"}
VIT_KERNEL = "patch_embed.proj.weight"
_BLOCK = {
    "timm": re.compile(r"stages\.(\d+)\.blocks\.(\d+)\.(.+)"),
    "original": re.compile(r"stages\.(\d+)\.(\d+)\.(.+)"),
}


def find_layout(names: Mapping[str, object]) -> Layout:
    """Returns the layout of a state dict, found by its names.

    Raises:
        UserError: it is neither.
    """
    bare = [name.removeprefix(BACKBONE) for name in names]
    if any(name.startswith("downsample_layers.") for name in bare):
        return "original"
    if any(name.startswith(("stem.", "patch_embed.")) for name in bare):
        return "timm"
    found = ", ".join(str(name)[:60] for name in list(names)[:3])
    raise UserError(
        "these are not MambaOut weights: expected tensors named downsample_layers.* (the paper's "
        f"layout) or stem.* (timm's), found {found or 'no tensor'}"
    )


def find_classes(shapes: Shapes) -> int:
    """Returns the number of classes, 0 if the last layer is missing."""
    last = "head.bias" if VIT_KERNEL in shapes else LAST_LAYER[find_layout(shapes)]
    last = SEGMENTATION_LAST if SEGMENTATION_LAST in shapes else last
    shape = shapes.get(last, ())
    return shape[0] if shape else 0


def candidates(shapes: Shapes) -> list[str]:
    """Returns the variants whose depths and widths agree with the tensors that were found."""
    if SEGMENTATION_LAST in shapes:
        inner = {
            name.removeprefix(BACKBONE): shape
            for name, shape in shapes.items()
            if name.startswith(BACKBONE)
        }
        return [PREFIX + name for name in candidates(inner)]
    layout = find_layout(shapes)
    if VIT_KERNEL in shapes:
        return [name for name, (width, _) in VITS.items() if width == shapes[VIT_KERNEL][0]]
    blocks: dict[int, set[int]] = {}
    sizes: dict[tuple[int, str], tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if match := _BLOCK[layout].fullmatch(name):
            stage, block, part = int(match[1]), int(match[2]), match[3]
            blocks.setdefault(stage, set()).add(block)
            sizes.setdefault((stage, part), shape)
    depths = tuple(len(blocks[stage]) for stage in sorted(blocks))
    rw = layout == "timm" and not any(name.startswith("stem.norm1.") for name in shapes)

    def fits(variant: Variant) -> bool:
        return (
            depths == variant.depths
            and rw == variant.rw
            and all(
                sizes.get((stage, part), shape) == shape
                for stage, width in enumerate(variant.widths)
                for part, shape in _block_sizes(variant, width).items()
            )
        )

    return [name for name, variant in VARIANTS.items() if fits(variant)]


def _block_sizes(variant: Variant, width: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes in a block that distinguish variants of the same depths."""
    hidden, conv = int(variant.expansion_ratio * width), int(variant.conv_ratio * width)
    return {"norm.weight": (width,), "fc2.weight": (width, hidden), "conv.bias": (conv,)}


def find_variant_of(shapes: Shapes) -> str:
    """Returns the variant of a state dict.

    Raises:
        UserError: none fits, or more than one.
    """
    names = candidates(shapes)
    if len(names) == 1:
        return names[0]
    which = f"may be {' or '.join(names)}" if names else "fit none of the known variants"
    raise UserError(f"cannot find the model from its tensors, they {which}: name the model")
