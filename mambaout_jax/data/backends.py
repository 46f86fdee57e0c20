"""Two ways to make a training picture's pixels: Pillow's, and a faster one."""

import importlib.util
from typing import Protocol

import numpy as np
from PIL import Image

from mambaout_jax.data import decoding, image_ops
from mambaout_jax.errors import UserError

_SHIFTS = (Image.Resampling.BICUBIC,)  # filters where the compiled warp is the faster one


class Picture(Protocol):
    """A decoded picture."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""


class Backend(Protocol):
    """Decodes, crops and moves pixels; picklable."""

    def decode(self, file_bytes: bytes, name: str) -> Picture:
        """Decodes a file to RGB, or raises `decoding.BadImageError`."""

    def resized_crop(
        self,
        picture: Picture,
        box: tuple[int, int, int, int],
        size: tuple[int, int],
        filter_: Image.Resampling,
    ) -> Image.Image:
        """Resizes the part (left, top, right, bottom) to (width, height)."""

    def warp(
        self, image: Image.Image, coefficients: tuple[float, ...], filter_: Image.Resampling
    ) -> Image.Image:
        """Does what `image_ops.pillow_warp` does."""


class PillowBackend:
    """The reference's own library and pixels."""

    def decode(self, file_bytes: bytes, name: str) -> Image.Image:
        """See `Backend`."""
        return decoding.decode(file_bytes, name)

    def resized_crop(self, picture, box, size, filter_) -> Image.Image:
        """See `Backend`."""
        return picture.crop(box).resize(size, filter_)

    def warp(self, image, coefficients, filter_) -> Image.Image:
        """See `Backend`."""
        return image_ops.pillow_warp(image, coefficients, filter_)


class _Pixels:
    """uint8 [H, W, 3]."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels
        self.size = (pixels.shape[1], pixels.shape[0])


class FastBackend:
    """simplejpeg decodes, and Numba resizes and shifts.

    simplejpeg is libjpeg-turbo as Pillow is, with the accurate transform and smooth upsampling,
    and its pixels are equal where both carry the same release. `kernels` tells the resize's.
    """

    def decode(self, file_bytes: bytes, name: str) -> _Pixels:
        """See `Backend`; anything but a JPEG of three colours goes through Pillow."""
        import simplejpeg

        try:
            if file_bytes[:2] == b"\xff\xd8":
                _, _, colorspace, _ = simplejpeg.decode_jpeg_header(file_bytes)
                if colorspace == "YCbCr":
                    return _Pixels(simplejpeg.decode_jpeg(file_bytes, colorspace="RGB"))
        except ValueError:
            pass  # Pillow says what is wrong with it
        return _Pixels(np.asarray(decoding.decode(file_bytes, name)))

    def resized_crop(self, picture, box, size, filter_) -> Image.Image:
        """See `Backend`."""
        from mambaout_jax.data import kernels

        left, top, right, bottom = box
        part = picture.pixels[top:bottom, left:right]
        return Image.fromarray(kernels.resize(part, size, filter_))

    def warp(self, image, coefficients, filter_) -> Image.Image:
        """See `Backend`."""
        from mambaout_jax.data import kernels

        if filter_ not in _SHIFTS:
            return image_ops.pillow_warp(image, coefficients, filter_)
        pixels = kernels.affine(np.asarray(image), coefficients, filter_, image_ops.FILL)
        return Image.fromarray(pixels)


def open_backend(name: str) -> Backend:
    """Returns the backend of that name.

    Raises:
      UserError: there is none, or its libraries are missing.
    """
    if name == "pillow":
        return PillowBackend()
    if name != "fast":
        raise UserError(f"data.backend is {name!r}; it is 'pillow' or 'fast'.")
    for library in ("simplejpeg", "numba"):
        if importlib.util.find_spec(library) is None:
            raise UserError(f"data.backend 'fast' needs {library}: pip install -e '.[fast]'.")
    return FastBackend()
