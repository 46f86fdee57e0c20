"""The part of a JPEG that a crop needs: Pillow's pixels, and none that the crop throws away."""

import math

import numpy as np
from PIL import Image

from mambaout_jax.data.fast import turbojpeg

_END = b"\xff\xd9"
_BASELINE = (0xC0, 0xC1)  # frames whose rows follow each other in one scan
_NO_BASELINE = (0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xDA)
_CONTEXT = 2  # pixels that the upsampling of the colours looks about


class Jpeg:
    """A complete JPEG of three colours, until a part of it is asked for.

    Attributes:
      size: (width, height) in pixels.
    """

    def __init__(self, file_bytes: bytes):
        """Reads the header.

        Raises:
          ValueError: the file is none, or one that Pillow warns of for its size, or libjpeg-turbo 3
            is not installed.
        """
        if not (file_bytes.startswith(b"\xff\xd8") and file_bytes.endswith(_END)):
            raise ValueError("no complete JPEG")
        self._decoder = turbojpeg.Decoder()
        size = self._decoder.size(file_bytes)
        if size is None or size[0] * size[1] > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise ValueError("no ordinary JPEG")
        self.size = size
        self._file_bytes = file_bytes

    def decode_crop(
        self, box: tuple[int, int, int, int]
    ) -> tuple[np.ndarray, tuple[int, int, int, int]]:
        """Decodes what a crop needs, and some pixels about it.

        The entropy code of the rows above has to be read, to find where the crop's begin; that of
        the rows below is left out by telling the decoder of a lower picture.

        Args:
          box: (left, top, right, bottom) of the crop.

        Returns:
          uint32 [rows, columns], the bytes R, G, B and one that counts for nothing, and the crop's
          box in it.

        Raises:
          ValueError: libjpeg-turbo gives up.
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
        file_bytes = _lowered(self._file_bytes, part[3] + _CONTEXT, height)
        pixels, first = self._decoder.decode(file_bytes, part)
        return pixels, (left - first, top - above, right - first, bottom - above)


def _lowered(file_bytes: bytes, rows: int, height: int) -> bytes:
    """Returns the file with fewer rows in its header, where its rows follow each other."""
    place = _place_of_height(file_bytes) if rows < height else None
    if place is None:
        return file_bytes
    return file_bytes[:place] + rows.to_bytes(2, "big") + file_bytes[place + 2 :]


def _place_of_height(file_bytes: bytes) -> int | None:
    """Returns where a baseline JPEG tells its height."""
    place = 2
    while file_bytes[place] == 0xFF:
        marker = file_bytes[place + 1]
        if marker in _BASELINE:
            return place + 5
        if marker in _NO_BASELINE:
            return None
        place += 2 + int.from_bytes(file_bytes[place + 2 : place + 4], "big")
    return None
