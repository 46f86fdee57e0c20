"""Two implementations of the same pixels of a training image: Pillow, and a faster one."""

from typing import Protocol

import numpy as np
from PIL import Image

from mambaout_jax.data import decoding, image_ops
from mambaout_jax.data.image_ops import AnyImage
from mambaout_jax.errors import UserError


class Backend(image_ops.Pixels, Protocol):
    """Decodes, crops and changes images.

    Attributes:
      made_by: the libraries that it uses, in words.
    """

    made_by: str

    def open(self, file_bytes: bytes, name: str) -> AnyImage:
        """Opens a file as RGB, or raises `decoding.BadImageError`, as may `resized_crop`."""

    def resized_crop(
        self,
        image: AnyImage,
        box: tuple[int, int, int, int],
        size: tuple[int, int],
        filter_: Image.Resampling,
        mirrored: bool = False,
    ) -> AnyImage:
        """Resizes the box (left, top, right, bottom) to (width, height); mirrors it if asked."""

    def write(self, image: AnyImage, out: np.ndarray) -> None:
        """Writes an image, but not an opened one, to uint8 [H, W, 3]."""


class PillowBackend(image_ops.PillowPixels):
    """Pillow, the library that timm uses."""

    made_by = "Pillow"

    def open(self, file_bytes: bytes, name: str) -> Image.Image:
        """See `Backend`."""
        return decoding.decode(file_bytes, name)

    def resized_crop(self, image, box, size, filter_, mirrored=False) -> Image.Image:
        """See `Backend`."""
        resized = image.crop(box).resize(size, filter_)
        return resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else resized

    def write(self, image: Image.Image, out: np.ndarray) -> None:
        """See `Backend`."""
        out[:] = image


def open_backend(name: str) -> Backend:
    """Returns the backend "pillow" or "fast"; "auto" is "fast" where Numba is installed.

    Raises:
      UserError: the libraries of "fast" are missing.
    """
    if name == "pillow":
        return PillowBackend()
    try:
        from mambaout_jax.data.fast.backend import FastBackend
    except ImportError as error:  # of Numba, or by Numba, which refuses a NumPy newer than itself
        if name == "auto":
            return PillowBackend()
        raise UserError(
            f"data.backend 'fast' needs Numba ({error}): pip install -e '.[fast]'"
        ) from error
    return FastBackend()
