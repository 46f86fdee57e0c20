"""Decoding with Pillow: from an encoded file to an RGB image, and the names of filters."""

import contextlib
import io
import struct
from collections.abc import Iterator

from PIL import Image, UnidentifiedImageError

from mambaout_jax.errors import StorageError, UserError, did_you_mean, first_line

_RESAMPLING = {member.name.lower(): member for member in Image.Resampling}
_DAMAGES = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error)


class BadImageError(UserError):
    """A file that is not an image, or a damaged one."""


class UnreadableError(BadImageError, StorageError):
    """An image that could not be read at any attempt."""


def decode(file_bytes: bytes | bytearray | memoryview, name: str = "the file") -> Image.Image:
    """Decodes an encoded file to RGB as timm does: EXIF orientation is not applied.

    Args:
      file_bytes: the encoded file.
      name: the name of the file in messages.

    Returns:
      The image, mode RGB.

    Raises:
      BadImageError: Pillow cannot decode all of it.
    """
    with errors(name), Image.open(io.BytesIO(file_bytes)) as image:
        if image.mode == "RGB":
            image.load()
            return image
        return image.convert("RGB")


def size(file_bytes: bytes, name: str) -> tuple[int, int]:
    """Returns the (width, height) of an encoded file, or raises BadImageError."""
    with errors(name), Image.open(io.BytesIO(file_bytes)) as image:
        return image.size


@contextlib.contextmanager
def errors(name: str) -> Iterator[None]:
    """Raises BadImageError for what Pillow raises for a file of that name."""
    try:
        yield
    except (*_DAMAGES, Image.DecompressionBombError) as error:
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "not an image" if unknown else first_line(error)
        raise BadImageError(
            f"{name} cannot be decoded ({reason}): replace it or remove it"
        ) from error


def resampling(name: str) -> Image.Resampling:
    """Returns the Pillow filter of that name.

    Raises:
      UserError: there is none.
    """
    try:
        return _RESAMPLING[name]
    except KeyError:
        raise UserError(
            f"unknown interpolation {name!r}{did_you_mean(name, _RESAMPLING)}"
            f" (expected one of {', '.join(sorted(_RESAMPLING))})"
        ) from None
