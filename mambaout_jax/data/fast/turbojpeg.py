"""libjpeg-turbo 3, called directly: it decodes a part of a JPEG, to Pillow's pixels.

It is the one in the wheel of the package `turbojpeg`, whose Python functions decode whole images
alone, or else the system's. Source: the TurboJPEG API, turbojpeg.h.
"""

import ctypes
import ctypes.util
import functools
import importlib.metadata

import numpy as np

_DECOMPRESS = 1  # TJINIT_DECOMPRESS
_SUBSAMPLING, _WIDTH, _HEIGHT, _COLORSPACE = 4, 5, 6, 8  # TJPARAM_...
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
    "tj3DecompressHeader": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t]),
    "tj3SetCroppingRegion": (ctypes.c_int, [ctypes.c_void_p, _Region]),
    "tj3Decompress8": (
        ctypes.c_int,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p, *[ctypes.c_int] * 2],
    ),
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """Returns libjpeg-turbo 3, None where there is none."""
    try:
        files = importlib.metadata.files("turbojpeg") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    paths = [str(file.locate()) for file in files if file.name.startswith("libturbojpeg")]
    for path in (*paths, ctypes.util.find_library("turbojpeg")):
        try:
            found = ctypes.CDLL(path) if path else None
            for name, (result, arguments) in _FUNCTIONS.items():
                function = getattr(found, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError):  # of another system, or older than 3
            continue
        return found
    return None


class Decoder:
    """Decodes one image: a handle used again would lend its tables to a file that has none."""

    def __init__(self):
        """Makes the handle.

        Raises:
          ValueError: libjpeg-turbo 3 is not installed.
        """
        found = library()
        if found is None:
            raise ValueError("libjpeg-turbo 3 is not installed")
        self._library = found
        self._handle = found.tj3Init(_DECOMPRESS)

    def __del__(self):
        if hasattr(self, "_handle"):
            self._library.tj3Destroy(self._handle)

    def _check(self, code: int) -> None:
        if code:  # also a warning, behind which an error may hide: Pillow shall judge
            raise ValueError(self._library.tj3GetErrorStr(self._handle).decode(errors="replace"))

    def _get(self, parameter: int) -> int:
        return self._library.tj3Get(self._handle, parameter)

    def size(self, file_bytes: bytes) -> tuple[int, int] | None:
        """Returns the (width, height) of a JPEG of three colours, None of another.

        Raises:
          ValueError: libjpeg-turbo finds anything wrong with its header.
        """
        self._check(self._library.tj3DecompressHeader(self._handle, file_bytes, len(file_bytes)))
        if self._get(_COLORSPACE) != _YCBCR or self._get(_SUBSAMPLING) < 0:
            return None
        return self._get(_WIDTH), self._get(_HEIGHT)

    def decode(self, file_bytes: bytes, box: tuple[int, int, int, int]) -> tuple[np.ndarray, int]:
        """Decodes a part of a JPEG, and of the columns to its left those of the same blocks.

        The outermost columns and rows are upsampled as if the image ended there.

        Args:
          file_bytes: a file that has a `size`.
          box: (left, top, right, bottom) of the part.

        Returns:
          uint32 [rows, columns], the bytes R, G, B and one that counts for nothing, and the
          image's column that is its first.

        Raises:
          ValueError: libjpeg-turbo finds anything wrong with it.
        """
        if self.size(file_bytes) is None:
            raise ValueError("no colours of the kind that are decoded in part")
        left, top, right, bottom = box
        first = left - left % _BLOCK_WIDTHS[self._get(_SUBSAMPLING)]
        region = _Region(first, top, right - first, bottom - top)
        self._check(self._library.tj3SetCroppingRegion(self._handle, region))
        pixels = np.empty((region.h, region.w), np.uint32)
        place, pitch = pixels.ctypes.data, 4 * region.w  # bytes
        code = self._library.tj3Decompress8(
            self._handle, file_bytes, len(file_bytes), place, pitch, _RGBX
        )
        self._check(code)
        pixels.flags.writeable = False  # as those from Pillow, lest Numba compile for both
        return pixels, first
