"""RandAugment, 3-Augment and timm's policy strings.

Sources: Cubuk et al., "RandAugment" (arXiv 1909.13719); Touvron et al., "DeiT III" (arXiv
2204.07118). Strings, levels and sets of operations are those of timm.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from mambaout_jax.data import image_ops
from mambaout_jax.errors import UserError

_INCREASING = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "PosterizeIncreasing",
    "SolarizeIncreasing",
    "SolarizeAdd",
    "ColorIncreasing",
    "ContrastIncreasing",
    "BrightnessIncreasing",
    "SharpnessIncreasing",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
)
_PLAIN = tuple(name.replace("Increasing", "") for name in _INCREASING)
_WEIGHTS = dict.fromkeys(_INCREASING, 0.05) | {
    "Rotate": 3.0,
    "ShearX": 2.0,
    "ShearY": 2.0,
    "TranslateXRel": 1.0,
    "TranslateYRel": 1.0,
    "ColorIncreasing": 0.25,
    "SharpnessIncreasing": 0.25,
    "AutoContrast": 0.25,
}
_WEIGHTS_3A = {
    "SolarizeIncreasing": 6.0,
    "Desaturate": 6.0,
    "GaussianBlur": 6.0,
    "Rotate": 3.0,
    "ShearX": 2.0,
    "ShearY": 2.0,
    "PosterizeIncreasing": 1.0,
    "AutoContrast": 1.0,
    "ColorIncreasing": 1.0,
    "SharpnessIncreasing": 1.0,
    "ContrastIncreasing": 1.0,
    "BrightnessIncreasing": 1.0,
    "Equalize": 1.0,
    "Invert": 1.0,
}
_WEIGHTS_OLD = {  # the set "w0" of timm before 0.9, which never drew the last two operations
    "Rotate": 0.3,
    "ShearX": 0.2,
    "ShearY": 0.2,
    "TranslateXRel": 0.1,
    "TranslateYRel": 0.1,
    "Color": 0.025,
    "Sharpness": 0.025,
    "AutoContrast": 0.025,
    "Solarize": 0.005,
    "SolarizeAdd": 0.005,
    "Contrast": 0.005,
    "Brightness": 0.005,
    "Equalize": 0.005,
}
_SECTION = re.compile(r"(mstd|mmax|inc|m|n|p)(inf|\d+(?:\.\d+)?)|(w0|t[a-z0-9]+)")


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Applies `layers` operations drawn from a list, each with a probability.

    Attributes:
      operations: names of the operations.
      table: the operations by name.
      weights: relative probability of each, drawn without replacement; None: all equal, drawn with
        replacement.
      layers: number of operations drawn for an image.
      probability: that a drawn operation is applied.
      magnitude: mean of the level.
      magnitude_std: standard deviation of the level; inf: uniform from 0 to `magnitude`.
      magnitude_max: levels are clipped to [0, magnitude_max].
      filters: Pillow filters, one of which each geometric operation draws.
    """

    operations: Sequence[str]
    table: Mapping[str, image_ops.Operation]
    filters: Sequence[Image.Resampling]
    weights: Sequence[float] | None = None
    layers: int = 2
    probability: float = 0.5
    magnitude: float = 10.0
    magnitude_std: float = 0.0
    magnitude_max: float = 10.0

    def __call__(self, image: image_ops.AnyImage, rng: np.random.Generator) -> image_ops.AnyImage:
        """Returns the augmented RGB image; `rng` is the source of every random number."""
        if self.weights is None:
            chosen = rng.integers(len(self.operations), size=self.layers)
        else:
            odds = np.array(self.weights) / sum(self.weights)
            chosen = rng.choice(len(odds), size=self.layers, replace=False, p=odds)
        for index in chosen:
            if rng.random() < self.probability:
                operation = self.table[self.operations[index]]
                sign = 1 if rng.random() < 0.5 else -1
                filter_ = self.filters[int(rng.integers(len(self.filters)))]
                image = operation(image, self._draw_level(rng), sign, filter_)
        return image

    def _draw_level(self, rng: np.random.Generator) -> float:
        level = self.magnitude
        if self.magnitude_std == math.inf:
            level = rng.uniform(0, self.magnitude)
        elif self.magnitude_std > 0:
            level = rng.normal(self.magnitude, self.magnitude_std)
        return min(max(level, 0.0), self.magnitude_max)


