"""The part of a JPEG that a crop needs: Pillow's pixels, and little else."""

import math

import numpy as np
from PIL import Image

from mambaout_jax.data.fast import turbojpeg

_START, _END = b"\xff\xd8", b"\xff\xd9"
_BASELINE = (0xC0, 0xC1)  # frames whose rows follow each other in one scan
_NO_BASELINE = (0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xDA)
_CONTEXT = 2  # pixels on each side that the upsampling of the colours uses


class Jpeg:
    """A complete baseline JPEG of three components, until a part of it is decoded.

    Attributes:
      size: (width, height) in pixels.
    """

    def __init__(self, file_bytes: bytes):
        """Reads the size.

        Raises:
          ValueError: the file is not such a JPEG, or Pillow warns of its size, or libjpeg-turbo 3
            is not installed.
        """
        if turbojpeg.library() is None or not file_bytes.endswith(_END):
            raise ValueError("no complete JPEG")
        place = self._place_of_height = _place_of_height(file_bytes)
        height = int.from_bytes(file_bytes[place : place + 2], "big")
        width = int.from_bytes(file_bytes[place + 2 : place + 4], "big")
        components = file_bytes[place + 4]
        if components != 3 or not 0 < width * height <= (Image.MAX_IMAGE_PIXELS or math.inf):
            raise ValueError("no ordinary JPEG")
        self.size = width, height
        self._file_bytes = file_bytes

    def decode_crop(
        self, box: tuple[int, int, int, int]
    ) -> tuple[np.ndarray, tuple[int, int, int, int]]:
        """Decodes what a crop needs, and some pixels around it.

        The entropy code of the rows above has to be read, because it has no index. That of the rows
        below is not read: the decoder gets a file with a smaller height.

        Args:
          box: (left, top, right, bottom) of the crop.

        Returns:
          uint32 [rows, columns], the bytes R, G, B and one without meaning, and the crop's box in
          it.

        Raises:
          ValueError: libjpeg-turbo finds anything wrong with the file.
        """
        left, top, right, bottom = box
        width, height = self.size
        above = max(top - _CONTEXT, 0)
        part = (
            max(left - _CONTEXT, 0),
            above,
            min(right + _CONTEXT, width),
            min(bottom + _CONTEXT, height),
        )
        rows = min(part[3] + _CONTEXT, height)
        lowered = bytearray(self._file_bytes)
        lowered[self._place_of_height : self._place_of_height + 2] = rows.to_bytes(2, "big")
        pixels, first = turbojpeg.decode(lowered, part)
        return pixels, (left - first, top - above, right - first, bottom - above)


def _place_of_height(file_bytes: bytes) -> int:
    """Returns the offset of the height in a baseline JPEG with its rows in one scan, in order.

    Raises:
      ValueError: it is not one. (A progressive one, if incomplete, is smoothed: this depends on the
        crop.)
    """
    place = 2 if file_bytes.startswith(_START) else len(file_bytes)
    while place + 9 < len(file_bytes) and file_bytes[place] == 0xFF:
        marker = file_bytes[place + 1]
        if marker in _BASELINE:
            return place + 5
        if marker in _NO_BASELINE:
            break
        if marker == 0xFF:  # any number of these may precede a marker
            place += 1
        else:
            place += 2 + int.from_bytes(file_bytes[place + 2 : place + 4], "big")
    raise ValueError("no baseline JPEG")
