"""Two ways to the same pixels of a training picture: Pillow, and a faster one."""

import dataclasses
import importlib.util
from typing import Protocol

import numpy as np
from PIL import Image

from mambaout_jax.data import decoding, image_ops
from mambaout_jax.data.image_ops import Picture
from mambaout_jax.errors import UserError

_LIBRARIES = ("simplejpeg", "numba")  # of the fast backend


class Backend(Protocol):
    """Decodes, crops and moves pixels; picklable.

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

    def warp(
        self, picture: Picture, coefficients: tuple[float, ...], filter_: Image.Resampling
    ) -> Picture:
        """Does what `image_ops.warp` does."""

    def sharpness(self, picture: Picture, factor: float) -> Picture:
        """Does what `image_ops.sharpness` does."""


class PillowBackend:
    """The reference's own library."""

    def open(self, file_bytes: bytes, name: str) -> Image.Image:
        """See `Backend`."""
        return decoding.decode(file_bytes, name)

    def resized_crop(self, picture, box, size, filter_, mirrored=False) -> Image.Image:
        """See `Backend`."""
        image = picture.crop(box).resize(size, filter_)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image

    def warp(self, picture, coefficients, filter_) -> Image.Image:
        """See `Backend`."""
        return image_ops.warp(picture, coefficients, filter_)

    def sharpness(self, picture, factor) -> Image.Image:
        """See `Backend`."""
        return image_ops.sharpness(picture, factor)


@dataclasses.dataclass
class _Undecoded:
    """A JPEG whose rows wait to be asked for."""

    file_bytes: bytes
    name: str
    size: tuple[int, int]


class _Words:
    """A picture as the compiled functions take it: uint32 [H, W], which nobody writes to."""

    def __init__(self, pixels: np.ndarray):
        pixels.flags.writeable = False  # as those from Pillow, lest Numba compile for both
        self.pixels = pixels
        self.height, self.width = pixels.shape
        self.size = self.width, self.height

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        del dtype, copy
        from mambaout_jax.data import fast_resize

        return fast_resize.rgb(self.pixels)

    def pillow(self) -> Image.Image:
        """Returns the same picture for Pillow; `image_ops.pillow` calls it."""
        return Image.frombytes("RGB", self.size, self.pixels, "raw", "RGBX")


class FastBackend:
    """The same pixels by simplejpeg and Numba, and by Pillow where it is as fast.

    simplejpeg is libjpeg-turbo as Pillow is, with the accurate transform and smooth upsampling.
    A picture is converted to Pillow's form or back only where the next operation needs the other.
    """

    def open(self, file_bytes: bytes, name: str) -> Picture:
        """See `Backend`."""
        from mambaout_jax.data import fast_decode

        size = fast_decode.jpeg_size(file_bytes)
        if size is None:
            return decoding.decode(file_bytes, name)
        return _Undecoded(file_bytes, name, size)

    def resized_crop(self, picture, box, size, filter_, mirrored=False) -> Picture:
        """See `Backend`."""
        from mambaout_jax.data import fast_decode, fast_resize

        if isinstance(picture, _Undecoded):
            try:
                pixels = fast_decode.decode_rows(picture.file_bytes, picture.size[1], box[3])
            except ValueError:  # Pillow says what is wrong with it
                pixels = _pixels(decoding.decode(picture.file_bytes, picture.name))
        else:
            pixels = _pixels(picture)
        return _Words(fast_resize.resize(pixels, box, size, filter_, mirrored))

    def warp(self, picture, coefficients, filter_) -> Picture:
        """See `Backend`."""
        from mambaout_jax.data import fast_ops

        return _Words(fast_ops.affine(_pixels(picture), coefficients, filter_, image_ops.FILL))

    def sharpness(self, picture, factor) -> Picture:
        """See `Backend`."""
        from mambaout_jax.data import fast_ops

        return _Words(fast_ops.sharpness(_pixels(picture), factor))


def _pixels(picture: Image.Image | _Words) -> np.ndarray:
    """Returns a picture as uint32 [H, W]."""
    if isinstance(picture, _Words):
        return picture.pixels
    data = np.frombuffer(picture.tobytes("raw", "RGBX"), np.uint32)
    return data.reshape(picture.height, picture.width)


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
