"""Two ways to the same pixels of a training picture: Pillow, and a faster one."""

from typing import Protocol

from PIL import Image

from mambaout_jax.data import decoding, image_ops
from mambaout_jax.data.image_ops import Picture
from mambaout_jax.errors import UserError


class Backend(image_ops.Pixels, Protocol):
    """Decodes, crops and changes pictures.

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
    """Returns the backend "pillow" or "fast"; "auto" is the fast one where Numba is.

    Raises:
      UserError: there is none of that name, or its libraries are missing.
    """
    if name not in ("auto", "pillow", "fast"):
        raise UserError(f"data.backend is {name!r}; it is 'auto', 'pillow' or 'fast'.")
    if name == "pillow":
        return PillowBackend()
    try:
        from mambaout_jax.data.fast.backend import FastBackend
    except ImportError as error:  # of Numba, or by Numba, which refuses a NumPy newer than itself
        if name == "auto":
            return PillowBackend()
        raise UserError(
            f"data.backend 'fast' needs Numba ({error}): pip install -e '.[fast]'."
        ) from error
    return FastBackend()
