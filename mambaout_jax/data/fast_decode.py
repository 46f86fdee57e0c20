"""libjpeg-turbo by simplejpeg, down to the last row that is needed: Pillow's pixels, sooner."""

import numpy as np
import simplejpeg

_END = b"\xff\xd9"
_BASELINE = (0xC0, 0xC1)  # frames whose rows follow each other in one scan
_NO_BASELINE = (0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xDA)
_CONTEXT = 2  # rows that the upsampling of the colours looks ahead


def jpeg_size(file_bytes: bytes) -> tuple[int, int] | None:
    """Returns the (width, height) of a complete JPEG of three colours, None of anything else."""
    if not (file_bytes.startswith(b"\xff\xd8") and file_bytes.endswith(_END)):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(file_bytes)
    except ValueError:
        return None
    return (width, height) if colors == "YCbCr" else None


def decode_rows(file_bytes: bytes, height: int, rows: int) -> np.ndarray:
    """Decodes a picture's first rows.

    Rows can be left out at the end alone: those before are needed to find where the next begin.
    They are left out by telling the decoder of a lower picture.

    Args:
      file_bytes: a file that has a `jpeg_size`.
      height: of the picture.
      rows: that are needed.

    Returns:
      uint32 [at least `rows`, W]: the bytes R, G, B and one that counts for nothing.

    Raises:
      ValueError: libjpeg-turbo gives up.
    """
    lower = min(rows + _CONTEXT, height)
    place = _place_of_height(file_bytes) if lower < height else None
    if place is not None:
        file_bytes = file_bytes[:place] + lower.to_bytes(2, "big") + file_bytes[place + 2 :]
    # strictness would object to the rows left out, and to flaws that Pillow lets pass
    pixels = simplejpeg.decode_jpeg(file_bytes, colorspace="RGBX", strict=False)
    return pixels.view(np.uint32)[..., 0]


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
