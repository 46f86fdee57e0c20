"""Pillow's part: from an encoded file to an RGB picture, and the names of its filters."""

import io
import struct

from PIL import Image, UnidentifiedImageError

from mambaout_jax.errors import UserError

_RESAMPLING = {member.name.lower(): member for member in Image.Resampling}
_DAMAGES = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error)


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
            f"{name} cannot be decoded ({reason}); replace it or leave it out."
        ) from error


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
