"""Pillow's part: from an encoded file to an RGB picture, and the names of its filters."""

import importlib.util
import io
import struct
from collections.abc import Callable
from typing import Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from mambaout_jax.errors import UserError

_RESAMPLING = {member.name.lower(): member for member in Image.Resampling}
_DAMAGES = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error)


class Picture(Protocol):
    """A decoded picture, of which a part can be cut out."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""

    def crop(self, box: tuple[int, int, int, int]) -> Image.Image:
        """Cuts out (left, top, right, bottom)."""


class BadImageError(UserError):
    """A file that is no picture, or a damaged one."""


def decode(file_bytes: bytes, name: str = "the file") -> Image.Image:
    """Decodes an encoded file to RGB, as the reference does: EXIF orientation is not applied.

    Args:
      file_bytes: the encoded file.
      name: what a message calls the file.

    Returns:
      The picture, mode RGB.

    Raises:
      BadImageError: Pillow cannot decode all of it.
    """
    try:
        with Image.open(io.BytesIO(file_bytes)) as image:
            if image.mode == "RGB":
                image.load()
                return image
            return image.convert("RGB")
    except (*_DAMAGES, Image.DecompressionBombError) as error:
        reason = "no image" if isinstance(error, UnidentifiedImageError) else str(error)
        raise BadImageError(
            f"{name} cannot be decoded ({reason}); replace it or leave it out of the data set."
        ) from error


class _Pixels:
    """A decoded picture as uint8 [H, W, 3], of which only a crop becomes a Pillow picture."""

    def __init__(self, pixels: np.ndarray):
        self._pixels = pixels
        self.size = (pixels.shape[1], pixels.shape[0])

    def crop(self, box: tuple[int, int, int, int]) -> Image.Image:
        left, top, right, bottom = box
        return Image.fromarray(self._pixels[top:bottom, left:right])


def decode_with_simplejpeg(file_bytes: bytes, name: str) -> Picture:
    """Decodes JPEGs of three colours faster, and anything else as `decode` does.

    Both are libjpeg-turbo with the accurate transform and smooth upsampling: where the two carry
    the same release of it, the pixels are equal, as on the files of the tests.

    Raises:
      BadImageError: the file cannot be decoded.
    """
    import simplejpeg

    try:
        if file_bytes[:2] == b"\xff\xd8":
            _, _, colorspace, _ = simplejpeg.decode_jpeg_header(file_bytes)
            if colorspace == "YCbCr":
                return _Pixels(simplejpeg.decode_jpeg(file_bytes, colorspace="RGB"))
    except ValueError:
        pass  # Pillow says what is wrong with it
    return decode(file_bytes, name)


def decoder(name: str) -> Callable[[bytes, str], Picture]:
    """Returns what decodes training pictures, called with the file's bytes and its name.

    Raises:
      UserError: there is none of that name, or its library is missing.
    """
    if name == "pillow":
        return decode
    if name != "simplejpeg":
        raise UserError(f"data.decoder is {name!r}; it is 'pillow' or 'simplejpeg'.")
    if importlib.util.find_spec("simplejpeg") is None:
        raise UserError("data.decoder 'simplejpeg' needs: pip install 'mambaout_jax[fast]'.")
    return decode_with_simplejpeg


def resampling(name: str) -> Image.Resampling:
    """Returns Pillow's filter of that name.

    Raises:
      UserError: there is none.
    """
    try:
        return _RESAMPLING[name]
    except KeyError:
        raise UserError(
            f"The interpolation {name!r} is unknown; known are {', '.join(sorted(_RESAMPLING))}."
        ) from None
