"""libjpeg-turbo 3, called directly: it decodes a part of a JPEG to the same pixels as Pillow.

The library is that of the package `turbojpeg`, whose Python functions decode whole images only, or
else the system's. Source: the TurboJPEG API, turbojpeg.h.
"""

import ctypes
import ctypes.util
import functools
import importlib.metadata
from collections.abc import Iterator
from typing import Any

import numpy as np

_DECOMPRESS = 1  # TJINIT_DECOMPRESS
_SUBSAMPLING, _COLORSPACE = 4, 8  # TJPARAM_...
_YCBCR = 1  # TJCS_YCbCr
_RGBX = 2  # TJPF_RGBX
_BLOCK_WIDTHS = (8, 16, 16, 8, 8, 32, 8)  # in pixels, by subsampling: tjMCUWidth


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "w", "h")]


_FUNCTIONS = {
    "tj3Init": (ctypes.c_void_p, [ctypes.c_int]),
    "tj3Destroy": (None, [ctypes.c_void_p]),
    "tj3Get": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_int]),
    "tj3GetErrorStr": (ctypes.c_char_p, [ctypes.c_void_p]),
    "tj3DecompressHeader": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]),
    "tj3SetCroppingRegion": (ctypes.c_int, [ctypes.c_void_p, _Region]),
    "tj3Decompress8": (
        ctypes.c_int,
        [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, *[ctypes.c_int] * 2],
    ),
}


class _Library:
    """The functions of libjpeg-turbo 3. Only the long one releases the GIL."""

    def __init__(self, path: str):
        """Loads it.

        Raises:
          OSError: it is of another system.
          AttributeError: it is older than 3.
        """
        quick, slow = ctypes.PyDLL(path), ctypes.CDLL(path)
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(slow if name == "tj3Decompress8" else quick, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)


@functools.cache
def library() -> "_Library | None":
    """Returns libjpeg-turbo 3, None where there is none."""
    for path in _paths():
        try:
            return _Library(path)
        except (OSError, AttributeError):
            continue
    return None


def _paths() -> Iterator[str]:
    """Yields where libjpeg-turbo may be."""
    try:
        files = importlib.metadata.files("turbojpeg") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    yield from (str(file.locate()) for file in files if file.name.startswith("libturbojpeg"))
    try:
        system = ctypes.util.find_library("turbojpeg")
    except OSError:  # it writes a temporary file
        system = None
    if system:
        yield system


def decode(file: bytearray, box: tuple[int, int, int, int]) -> tuple[np.ndarray, int]:
    """Decodes a part of a JPEG of three colours, and of the columns to its left the same blocks'.

    The outermost columns and rows are upsampled as if the image ended there.

    Args:
      file: the encoded file.
      box: (left, top, right, bottom) of the part.

    Returns:
      uint32 [rows, columns], the bytes R, G, B and one without meaning, and the image's column that
      is its first.

    Raises:
      ValueError: libjpeg-turbo 3 is not installed, or finds anything wrong with the file, or the
        file has no three colours.
    """
    turbo: Any = library()
    if turbo is None:
        raise ValueError("libjpeg-turbo 3 is not installed")
    # A handle that is used again would use its old tables for a file that has none.
    handle = turbo.tj3Init(_DECOMPRESS)
    try:
        return _decode(turbo, handle, file, box)
    finally:
        turbo.tj3Destroy(handle)


def _decode(
    turbo: Any, handle: int, file: bytearray, box: tuple[int, int, int, int]
) -> tuple[np.ndarray, int]:
    def check(code: int) -> None:
        if code:  # also a warning, behind which an error may hide: Pillow decides
            raise ValueError(turbo.tj3GetErrorStr(handle).decode(errors="replace"))

    first_byte = ctypes.c_char.from_buffer(file)  # keeps the file where it is
    source = ctypes.addressof(first_byte)
    check(turbo.tj3DecompressHeader(handle, source, len(file)))
    subsampling = turbo.tj3Get(handle, _SUBSAMPLING)
    if turbo.tj3Get(handle, _COLORSPACE) != _YCBCR or subsampling < 0:
        raise ValueError("no colours of the kind that are decoded in part")
    left, top, right, bottom = box
    first = left - left % _BLOCK_WIDTHS[subsampling]
    width, height = right - first, bottom - top
    check(turbo.tj3SetCroppingRegion(handle, _Region(first, top, width, height)))
    pixels = np.empty((height, width), np.uint32)
    check(turbo.tj3Decompress8(handle, source, len(file), pixels.ctypes.data, 4 * width, _RGBX))
    pixels.flags.writeable = False  # as those from Pillow: Numba compiles for each kind
    return pixels, first
