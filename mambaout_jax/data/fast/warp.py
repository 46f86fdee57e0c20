"""Pillow's affine transform in Numba, with the same pixels.

Images are uint32 [H, W]: the bytes R, G, B and one without meaning. Each function follows the
arithmetic of Pillow's 8-bit code in the same order and precision, so the pixels are equal. Loops go
over a whole row, so the compiler can vectorize them.
"""

import numpy as np
from PIL import Image

from mambaout_jax.data.fast.compiling import compiled


@compiled
def _blend(
    values: np.ndarray, x: np.ndarray, moves: bool, bicubic: bool, result: np.ndarray
) -> None:
    """Interpolates between rows 1 and 2 of [4, n], at the distance `x` from row 1."""
    if not moves:
        for i in range(len(x)):
            result[i] = values[1, i]
    elif bicubic:
        for i in range(len(x)):
            a, b, c, d = values[0, i], values[1, i], values[2, i], values[3, i]
            p2 = -a + c
            p3 = 2 * (a - b) + c - d
            p4 = -a + b - c + d
            result[i] = b + x[i] * (p2 + x[i] * (p3 + x[i] * p4))
    else:
        for i in range(len(x)):
            result[i] = values[1, i] + (values[2, i] - values[1, i]) * x[i]


@compiled
def _blend_integers(
    values: np.ndarray, x: np.ndarray, moves: bool, bicubic: bool, result: np.ndarray
) -> None:
    """Computes `_blend` of int32 [4, n], with integers where the result is exact."""
    if not (moves and bicubic):
        _blend(values, x, moves, bicubic, result)
        return
    for i in range(len(x)):
        a, b, c, d = values[0, i], values[1, i], values[2, i], values[3, i]
        p2 = np.int32(c - a)
        p3 = np.int32(2 * (a - b) + c - d)
        p4 = np.int32(b - a + d - c)
        result[i] = b + x[i] * (p2 + x[i] * (p3 + x[i] * p4))


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
def _taps(moves: bool, bicubic: bool) -> tuple[int, int]:
    """Returns the range of the four neighbours that have a weight."""
    if not moves:
        return 1, 2
    return (0, 4) if bicubic else (1, 3)


@compiled
def _within(place: np.int32, step: int, size: int) -> np.int32:
    """Returns place + step, clipped to the image."""
    moved = np.int32(place + np.int32(step))
    return np.int32(min(max(moved, np.int32(0)), np.int32(size - 1)))


@compiled
def _affine(pixels: np.ndarray, m: tuple, fill: int, bicubic: bool) -> np.ndarray:
    height, width = pixels.shape
    across = not (m[0] == 1.0 and m[1] == 0.0 and m[2] == 0.0)  # else each x is its own
    down = not (m[3] == 0.0 and m[4] == 1.0 and m[5] == 0.0)
    source = pixels.ravel()
    result = np.empty((height, width), np.uint32)
    left, top = np.empty(width, np.int32), np.empty(width, np.int32)
    dxs, dys = np.empty(width), np.empty(width)
    columns, rows = np.empty((4, width), np.int32), np.empty(width, np.int32)
    values, lines = np.empty((3, 4, width), np.int32), np.empty((3, 4, width))
    final, gathered = np.empty(width), np.empty(width, np.int32)
    result[:] = fill
    for row in range(height):
        start, stop = _inside(m, row, pixels.shape)
        packed, dx, dy = result[row, start:stop], dxs[start:stop], dys[start:stop]
        for column in range(len(packed)):
            x, y = _origin(m, row, start + column)
            x, y = x - 0.5, y - 0.5
            left[column], top[column] = np.int32(np.floor(x)), np.int32(np.floor(y))
            dx[column], dy[column] = x - left[column], y - top[column]
        for i in range(*_taps(across, bicubic)):
            for column in range(len(packed)):
                columns[i, column] = _within(left[column], i - 1, width)
        for j in range(*_taps(down, bicubic)):
            for column in range(len(packed)):
                rows[column] = _within(top[column], j - 1, height) * np.int32(width)
            for i in range(*_taps(across, bicubic)):
                for column in range(len(packed)):
                    gathered[column] = source[np.uint32(rows[column] + columns[i, column])]
                for column in range(len(packed)):
                    pixel = gathered[column]
                    values[0, i, column] = pixel & np.int32(255)
                    values[1, i, column] = (pixel >> np.int32(8)) & np.int32(255)
                    values[2, i, column] = (pixel >> np.int32(16)) & np.int32(255)
            for channel in range(3):
                _blend_integers(values[channel], dx, across, bicubic, lines[channel, j])
        packed[:] = 0
        for channel in range(3):
            _blend(lines[channel], dy, down, bicubic, final)
            for column in range(len(packed)):
                value = np.uint32(np.int32(min(max(final[column], 0.0), 255.0)))
                packed[column] |= value << np.uint32(8 * channel)
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
