"""Photometric distortion: random brightness, contrast, saturation and hue.

Source: mmsegmentation's `PhotoMetricDistortion`, with Pillow's HSV images, whose hue has 256 steps
a turn, in place of OpenCV's, whose hue has 180.
"""

import numpy as np
from PIL import Image

_BRIGHTNESS = 32.0  # the largest change of a value, either way
_CONTRAST = (0.5, 1.5)  # bounds of the factor
_SATURATION = (0.5, 1.5)
_HUE = 18  # the largest change, of the 180 steps of a turn
_VALUES = np.arange(256, dtype=np.float32)
_SAME = bytes(range(256))


def distort(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Changes brightness, contrast, saturation and hue, each with probability 1/2.

    Brightness is first and saturation is before hue. Contrast follows brightness or comes last,
    with even odds.

    Args:
      image: mode RGB.
      rng: the source of every random number.

    Returns:
      The changed image, mode RGB.
    """
    if _coin(rng):
        image = image.point(_linear(1.0, rng.uniform(-_BRIGHTNESS, _BRIGHTNESS)) * 3)
    contrast_last = _coin(rng)
    if not contrast_last:
        image = _contrast(image, rng)
    if _coin(rng):
        saturation = _linear(rng.uniform(*_SATURATION), 0.0)
        image = _in_hsv(image, _SAME + saturation + _SAME)
    if _coin(rng):
        turn = round(int(rng.integers(-_HUE, _HUE)) * 256 / 180) % 256
        image = _in_hsv(image, _SAME[turn:] + _SAME[:turn] + _SAME * 2)
    return _contrast(image, rng) if contrast_last else image


def _contrast(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.point(_linear(rng.uniform(*_CONTRAST), 0.0) * 3) if _coin(rng) else image


def _coin(rng: np.random.Generator) -> bool:
    return rng.random() < 0.5


def _linear(factor: float, shift: float) -> bytes:
    """Returns the table of factor * value + shift in float32, clipped and truncated."""
    return np.clip(_VALUES * factor + shift, 0, 255).astype(np.uint8).tobytes()


def _in_hsv(image: Image.Image, table: bytes) -> Image.Image:
    """Changes hue, saturation and value of an RGB image by a table of 3 x 256 values."""
    return image.convert("HSV").point(table).convert("RGB")
