"""Two ways to the same pixels of a training picture: Pillow, and a faster one."""

import dataclasses
import importlib.util
from typing import Protocol

import numpy as np
from PIL import Image

from mambaout_jax.data import decoding, image_ops
from mambaout_jax.errors import UserError

_LIBRARIES = ("simplejpeg", "numba")  # of the fast backend


class Picture(Protocol):
    """A decoded picture."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""


class Backend(Protocol):
    """Decodes, crops and moves pixels; picklable."""

    def open(self, file_bytes: bytes, name: str) -> Picture:
        """Opens a file as RGB, or raises `decoding.BadImageError`, as may `resized_crop`."""

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
        """Does what `image_ops.warp` does."""

    def sharpness(self, image: Image.Image, factor: float) -> Image.Image:
        """Does what `image_ops.sharpness` does."""


class PillowBackend:
    """The reference's own library."""

    def open(self, file_bytes: bytes, name: str) -> Image.Image:
        """See `Backend`."""
        return decoding.decode(file_bytes, name)

    def resized_crop(self, picture, box, size, filter_) -> Image.Image:
        """See `Backend`."""
        return picture.crop(box).resize(size, filter_)

    def warp(self, image, coefficients, filter_) -> Image.Image:
        """See `Backend`."""
        return image_ops.warp(image, coefficients, filter_)

    def sharpness(self, image, factor) -> Image.Image:
        """See `Backend`."""
        return image_ops.sharpness(image, factor)


@dataclasses.dataclass
class _Undecoded:
    """A JPEG whose rows wait to be asked for."""

    file_bytes: bytes
    name: str
    size: tuple[int, int]


class FastBackend:
    """The same pixels by simplejpeg and Numba, and by Pillow where it is as fast.

    simplejpeg is libjpeg-turbo as Pillow is, with the accurate transform and smooth upsampling.
    """

    def open(self, file_bytes: bytes, name: str) -> Picture:
        """See `Backend`."""
        from mambaout_jax.data import fast_decode

        size = fast_decode.jpeg_size(file_bytes)
        if size is None:
            return decoding.decode(file_bytes, name)
        return _Undecoded(file_bytes, name, size)

    def resized_crop(self, picture, box, size, filter_) -> Image.Image:
        """See `Backend`."""
        from mambaout_jax.data import fast_decode, fast_resize

        left, top, right, bottom = box
        if isinstance(picture, _Undecoded):
            try:
                pixels = fast_decode.decode_rows(picture.file_bytes, picture.size[1], bottom)
            except ValueError:  # Pillow says what is wrong with it
                pixels = _pixels(decoding.decode(picture.file_bytes, picture.name))
        else:
            pixels = _pixels(picture)
        return _image(fast_resize.resize(pixels[top:bottom, left:right], size, filter_))

    def warp(self, image, coefficients, filter_) -> Image.Image:
        """See `Backend`."""
        from mambaout_jax.data import fast_ops

        return _image(fast_ops.affine(_pixels(image), coefficients, filter_, image_ops.FILL))

    def sharpness(self, image, factor) -> Image.Image:
        """See `Backend`."""
        from mambaout_jax.data import fast_ops

        return _image(fast_ops.sharpness(_pixels(image), factor))


def _pixels(image: Image.Image) -> np.ndarray:
    """Returns an RGB picture as uint32 [H, W]."""
    data = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32)
    return data.reshape(image.height, image.width)


def _image(pixels: np.ndarray) -> Image.Image:
    """Returns uint32 [H, W] as an RGB picture."""
    return Image.frombytes("RGB", pixels.shape[::-1], pixels, "raw", "RGBX")


def open_backend(name: str) -> Backend:
    """Returns the backend "pillow" or "fast"; "auto" is the fast one where its libraries are.

    Raises:
      UserError: there is none of that name, or its libraries are missing.
    """
    if name not in ("auto", "pillow", "fast"):
        raise UserError(f"data.backend is {name!r}; it is 'auto', 'pillow' or 'fast'.")
    missing = [library for library in _LIBRARIES if importlib.util.find_spec(library) is None]
    if name == "pillow" or (name == "auto" and missing):
        return PillowBackend()
    if missing:
        raise UserError(f"data.backend 'fast' needs {missing[0]}: pip install -e '.[fast]'.")
    return FastBackend()
