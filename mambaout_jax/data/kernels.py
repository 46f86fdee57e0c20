"""Pillow's resize and affine transform again, compiled by Numba.

Each function follows the arithmetic of Pillow's 8-bit code in the same order and precision, so
that the tests may ask for equality. One difference to Pillow 13: `resize` always begins along the
rows, as every Pillow before it did; Pillow 13 begins along the columns where that is less work,
which rounds some pixels of some crops differently.
"""

import math

import numba
import numpy as np
from PIL import Image

_BITS = 22  # of the fraction of a weight: 32 less 8 of the pixel and 2 to spare

_compile = numba.njit(nogil=True, cache=True, boundscheck=False)


@_compile
def _weight(x: float, bicubic: bool) -> float:
    x = abs(x)
    if not bicubic:
        return 1.0 - x if x < 1.0 else 0.0
    if x < 1.0:
        return ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1
    if x < 2.0:
        return (((x - 5) * x + 8) * x - 4) * -0.5
    return 0.0


@_compile
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
        first[out] = min(low, source - taps) if source >= taps else 0
        shift = low - first[out]
        if shift > 0:
            for tap in range(taps - 1, -1, -1):
                fixed[out, tap] = fixed[out, tap - shift] if tap >= shift else 0
    return first, fixed


@_compile
def _blend_rows(pixels: np.ndarray, target: int, bicubic: bool) -> np.ndarray:
    """Resizes the first axis of uint8 [rows, n] to `target`."""
    rows, length = pixels.shape
    first, fixed = _weights(rows, target, bicubic)
    taps = min(fixed.shape[1], rows)
    result = np.empty((target, length), np.uint8)
    total = np.empty(length, np.int32)
    for out in range(target):
        for i in range(length):
            total[i] = np.int32(1 << (_BITS - 1))
        for tap in range(taps):
            weight = fixed[out, tap]
            if weight == 0:
                continue
            row = pixels[first[out] + tap]
            for i in range(length):
                total[i] = np.int32(total[i] + np.int32(row[i]) * weight)
        for i in range(length):
            value = total[i] >> _BITS
            result[out, i] = np.uint8(min(max(value, 0), 255))
    return result


@_compile
def _transpose(pixels: np.ndarray) -> np.ndarray:
    """Swaps the first two axes of uint8 [a, b, 3], in tiles that fit the cache."""
    a, b, _ = pixels.shape
    result = np.empty((b, a, 3), np.uint8)
    for top in range(0, a, 16):
        for left in range(0, b, 16):
            for i in range(top, min(top + 16, a)):
                for j in range(left, min(left + 16, b)):
                    result[j, i, 0] = pixels[i, j, 0]
                    result[j, i, 1] = pixels[i, j, 1]
                    result[j, i, 2] = pixels[i, j, 2]
    return result


@_compile
def _resize(pixels: np.ndarray, width: int, height: int, bicubic: bool) -> np.ndarray:
    rows, columns, _ = pixels.shape
    turned = _transpose(pixels).reshape((columns, rows * 3))
    narrow = _blend_rows(turned, width, bicubic).reshape((width, rows, 3))
    straight = _transpose(narrow).reshape((rows, width * 3))
    return _blend_rows(straight, height, bicubic).reshape((height, width, 3))


@_compile
def _cubic(a: float, b: float, c: float, d: float, x: float) -> float:
    p2 = -a + c
    p3 = 2 * (a - b) + c - d
    p4 = -a + b - c + d
    return b + x * (p2 + x * (p3 + x * p4))


@_compile
def _affine(pixels: np.ndarray, m: tuple, fill: tuple, bicubic: bool) -> np.ndarray:
    height, width, _ = pixels.shape
    result = np.empty((height, width, 3), np.uint8)
    for row in range(height):
        for column in range(width):
            x = m[0] * (column + 0.5) + m[1] * (row + 0.5) + m[2]
            y = m[3] * (column + 0.5) + m[4] * (row + 0.5) + m[5]
            if not (0.0 <= x < width and 0.0 <= y < height):
                for channel in range(3):
                    result[row, column, channel] = fill[channel]
                continue
            x -= 0.5
            y -= 0.5
            left, top = math.floor(x), math.floor(y)
            dx, dy = x - left, y - top
            y1 = min(max(top, 0), height - 1)
            y2 = min(max(top + 1, 0), height - 1)
            x1 = min(max(left, 0), width - 1)
            x2 = min(max(left + 1, 0), width - 1)
            if not bicubic:
                for channel in range(3):
                    a = float(pixels[y1, x1, channel])
                    b = float(pixels[y2, x1, channel])
                    upper = a + (float(pixels[y1, x2, channel]) - a) * dx
                    lower = b + (float(pixels[y2, x2, channel]) - b) * dx
                    result[row, column, channel] = np.uint8(upper + (lower - upper) * dy)
                continue
            y0 = min(max(top - 1, 0), height - 1)
            y3 = min(max(top + 2, 0), height - 1)
            x0 = min(max(left - 1, 0), width - 1)
            x3 = min(max(left + 2, 0), width - 1)
            for channel in range(3):
                value = _cubic_row(pixels, y1, x0, x1, x2, x3, channel, dx)
                if dy != 0.0:  # else the polynomial is its first term
                    value = _cubic(
                        _cubic_row(pixels, y0, x0, x1, x2, x3, channel, dx),
                        value,
                        _cubic_row(pixels, y2, x0, x1, x2, x3, channel, dx),
                        _cubic_row(pixels, y3, x0, x1, x2, x3, channel, dx),
                        dy,
                    )
                result[row, column, channel] = np.uint8(min(max(value, 0.0), 255.0))
    return result


@_compile
def _cubic_row(
    pixels: np.ndarray, y: int, x0: int, x1: int, x2: int, x3: int, channel: int, dx: float
) -> float:
    b = float(pixels[y, x1, channel])
    if dx == 0.0:
        return b
    return _cubic(
        float(pixels[y, x0, channel]),
        b,
        float(pixels[y, x2, channel]),
        float(pixels[y, x3, channel]),
        dx,
    )


def resize(pixels: np.ndarray, size: tuple[int, int], filter_: Image.Resampling) -> np.ndarray:
    """Resizes as `PIL.Image.Image.resize` does.

    Args:
      pixels: uint8 [H, W, 3].
      size: (width, height) of the result.
      filter_: bilinear or bicubic.

    Returns:
      uint8 [height, width, 3].
    """
    return _resize(np.ascontiguousarray(pixels), *size, filter_ == Image.Resampling.BICUBIC)


def affine(
    pixels: np.ndarray,
    coefficients: tuple[float, ...],
    filter_: Image.Resampling,
    fill: tuple[int, int, int],
) -> np.ndarray:
    """Transforms as `PIL.Image.Image.transform` does with `Transform.AFFINE` and the same size.

    Args:
      pixels: uint8 [H, W, 3].
      coefficients: (a, b, c, d, e, f): pixel (x, y) is taken from (ax + by + c, dx + ey + f).
      filter_: bilinear or bicubic.
      fill: colour of what comes from outside.

    Returns:
      uint8 [H, W, 3].
    """
    matrix = tuple(float(value) for value in coefficients)
    bicubic = filter_ == Image.Resampling.BICUBIC
    return _affine(np.ascontiguousarray(pixels), matrix, fill, bicubic)
