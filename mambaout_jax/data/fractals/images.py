"""Makes one image of the dataset, from the numbers of its class, split and place alone."""

import colorsys
import io
import math

import numpy as np
from PIL import Image

from mambaout_jax.data.fractals.systems import attractor, cells, class_system

CLASSES = 100
SPLITS = {"train": 500, "validation": 50}  # images of a class
SIZE = 128  # pixels of a side
QUALITY = 90  # of the JPEG file

_SEED = 20201
_VARIATION = 0.15  # of a class's parameters; see `System.varied`
_POINTS = (4_000, 20_000)
_HALF_COVERED = 0.5  # points in a pixel that cover half of what is behind, as a part of the mean
_TURN = math.pi / 6  # the largest rotation of the whole, either way
_ZOOM = (0.6, 1.1)
_SHIFT = 0.35  # the largest, in units of the attractor's deviation
_CONTRAST = 0.2  # in brightness, of the colours of the attractor and of what is behind, at least
_HUES = 10  # of the attractors; classes whose numbers differ by a multiple of it share one
_HUE_CHANGE = 0.04  # the largest, of a turn


def make_pixels(label: int, split: str, index: int) -> np.ndarray:
    """Returns image number `index` of a class's part of a split, uint8 [SIZE, SIZE, 3]."""
    rng = np.random.default_rng((_SEED, label, list(SPLITS).index(split), index))
    image = _draw(_gradient(rng.random((2, 2, 3))), label, rng)
    return np.round(image * 255).astype(np.uint8)


def make_jpeg(label: int, split: str, index: int) -> bytes:
    """Returns the same image as a JPEG file. Its bytes depend on the version of libjpeg."""
    file = io.BytesIO()
    Image.fromarray(make_pixels(label, split, index)).save(file, "jpeg", quality=QUALITY)
    return file.getvalue()


def _draw(image: np.ndarray, label: int, rng: np.random.Generator) -> np.ndarray:
    """Draws a varied attractor of a class over an image: moved, turned, in two colours."""
    system = class_system(label).varied(_VARIATION, rng)
    low, high = _POINTS
    points = int(rng.integers(low, high))
    x, y, tint = attractor(system, points, rng)
    if rng.random() < 0.5:
        x = -x
    angle, zoom = _TURN * (2 * rng.random() - 1), _ZOOM[0] + rng.random() * (_ZOOM[1] - _ZOOM[0])
    cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
    shift = _SHIFT * (2 * rng.random(2) - 1)
    place = cells(cos * x - sin * y + shift[0], sin * x + cos * y + shift[1], SIZE)
    counts = np.bincount(place, minlength=SIZE * SIZE).astype(np.float64)
    weights = np.bincount(place, weights=tint, minlength=SIZE * SIZE)
    # Each point is a random patch of 3 x 3 pixels.
    patch = rng.random((3, 3)) < 0.5
    patch[1, 1] = True
    counts, weights = _patched(counts, patch), _patched(weights, patch)
    tints = weights / np.maximum(counts, 1)
    cover = counts / (counts + _HALF_COVERED * counts[counts > 0].mean())
    behind = float(image.mean())
    one, other = _colour(label, behind, rng), _colour(label, behind, rng)
    paint = one + (other - one) * tints[:, :, None]
    return image + (paint - image) * cover[:, :, None]


def _patched(flat: np.ndarray, patch: np.ndarray) -> np.ndarray:
    """Returns the sum of an image's copies, one shifted to each cell of the patch."""
    image = flat.reshape(SIZE, SIZE).copy()
    image[[0, -1]] = 0  # where points outside were put
    image[:, [0, -1]] = 0
    total = np.zeros_like(image)
    for row, column in np.argwhere(patch).tolist():
        total += np.roll(image, (row - 1, column - 1), (0, 1))
    return total


def _colour(label: int, behind: float, rng: np.random.Generator) -> np.ndarray:
    """Draws a colour of a class's hue whose brightness differs from what is behind."""
    while True:
        hue, saturation, value = rng.random(3)
        hue = label / _HUES + _HUE_CHANGE * (2 * hue - 1)
        colour = colorsys.hsv_to_rgb(hue % 1, 0.6 + 0.4 * saturation, 0.3 + 0.7 * value)
        if abs(sum(colour) / 3 - behind) > _CONTRAST:
            return np.array(colour)


def _gradient(corners: np.ndarray) -> np.ndarray:
    """Returns the image [SIZE, SIZE, 3] between the colours of four corners, [2, 2, 3]."""
    part = np.linspace(0, 1, SIZE)
    edges = corners[0] + (corners[1] - corners[0]) * part[:, None, None]
    return edges[:, None, 0] + (edges[:, None, 1] - edges[:, None, 0]) * part[None, :, None]
