"""Pillow's affine transform in Numba, with the same pixels.

Images are uint32 [H, W]: the bytes R, G, B and one without meaning. Each function follows the
arithmetic of Pillow's 8-bit code in the same order and precision, so the pixels are equal. Loops go
over a whole row, so the compiler can vectorize them.
"""

import numpy as np
from PIL import Image

from mambaout_jax.data.fast.compiling import compiled


@compiled
def _color(pixel: np.int32, shift: int) -> np.int32:
    return (pixel >> np.int32(shift)) & np.int32(255)


@compiled
def _linear(taps: np.ndarray, j: int, i: int, shift: int, x: float) -> float:
    """Interpolates a colour between taps 1 and 2 of row j of int32 [4, 4, n], with x in [0, 1)."""
    a, b = _color(taps[j, 1, i], shift), _color(taps[j, 2, i], shift)
    return a + np.int32(b - a) * x


@compiled
def _cubic(taps: np.ndarray, j: int, i: int, shift: int, x: float) -> float:
    """Interpolates like `_linear`. Integers are exact, and take less time than floats."""
    a, b = _color(taps[j, 0, i], shift), _color(taps[j, 1, i], shift)
    c, d = _color(taps[j, 2, i], shift), _color(taps[j, 3, i], shift)
    p2 = np.int32(c - a)
    p3 = np.int32(2 * (a - b) + c - d)
    p4 = np.int32(b - a + d - c)
    return b + x * (p2 + x * (p3 + x * p4))


@compiled
def _pack(value: float, shift: int) -> np.uint32:
    return np.uint32(np.int32(min(max(value, 0.0), 255.0))) << np.uint32(shift)


@compiled
def _bilinear(taps: np.ndarray, x: np.ndarray, y: np.ndarray, both: bool, out: np.ndarray) -> None:
    """Interpolates int32 [4, 4, n] along both axes, or only its row 1."""
    out[:] = 0
    for shift in range(0, 24, 8):  # one by one: all colours at once need too many registers
        if not both:
            for i in range(len(out)):
                out[i] |= _pack(_linear(taps, 1, i, shift, x[i]), shift)
        else:
            for i in range(len(out)):
                a, b = _linear(taps, 1, i, shift, x[i]), _linear(taps, 2, i, shift, x[i])
                out[i] |= _pack(a + (b - a) * y[i], shift)


@compiled
def _bicubic(taps: np.ndarray, x: np.ndarray, y: np.ndarray, both: bool, out: np.ndarray) -> None:
    """See `_bilinear`."""
    out[:] = 0
    for shift in range(0, 24, 8):
        if not both:
            for i in range(len(out)):
                out[i] |= _pack(_cubic(taps, 1, i, shift, x[i]), shift)
        else:
            for i in range(len(out)):
                a, b = _cubic(taps, 0, i, shift, x[i]), _cubic(taps, 1, i, shift, x[i])
                c, d = _cubic(taps, 2, i, shift, x[i]), _cubic(taps, 3, i, shift, x[i])
                p2 = -a + c
                p3 = 2 * (a - b) + c - d
                p4 = -a + b - c + d
                out[i] |= _pack(b + y[i] * (p2 + y[i] * (p3 + y[i] * p4)), shift)


@compiled
def _origin(m: tuple, row: int, column: int) -> tuple[float, float]:
    """Returns the place (x, y) that a pixel is taken from."""
    x = m[0] * (column + 0.5) + m[1] * (row + 0.5) + m[2]
    y = m[3] * (column + 0.5) + m[4] * (row + 0.5) + m[5]
    return x, y


@compiled
def _is_inside(m: tuple, row: int, column: int, shape: tuple[int, int]) -> bool:
    x, y = _origin(m, row, column)
    return 0.0 <= x < shape[1] and 0.0 <= y < shape[0]


@compiled
def _inside(m: tuple, row: int, shape: tuple[int, int]) -> tuple[int, int]:
    """Returns the range of columns of a row whose pixels come from inside the image."""
    start, stop = 0, shape[1]
    while start < stop and not _is_inside(m, row, start, shape):
        start += 1
    while start < stop and not _is_inside(m, row, stop - 1, shape):
        stop -= 1
    return start, stop


@compiled
def _padded(pixels: np.ndarray) -> np.ndarray:
    """Adds two pixels on each side, the same as the outermost: neighbours are never outside."""
    height, width = pixels.shape
    result = np.empty((height + 4, width + 4), pixels.dtype)
    for row in range(height + 4):
        line, padded = pixels[min(max(row - 2, 0), height - 1)], result[row]
        padded[0] = padded[1] = line[0]
        padded[width + 2] = padded[width + 3] = line[width - 1]
        for i in range(width):  # four times as fast as an assignment of slices
            padded[i + 2] = line[i]
    return result


@compiled
def _affine(pixels: np.ndarray, m: tuple, fill: int, bicubic: bool) -> np.ndarray:
    height, width = pixels.shape
    across = not (m[0] == 1.0 and m[1] == 0.0 and m[2] == 0.0)  # else each x is its own
    down = not (m[3] == 0.0 and m[4] == 1.0 and m[5] == 0.0)
    both = across and down
    source = _padded(pixels).ravel()
    stride = width + 4
    result = np.empty((height, width), np.uint32)
    corners = np.empty(width, np.uint32)  # places of the neighbours' first ones
    dxs, dys = np.empty(width), np.empty(width)
    taps = np.empty((4, 4, width), np.int32)
    first, last = (0, 4) if bicubic else (1, 3)  # of four neighbours in a row: those with a weight
    result[:] = fill
    for row in range(height):
        start, stop = _inside(m, row, pixels.shape)
        out, dx, dy = result[row, start:stop], dxs[start:stop], dys[start:stop]
        for i in range(len(out)):
            x, y = _origin(m, row, start + i)
            left, top = np.floor(x - 0.5), np.floor(y - 0.5)
            dx[i], dy[i] = x - 0.5 - left, y - 0.5 - top
            corners[i] = np.int32(np.int32(top + 1.0) * np.int32(stride) + np.int32(left + 1.0))
        for j in range(first, last) if both else range(1, 2):
            for k in range(first, last):
                tap = source[j * stride + k if across else k * stride + 1 :]
                for i in range(len(out)):
                    taps[j, k, i] = tap[corners[i]]
        if bicubic:
            _bicubic(taps, dx if across else dy, dy, both, out)
        else:
            _bilinear(taps, dx if across else dy, dy, both, out)
    return result


def affine(
    pixels: np.ndarray,
    coefficients: tuple[float, ...],
    filter_: Image.Resampling,
    fill: tuple[int, int, int],
) -> np.ndarray:
    """Transforms as `PIL.Image.Image.transform` does with `Transform.AFFINE` and the same size.

    Args:
      pixels: uint32 [H, W].
      coefficients: (a, b, c, d, e, f): pixel (x, y) is taken from (ax + by + c, dx + ey + f).
      filter_: bilinear or bicubic.
      fill: colour of pixels from outside.

    Returns:
      uint32 [H, W].
    """
    matrix = tuple(float(value) for value in coefficients)
    red, green, blue = fill
    packed = red | green << 8 | blue << 16
    return _affine(pixels, matrix, packed, filter_ == Image.Resampling.BICUBIC)