@dataclasses.dataclass(frozen=True)
class ThreeAugment:
    """3-Augment of DeiT III: one of greyscale, solarisation and Gaussian blur, equally likely."""

    table: Mapping[str, image_ops.Operation]

    def __call__(self, image: image_ops.AnyImage, rng: np.random.Generator) -> image_ops.AnyImage:
        """Returns the augmented RGB image; `rng` is the source of every random number."""
        name, level = (
            ("Solarize", 5.0),  # values of at least 128
            ("Desaturate", 10.0),  # completely
            ("GaussianBlur", None),
        )[rng.integers(3)]
        if level is None:
            level = rng.uniform(0, 10)  # a radius of 0.1 to 2
        return self.table[name](image, level, 1, Image.Resampling.BICUBIC)


@dataclasses.dataclass(frozen=True)
class NoPolicy:
    """Leaves the image as it is."""

    def __call__(self, image: image_ops.AnyImage, rng: np.random.Generator) -> image_ops.AnyImage:
        """Returns the image itself."""
        del rng
        return image


Policy = RandAugment | ThreeAugment | NoPolicy


def parse_policy(
    text: str,
    filters: Sequence[Image.Resampling],
    table: Mapping[str, image_ops.Operation] = image_ops.OPERATIONS,
) -> Policy:
    """Parses a policy string of timm.

    "" means no policy and "3a" means 3-Augment. RandAugment is "rand" followed by sections, joined
    by "-", in any order; defaults in brackets: m9 magnitude (10), n2 operations per image (2), p0.5
    probability of each (0.5), mstd0.5 standard deviation of the magnitude (0; above 100: uniform
    from 0 to m), mmax10 upper bound of the magnitude (10), inc1 the increasing forms (inc0),
    tweights, t3a, t3aw or w0 another set of operations.

    Args:
      text: the string.
      filters: Pillow filters, one of which each geometric operation draws.
      table: the operations by name.

    Returns:
      The policy, called as policy(image, rng).

    Raises:
      UserError: a part of the string is unknown.
    """
    if text == "":
        return NoPolicy()
    if text == "3a":
        return ThreeAugment(table)
    head, *sections = text.split("-")
    if head != "rand":
        raise UserError(f"augment.policy is {text!r}: expected 'rand-…', '3a' or ''")
    values, operations_set = {}, ""
    for section in sections:
        match = _SECTION.fullmatch(section)
        if match is None:
            raise UserError(
                f"augment.policy {text!r}: unknown section {section!r} (expected sections such as "
                f"m9, n2, p0.5, mstd0.5, mmax10, inc1, tweights, t3a, t3aw and w0)"
            )
        if match[3]:
            operations_set = match[3]
        else:
            values[match[1]] = float(match[2])
    operations, weights = _operations(operations_set, increasing=bool(values.get("inc", 0)))
    std, layers = values.get("mstd", 0.0), int(values.get("n", 2))
    if weights is not None and layers > len(operations):
        raise UserError(
            f"augment.policy {text!r}: n{layers} is more than the {len(operations)} operations"
        )
    return RandAugment(
        operations=operations,
        table=table,
        filters=tuple(filters),
        weights=weights,
        layers=layers,
        probability=values.get("p", 0.5),
        magnitude=values.get("m", 10.0),
        magnitude_std=math.inf if std > 100 else std,
        magnitude_max=values.get("mmax", 10.0),
    )


def _operations(name: str, increasing: bool) -> tuple[Sequence[str], Sequence[float] | None]:
    """Returns the operations of a set and their weights."""
    if name == "":
        return (_INCREASING if increasing else _PLAIN), None
    if name == "t3a":
        return ("SolarizeIncreasing", "Desaturate", "GaussianBlur"), None
    if name == "w0":
        forms = dict(zip(_PLAIN, _INCREASING if increasing else _PLAIN, strict=True))
        return tuple(forms[old] for old in _WEIGHTS_OLD), tuple(_WEIGHTS_OLD.values())
    if name in ("tweights", "t3aw"):
        weighted = _WEIGHTS if name == "tweights" else _WEIGHTS_3A
        return tuple(weighted), tuple(weighted.values())
    raise UserError(f"augment.policy: unknown set {name!r} (expected tweights, t3a, t3aw or w0)")
