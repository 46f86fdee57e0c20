"""Masks as a person sees them: palette files, overlays on images, and legends."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mambaout_jax.data.segmentation.masks import IGNORED

_OPACITY = 0.5


@dataclasses.dataclass(frozen=True)
class Entry:
    """A class of a legend: its name, its colour (R, G, B), and its part of the pixels in [0, 1]."""

    name: str
    colour: tuple[int, ...]
    share: float


def palette(num_classes: int) -> np.ndarray:
    """Returns a colour for each class, uint8 [num_classes, 3], none of them black.

    The colours are those of PASCAL VOC from its first object on: each three bits of a number, from
    the lowest, are the next bits of red, green and blue, from the highest.
    """
    numbers = np.arange(1, num_classes + 1)[:, None]
    colours = np.zeros((num_classes, 3), np.int64)
    for bit in range(8):
        colours |= (numbers >> (3 * bit + np.arange(3)) & 1) << (7 - bit)
    return colours.astype(np.uint8)


def palette_image(labels: np.ndarray, num_classes: int) -> Image.Image:
    """Returns labels [H, W] as an image of mode "P" whose values they are; IGNORED is black."""
    image = Image.fromarray(labels.astype(np.uint8))
    colours = np.zeros((256, 3), np.uint8)
    colours[:num_classes] = palette(num_classes)
    image.putpalette(colours.tobytes())  # makes it an image of mode "P"
    return image


def overlay(image: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns an image uint8 [H, W, 3] under the half transparent colours of labels [H, W].

    IGNORED pixels stay as they are.
    """
    coloured = np.asarray(palette_image(labels, num_classes).convert("RGB"), np.float32)
    mixed = np.round(image + _OPACITY * (coloured - image)).astype(np.uint8)
    return np.where((labels == IGNORED)[..., None], image, mixed)


def legend(labels: np.ndarray, class_names: Sequence[str]) -> list[Entry]:
    """Returns the classes that appear in labels [H, W], those of the most pixels first.

    IGNORED pixels have no entry, but count among the pixels.
    """
    counts = np.bincount(labels.ravel(), minlength=len(class_names))[: len(class_names)]
    colours = palette(len(class_names)).tolist()
    return [
        Entry(class_names[label], tuple(colours[label]), counts[label] / labels.size)
        for label in np.argsort(-counts, kind="stable").tolist()
        if counts[label]
    ]
