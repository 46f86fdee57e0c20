"""The part of a JPEG that a crop needs: Pillow's pixels, and none that the crop throws away."""

import math

import numpy as np
from PIL import Image

from mambaout_jax.data.fast import turbojpeg

_START, _END = b"\xff\xd8", b"\xff\xd9"
_BASELINE = (0xC0, 0xC1)  # frames whose rows follow each other in one scan
_NO_BASELINE = (0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xDA)
_CONTEXT = 2  # pixels that the upsampling of the colours looks about


class Jpeg:
    """A complete baseline JPEG of three colours, until a part of it is asked for.

    Attributes:
      size: (width, height) in pixels.
    """

    def __init__(self, file_bytes: bytes):
        """Reads the header.

        Raises:
          ValueError: the file is none, or one that Pillow warns of for its size, or libjpeg-turbo 3
            is not installed.
        """
        if not file_bytes.endswith(_END):
            raise ValueError("no complete JPEG")
        self._place_of_height = _place_of_height(file_bytes)
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
        the rows below is left out by telling the decoder of a lower image.

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
        rows = min(part[3] + _CONTEXT, height)
        place = self._place_of_height
        lowered = b"".join(
            (self._file_bytes[:place], rows.to_bytes(2, "big"), self._file_bytes[place + 2 :])
        )
        pixels, first = self._decoder.decode(lowered, part)
        return pixels, (left - first, top - above, right - first, bottom - above)


def _place_of_height(file_bytes: bytes) -> int:
    """Returns where a baseline JPEG, whose rows follow each other in one scan, tells its height.

    Raises:
      ValueError: it is none. (The smoothing of an incomplete progressive one depends on the crop.)
    """
    place = 2 if file_bytes.startswith(_START) else len(file_bytes)
    while place + 9 < len(file_bytes) and file_bytes[place] == 0xFF:
        marker = file_bytes[place + 1]
        if marker in _BASELINE:
            return place + 5
        if marker in _NO_BASELINE:
            break
        if marker == 0xFF:  # markers may be preceded by any number of these
            place += 1
        else:
            place += 2 + int.from_bytes(file_bytes[place + 2 : place + 4], "big")
    raise ValueError("no baseline JPEG")
