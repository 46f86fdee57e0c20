"""Tells a torch state dict's layout, variant and classes by the tensors themselves."""

import re
from collections.abc import Mapping
from typing import Literal

from mambaout_jax.errors import UserError
from mambaout_jax.models.variants import VARIANTS, Variant

Layout = Literal["timm", "original"]
Shapes = Mapping[str, tuple[int, ...]]

LAST_LAYER = {"timm": "head.fc.bias", "original": "head.fc2.bias"}
_BLOCK = {
    "timm": re.compile(r"stages\.(\d+)\.blocks\.(\d+)\.(.+)"),
    "original": re.compile(r"stages\.(\d+)\.(\d+)\.(.+)"),
}


def find_layout(names: Mapping[str, object]) -> Layout:
    """Tells the layout of a state dict by its names.

    Raises:
        UserError: when it is neither.
    """
    if any(name.startswith("downsample_layers.") for name in names):
        return "original"
    if any(name.startswith("stem.") for name in names):
        return "timm"
    found = ", ".join(str(name)[:60] for name in list(names)[:3])
    raise UserError(
        "these are no MambaOut weights: expected tensors named downsample_layers.* (the paper's "
        f"layout) or stem.* (timm's), found {found or 'no tensor'}"
    )


def find_classes(shapes: Shapes) -> int:
    """Tells the number of classes, 0 where the last layer is missing."""
    shape = shapes.get(LAST_LAYER[find_layout(shapes)], ())
    return shape[0] if shape else 0


def candidates(shapes: Shapes) -> list[str]:
    """Returns the variants that nothing found in the state dict speaks against."""
    layout = find_layout(shapes)
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
    """Returns the shapes in a block that tell variants of the same depths apart."""
    hidden, conv = int(variant.expansion_ratio * width), int(variant.conv_ratio * width)
    return {"norm.weight": (width,), "fc2.weight": (width, hidden), "conv.bias": (conv,)}


def find_variant_of(shapes: Shapes) -> str:
    """Tells the variant that a state dict belongs to.

    Raises:
        UserError: when there is none, or more than one.
    """
    names = candidates(shapes)
    if len(names) == 1:
        return names[0]
    which = f"may be {' or '.join(names)}" if names else "fit none of the known variants"
    raise UserError(f"cannot tell the model by its tensors, they {which}: name the model")
