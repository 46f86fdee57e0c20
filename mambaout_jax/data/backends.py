"""Two ways to the same pixels of a training picture: Pillow, and a faster one."""

import importlib.util
from typing import Protocol

from PIL import Image

from mambaout_jax.data import decoding, image_ops
from mambaout_jax.data.image_ops import Picture
from mambaout_jax.errors import UserError


class Backend(image_ops.Pixels, Protocol):
    """Decodes, crops and changes pictures; picklable.

    `np.asarray` of any picture but an opened one is uint8 [H, W, 3].
    """

    def open(self, file_bytes: bytes, name: str) -> Picture:
        """Opens a file as RGB, or raises `decoding.BadImageError`, as may `resized_crop`."""

    def resized_crop(
        self,
        picture: Picture,
        box: tuple[int, int, int, int],
        size: tuple[int, int],
        filter_: Image.Resampling,
        mirrored: bool = False,
    ) -> Picture:
        """Resizes the part (left, top, right, bottom) to (width, height), and may mirror it."""


class PillowBackend(image_ops.PillowPixels):
    """The reference's own library."""

    def open(self, file_bytes: bytes, name: str) -> Image.Image:
        """See `Backend`."""
        return decoding.decode(file_bytes, name)

    def resized_crop(self, picture, box, size, filter_, mirrored=False) -> Image.Image:
        """See `Backend`."""
        image = picture.crop(box).resize(size, filter_)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def open_backend(name: str) -> Backend:
    """Returns the backend "pillow" or "fast"; "auto" is the fast one where its libraries are.

    Raises:
      UserError: there is none of that name, or its libraries are missing.
    """
    if name not in ("auto", "pillow", "fast"):
        raise UserError(f"data.backend is {name!r}; it is 'auto', 'pillow' or 'fast'.")
    missing = importlib.util.find_spec("numba") is None
    if name == "pillow" or (name == "auto" and missing):
        return PillowBackend()
    if missing:
        raise UserError("data.backend 'fast' needs Numba: pip install -e '.[fast]'.")
    from mambaout_jax.data.fast.backend import FastBackend

    return FastBackend()
