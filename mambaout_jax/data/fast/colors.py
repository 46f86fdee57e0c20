"""Pillow's operations on colours in Numba, with the same pixels.

Images are uint32 [H, W]: the bytes R, G, B and one without meaning.
"""

import numpy as np

from mambaout_jax.data.fast.compiling import compiled

_PLACES = np.array([[0], [8], [16]], np.uint32)  # of the colours in a pixel, in bits


@compiled
def _grey(pixel: np.uint32) -> np.uint32:
    """Returns the grey value of a pixel, as Pillow's conversion to "L" computes it."""
    red = (pixel & np.uint32(255)) * np.uint32(19595)
    green = ((pixel >> np.uint32(8)) & np.uint32(255)) * np.uint32(38470)
    blue = ((pixel >> np.uint32(16)) & np.uint32(255)) * np.uint32(7471)
    return np.uint32(red + green + blue + np.uint32(0x8000)) >> np.uint32(16)


@compiled
def _blend(degenerate: np.int32, value: np.int32, factor: np.float32) -> np.uint32:
    """Returns the blend of two values, as `PIL.Image.blend` computes it."""
    blended = np.float32(degenerate) + factor * np.float32(np.int32(value - degenerate))
    return np.uint32(np.int32(min(max(blended, np.float32(0)), np.float32(255))))


@compiled
def _lookup(pixels: np.ndarray, tables: np.ndarray) -> np.ndarray:
    """Replaces each value v of colour c in uint32 [n] by tables[c, v], uint32 [3, 256]."""
    result = np.empty_like(pixels)
    red, green, blue = tables
    for i in range(len(pixels)):
        pixel = pixels[i]
        result[i] = (
            red[pixel & np.uint32(255)]
            | green[(pixel >> np.uint32(8)) & np.uint32(255)]
            | blue[(pixel >> np.uint32(16)) & np.uint32(255)]
        )
    return result


@compiled
def _histogram(pixels: np.ndarray) -> np.ndarray:
    counts = np.zeros((3, 256), np.int64)
    for i in range(len(pixels)):
        pixel = pixels[i]
        counts[0, pixel & np.uint32(255)] += 1
        counts[1, (pixel >> np.uint32(8)) & np.uint32(255)] += 1
        counts[2, (pixel >> np.uint32(16)) & np.uint32(255)] += 1
    return counts


@compiled
def _stretching(histogram: np.ndarray) -> np.ndarray:
    """Returns the tables that map the lowest value of each colour to 0 and the highest to 255."""
    tables = np.empty((3, 256), np.uint32)
    for color in range(3):
        values = np.flatnonzero(histogram[color])
        low, high = values[0], values[-1]
        scale = 255.0 / (high - low) if high > low else 1.0
        offset = -low * scale if high > low else 0.0
        for value in range(256):
            tables[color, value] = min(max(int(value * scale + offset), 0), 255)
    return tables


@compiled
def _equalizing(histogram: np.ndarray) -> np.ndarray:
    """Returns the tables that make the values of each colour about equally frequent."""
    tables = np.empty((3, 256), np.uint32)
    for color in range(3):
        counts = histogram[color]
        step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
        below = step // 2
        for value in range(256):
            tables[color, value] = min(below // step, 255) if step else value
            below += counts[value]
    return tables


@compiled
def _sum_of_greys(pixels: np.ndarray) -> int:
    total = 0
    for i in range(len(pixels)):
        total += _grey(pixels[i])
    return total


@compiled
def _color(pixels: np.ndarray, factor: np.float32) -> np.ndarray:
    result = np.empty_like(pixels)
    for i in range(len(pixels)):
        pixel = pixels[i]
        grey, packed = np.int32(_grey(pixel)), np.uint32(0)
        for shift in range(0, 24, 8):
            value = np.int32((pixel >> np.uint32(shift)) & np.uint32(255))
            packed |= _blend(grey, value, factor) << np.uint32(shift)
        result[i] = packed
    return result


@compiled
def _sharpness(pixels: np.ndarray, factor: np.float32) -> np.ndarray:
    height, width = pixels.shape
    source = pixels.view(np.uint8)
    result = source.copy()  # the border stays as it is
    for row in range(1, height - 1):
        above, here, below = source[row - 1], source[row], source[row + 1]
        for i in range(4, 4 * width - 4):
            ones = np.int32(above[i - 4]) + np.int32(above[i]) + np.int32(above[i + 4])
            ones += np.int32(here[i - 4]) + np.int32(here[i + 4])
            ones += np.int32(below[i - 4]) + np.int32(below[i]) + np.int32(below[i + 4])
            total = np.int32(ones + np.int32(5) * np.int32(here[i]))
            # rounded thirteenths: never half-way, so Pillow's float32 rounds the same
            smooth = np.int32(np.int32(2) * total + np.int32(13)) // np.int32(26)
            result[row, i] = _blend(smooth, np.int32(here[i]), factor)
    return result.view(np.uint32)


def lookup(pixels: np.ndarray, table: bytes | np.ndarray) -> np.ndarray:
    """Replaces values as `PIL.Image.Image.point` does.

    Args:
      pixels: uint32 [H, W].
      table: 256 values for all three colours, or for each, [3, 256].

    Returns:
      uint32 [H, W].
    """
    if isinstance(table, bytes):
        table = np.frombuffer(table, np.uint8)
    return _lookup(pixels.ravel(), table.astype(np.uint32) << _PLACES).reshape(pixels.shape)


def autocontrast(pixels: np.ndarray) -> np.ndarray:
    """Stretches each colour to the whole range, as `PIL.ImageOps.autocontrast` does."""
    return lookup(pixels, _stretching(_histogram(pixels.ravel())))


def equalize(pixels: np.ndarray) -> np.ndarray:
    """Spreads each colour evenly over the range, as `PIL.ImageOps.equalize` does."""
    return lookup(pixels, _equalizing(_histogram(pixels.ravel())))


def mean_grey(pixels: np.ndarray) -> int:
    """Returns the rounded mean of the greyscale image, as `PIL.ImageEnhance.Contrast` does."""
    return int(_sum_of_greys(pixels.ravel()) / pixels.size + 0.5)


def color(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blends with the greyscale image as `PIL.ImageEnhance.Color` does.

    Args:
      pixels: uint32 [H, W].
      factor: 0 is grey, 1 no change.

    Returns:
      uint32 [H, W].
    """
    return _color(pixels.ravel(), np.float32(factor)).reshape(pixels.shape)


def sharpness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Blends with a smoothed image as `PIL.ImageEnhance.Sharpness` does.

    Args:
      pixels: uint32 [H, W].
      factor: 0 is smooth, 1 no change.

    Returns:
      uint32 [H, W].
    """
    return _sharpness(pixels, np.float32(factor))
