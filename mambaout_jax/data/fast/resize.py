"""Pillow's resize in Numba, with the same pixels.

Images are uint32 [H, W]: the bytes R, G, B and one without meaning. Each function follows the
arithmetic of Pillow's 8-bit code. Its sums are integers, so the pixels are equal.
"""

import math

import numpy as np
import PIL
from PIL import Image

from mambaout_jax.data.fast.compiling import compiled

_BITS = 22  # of a weight's fraction: 32, less 8 of the pixel and 2 spare
_COLUMNS_FIRST = int(PIL.__version__.partition(".")[0]) >= 13  # if that is less work
_TILE = 8


@compiled
def _weight(x: float, bicubic: bool) -> float:
    x = abs(x)
    if not bicubic:
        return 1.0 - x if x < 1.0 else 0.0
    if x < 1.0:
        return ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1
    if x < 2.0:
        return (((x - 5) * x + 8) * x - 4) * -0.5
    return 0.0


@compiled
def _weights(source: int, target: int, bicubic: bool) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first source pixel of each target pixel, and its fixed-point weights."""
    scale = source / target
    filter_scale = max(scale, 1.0)
    support = (2.0 if bicubic else 1.0) * filter_scale
    taps = math.ceil(support) * 2 + 1
    first = np.zeros(target, np.int64)
    fixed = np.zeros((target, taps), np.int32)
    exact = np.zeros(taps)
    inverse = 1.0 / filter_scale
    for out in range(target):
        center = (out + 0.5) * scale
        low = max(int(center - support + 0.5), 0)
        count = min(int(center + support + 0.5), source) - low
        total = 0.0
        for tap in range(count):
            exact[tap] = _weight((tap + low - center + 0.5) * inverse, bicubic)
            total += exact[tap]
        for tap in range(count):
            value = exact[tap]
            if total != 0.0:
                value /= total
            value *= 1 << _BITS
            fixed[out, tap] = int(value - 0.5) if value < 0 else int(value + 0.5)
        first[out] = low
    return first, fixed


@compiled
def _blend_rows(pixels: np.ndarray, target: int, bicubic: bool, mirrored: bool) -> np.ndarray:
    """Resizes the first axis of uint32 [rows, n] to `target`, in reverse order if mirrored."""
    rows = len(pixels)
    first, fixed = _weights(rows, target, bicubic)
    source = pixels.view(np.uint8)
    length = source.shape[1]
    result = np.empty((target, length), np.uint8)
    total = np.empty(length, np.int32)
    for out in range(target):
        row, weight = source[first[out]], fixed[out, 0]
        for i in range(length):
            total[i] = np.int32((1 << (_BITS - 1)) + np.int32(row[i]) * weight)
        for tap in range(1, fixed.shape[1]):
            weight = fixed[out, tap]
            if weight == 0:  # also where a tap is outside
                continue
            row = source[first[out] + tap]
            for i in range(length):
                total[i] = np.int32(total[i] + np.int32(row[i]) * weight)
        line = result[target - 1 - out if mirrored else out]
        for i in range(length):
            line[i] = np.uint8(min(max(total[i] >> _BITS, 0), 255))
    return result.view(np.uint32)


@compiled
def _transpose(pixels: np.ndarray) -> np.ndarray:
    """Swaps the axes of uint32 [a, b], a few rows at a time, which suits the cache."""
    a, b = pixels.shape
    result = np.empty((b, a), np.uint32)
    whole = a - a % _TILE
    for top in range(0, whole, _TILE):
        for j in range(b):
            for i in range(_TILE):
                result[j, top + i] = pixels[top + i, j]
    for i in range(whole, a):
        for j in range(b):
            result[j, i] = pixels[i, j]
    return result


@compiled
def _resize(
    pixels: np.ndarray,
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    bicubic: bool,
    mirrored: bool,
    columns_first: bool,
) -> np.ndarray:
    left, top, right, bottom = box
    width, height = size
    crop = pixels[top:bottom, left:right]
    if columns_first:
        low = _transpose(_blend_rows(np.ascontiguousarray(crop), height, bicubic, False))
        return _transpose(_blend_rows(low, width, bicubic, mirrored))
    narrow = _blend_rows(_transpose(crop), width, bicubic, mirrored)
    return _blend_rows(_transpose(narrow), height, bicubic, False)


@compiled
def _write_rgb(pixels: np.ndarray, out: np.ndarray) -> None:
    height, width = pixels.shape
    source = pixels.view(np.uint8)
    for row in range(height):
        four, three = source[row], out[row]
        for i in range(width):
            three[3 * i] = four[4 * i]
            three[3 * i + 1] = four[4 * i + 1]
            three[3 * i + 2] = four[4 * i + 2]


def write_rgb(pixels: np.ndarray, out: np.ndarray) -> None:
    """Writes uint32 [H, W] to uint8 [H, W, 3]."""
    _write_rgb(pixels, out.reshape(len(out), -1))


def resize(
    pixels: np.ndarray,
    box: tuple[int, int, int, int],
    size: tuple[int, int],
    filter_: Image.Resampling,
    mirrored: bool = False,
) -> np.ndarray:
    """Crops and resizes as the installed release of Pillow does.

    Args:
      pixels: uint32 [H, W].
      box: (left, top, right, bottom) of the part to resize.
      size: (width, height) of the result.
      filter_: bilinear or bicubic.
      mirrored: whether left and right are swapped in the result.

    Returns:
      uint32 [height, width].
    """
    left, top, right, bottom = box
    shorter, narrower = bottom - top - size[1], right - left - size[0]
    columns_first = _COLUMNS_FIRST and shorter > 0 and shorter > 2 * narrower
    bicubic = filter_ == Image.Resampling.BICUBIC
    return _resize(pixels, box, size, bicubic, mirrored, columns_first)
