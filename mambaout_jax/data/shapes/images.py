"""Makes one image and its mask, from the numbers of its split and place alone.

A class is an outline with a texture: a striped disc and a checked disc, a striped square and so on.
Colours, sizes, places and directions are random, so that neither colour nor texture nor outline
alone names a class. The arithmetic is that of IEEE 754 without transcendental functions: the pixels
are the same on every machine.
"""

import io

import numpy as np
from PIL import Image

CLASSES = (
    "background",
    "striped disc",
    "checked disc",
    "striped square",
    "checked square",
    "striped triangle",
    "checked triangle",
)
SPLITS = {"train": 600, "validation": 100}  # images
SIZE = 96  # pixels of a side

_SEED = 20202
_SHAPES = (3, 6)  # in an image, the upper bound excluded
_RADIUS = (10.0, 20.0)  # pixels, of the disc of the same area
_PERIOD = (4.0, 7.0)  # pixels
_CONTRAST = 0.3  # of the two colours of a texture, at least, as the mean over R, G and B
_CELLS = 12  # of the ground's noise, along a side
_NOISE = 0.04  # the largest change of a pixel, either way
_HALF_SIDE = 0.886  # of the square, and
_INRADIUS = 0.778  # of the triangle, of the same area as a disc of radius 1


def make_pixels(split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Makes image number `index` of a split.

    Returns:
      The image, uint8 [SIZE, SIZE, 3], and the labels of its pixels, uint8 [SIZE, SIZE].
    """
    rng = np.random.default_rng((_SEED, list(SPLITS).index(split), index))
    one, other = _colours(rng)
    image = one + (other - one) * _smooth_noise(rng)[..., None]
    labels = np.zeros((SIZE, SIZE), np.uint8)
    for _ in range(int(rng.integers(*_SHAPES))):
        label = int(rng.integers(1, len(CLASSES)))
        outline, texture = divmod(label - 1, 2)
        radius = _RADIUS[0] + (_RADIUS[1] - _RADIUS[0]) * rng.random()
        centre = radius + (SIZE - 2 * radius) * rng.random(2)
        inside = _OUTLINES[outline](*_turned(centre, rng), radius)
        one, other = _colours(rng)
        painted = np.where(_pattern(texture, rng)[..., None], one, other)
        image = np.where(inside[..., None], painted, image)
        labels[inside] = label
    image += _NOISE * (2 * rng.random((SIZE, SIZE, 3)) - 1)
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8), labels


def make_files(split: str, index: int) -> tuple[bytes, bytes]:
    """Returns the same image and mask as PNG files."""
    files = []
    for pixels in make_pixels(split, index):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        files.append(file.getvalue())
    return files[0], files[1]


def name_of(index: int) -> str:
    """Returns the name of an image's files, without the suffix."""
    return f"{index:04d}"


def _turned(centre: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns the coordinates of all pixels around a centre, in a random direction."""
    while True:
        x, y = 2 * rng.random(2) - 1
        length = np.sqrt(x * x + y * y)
        if 0.1 < length < 1:
            break
    cos, sin = x / length, y / length
    rows, columns = np.indices((SIZE, SIZE)) + 0.5 - centre[:, None, None]
    return cos * columns + sin * rows, cos * rows - sin * columns


def _disc(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    return x * x + y * y < radius * radius


def _square(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) < _HALF_SIDE * radius


def _triangle(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    slanted = np.sqrt(0.75) * np.abs(x) - 0.5 * y
    return np.maximum(slanted, y) < _INRADIUS * radius


_OUTLINES = (_disc, _square, _triangle)


def _pattern(texture: int, rng: np.random.Generator) -> np.ndarray:
    """Returns where the first colour of stripes (0) or checks (1) is, bool [SIZE, SIZE]."""
    x, y = _turned(np.zeros(2), rng)
    period = _PERIOD[0] + (_PERIOD[1] - _PERIOD[0]) * rng.random()
    stripes = np.floor(2 * x / period) % 2 == 0
    return stripes ^ (np.floor(2 * y / period) % 2 == 0) if texture else stripes


def _colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws two colours that differ."""
    while True:
        one, other = rng.random((2, 3))
        if np.abs(one - other).mean() > _CONTRAST:
            return one, other


def _smooth_noise(rng: np.random.Generator) -> np.ndarray:
    """Returns random values on a grid, interpolated linearly, [SIZE, SIZE] in [0, 1)."""
    grid = rng.random((_CELLS + 1, _CELLS + 1))
    place = np.arange(SIZE) * _CELLS / SIZE
    cell = place.astype(int)
    part = place - cell
    rows = grid[cell] + (grid[cell + 1] - grid[cell]) * part[:, None]
    return rows[:, cell] + (rows[:, cell + 1] - rows[:, cell]) * part
