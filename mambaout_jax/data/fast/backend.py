"""The fast backend: the same pixels as Pillow, by libjpeg-turbo and Numba."""

import numpy as np
from PIL import Image

from mambaout_jax.data import decoding, image_ops
from mambaout_jax.data.fast import colors, decode, resize, turbojpeg, warp
from mambaout_jax.data.image_ops import AnyImage


class _LazyJpeg:
    """A JPEG that is not decoded yet, and its name for messages."""

    def __init__(self, file_bytes: bytes, name: str):
        self.jpeg = decode.Jpeg(file_bytes)
        self.size = self.jpeg.size
        self.file_bytes = file_bytes
        self.name = name


class _Packed:
    """An image of packed pixels, as the compiled functions expect it: uint32 [H, W], read-only."""

    def __init__(self, pixels: np.ndarray):
        pixels.flags.writeable = False  # as decoded ones are: Numba compiles for each kind
        self.pixels = pixels
        self.height, self.width = pixels.shape
        self.size = self.width, self.height

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        del dtype, copy
        result = np.empty((self.height, self.width, 3), np.uint8)
        resize.write_rgb(self.pixels, result)
        return result


class FastBackend:
    """See `backends.Backend`. Every function returns an image of packed pixels.

    libjpeg-turbo 3 decodes crops; Pillow uses it too, with the same settings. Where it is not
    installed, and for all but flawless baseline JPEGs, Pillow decodes the whole image.
    """

    def __init__(self):
        """Looks for libjpeg-turbo."""
        decoder = " + libjpeg-turbo" if turbojpeg.library() else ""
        self.made_by = f"Pillow + Numba{decoder}"

    def open(self, file_bytes: bytes, name: str) -> AnyImage:
        """See `backends.Backend`."""
        try:
            return _LazyJpeg(file_bytes, name)
        except ValueError:  # Pillow decodes it, or reports what is wrong
            return decoding.decode(file_bytes, name)

    def resized_crop(self, image, box, size, filter_, mirrored=False) -> _Packed:
        """See `backends.Backend`."""
        if isinstance(image, _LazyJpeg):
            try:
                pixels, box = image.jpeg.decode_crop(box)
            except ValueError:
                pixels = _pixels(decoding.decode(image.file_bytes, image.name))
        else:
            pixels = _pixels(image)
        return _Packed(resize.resize(pixels, box, size, filter_, mirrored))

    def write(self, image, out) -> None:
        """See `backends.Backend`."""
        resize.write_rgb(image.pixels, out)

    def warp(self, image, coefficients, filter_) -> _Packed:
        """See `image_ops.Pixels`."""
        return _Packed(warp.affine(_pixels(image), coefficients, filter_, image_ops.FILL))

    def lookup(self, image, table) -> _Packed:
        """See `image_ops.Pixels`."""
        return _Packed(colors.lookup(_pixels(image), table))

    def color(self, image, factor) -> _Packed:
        """See `image_ops.Pixels`."""
        return _Packed(colors.color(_pixels(image), factor))

    def contrast(self, image, factor) -> _Packed:
        """See `image_ops.Pixels`."""
        pixels = _pixels(image)
        mean = Image.new("L", image_ops.RAMP.size, colors.mean_grey(pixels))
        return _Packed(colors.lookup(pixels, Image.blend(mean, image_ops.RAMP, factor).tobytes()))

    def sharpness(self, image, factor) -> _Packed:
        """See `image_ops.Pixels`."""
        return _Packed(colors.sharpness(_pixels(image), factor))

    def autocontrast(self, image) -> _Packed:
        """See `image_ops.Pixels`."""
        return _Packed(colors.autocontrast(_pixels(image)))

    def equalize(self, image) -> _Packed:
        """See `image_ops.Pixels`."""
        return _Packed(colors.equalize(_pixels(image)))

    def gaussian_blur(self, image, radius) -> _Packed:
        """See `image_ops.Pixels`; it is Pillow's own."""
        pixels = _pixels(image)
        size = pixels.shape[1], pixels.shape[0]
        image = Image.frombytes("RGB", size, pixels, "raw", "RGBX")
        return _Packed(_pixels(image_ops.PillowPixels().gaussian_blur(image, radius)))


def _pixels(image: Image.Image | _Packed) -> np.ndarray:
    """Returns an image as uint32 [H, W]."""
    if isinstance(image, _Packed):
        return image.pixels
    data = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32)
    return data.reshape(image.height, image.width)
