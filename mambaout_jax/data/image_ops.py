"""The operations of RandAugment and 3-Augment on RGB images, with the same pixels as timm.

An operation is called as operation(image, level, sign, filter). The level in [0, 10] sets the
strength. The sign (1 or -1) sets the direction of operations that have one.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

from PIL import Image, ImageEnhance, ImageFilter, ImageOps

FILL = (124, 116, 104)  # the ImageNet mean, for pixels from outside the image
RAMP = Image.frombytes("L", (256, 1), bytes(range(256)))  # each value once

AnyImage = Any  # of Pillow, or of another library with the same size, width and height
Operation = Callable[[AnyImage, float, int, Image.Resampling], AnyImage]


class Pixels(Protocol):
    """The pixel functions of a library, of which the operations below are made."""

    def warp(
        self, image: AnyImage, coefficients: tuple[float, ...], filter_: Image.Resampling
    ) -> AnyImage:
        """Takes pixel (x, y) from (ax + by + c, dx + ey + f); pixels from outside get FILL."""

    def lookup(self, image: AnyImage, table: bytes) -> AnyImage:
        """Replaces each value v by table[v]."""

    def color(self, image: AnyImage, factor: float) -> AnyImage:
        """Blends with the greyscale image; 0 is grey, 1 no change."""

    def contrast(self, image: AnyImage, factor: float) -> AnyImage:
        """Blends with the mean grey; 0 is the mean, 1 no change."""

    def sharpness(self, image: AnyImage, factor: float) -> AnyImage:
        """Blends with a smoothed image; 0 is smooth, 1 no change."""

    def autocontrast(self, image: AnyImage) -> AnyImage:
        """Stretches each colour to the whole range."""

    def equalize(self, image: AnyImage) -> AnyImage:
        """Spreads each colour evenly over the range."""

    def gaussian_blur(self, image: AnyImage, radius: float) -> AnyImage:
        """Blurs with Pillow's approximation of a Gaussian of that standard deviation, in pixels."""


class PillowPixels:
    """Pillow, the library that timm uses; see `Pixels`."""

    def warp(
        self, image: Image.Image, coefficients: tuple[float, ...], filter_: Image.Resampling
    ) -> Image.Image:
        """See `Pixels`."""
        return image.transform(
            image.size, Image.Transform.AFFINE, coefficients, resample=filter_, fillcolor=FILL
        )

    def lookup(self, image: Image.Image, table: bytes) -> Image.Image:
        """See `Pixels`."""
        return image.point(table * 3)

    def color(self, image: Image.Image, factor: float) -> Image.Image:
        """See `Pixels`."""
        return ImageEnhance.Color(image).enhance(factor)

    def contrast(self, image: Image.Image, factor: float) -> Image.Image:
        """See `Pixels`."""
        return ImageEnhance.Contrast(image).enhance(factor)

    def sharpness(self, image: Image.Image, factor: float) -> Image.Image:
        """See `Pixels`."""
        return ImageEnhance.Sharpness(image).enhance(factor)

    def autocontrast(self, image: Image.Image) -> Image.Image:
        """See `Pixels`."""
        return ImageOps.autocontrast(image)

    def equalize(self, image: Image.Image) -> Image.Image:
        """See `Pixels`."""
        return ImageOps.equalize(image)

    def gaussian_blur(self, image: Image.Image, radius: float) -> Image.Image:
        """See `Pixels`."""
        return image.filter(ImageFilter.GaussianBlur(radius))


def rotation(size: tuple[int, int], degrees: float) -> tuple[float, ...]:
    """Returns the coefficients of a counter-clockwise rotation about the centre, as in Pillow."""
    angle = -math.radians(degrees % 360)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = size[0] / 2, size[1] / 2
    return cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y


def posterized(bits: int) -> bytes:
    """Returns the table that keeps the highest bits of each value; 0 bits give black."""
    mask = 256 - (1 << max(8 - bits, 0))
    return bytes(value & mask for value in range(256))


def solarized(threshold: int) -> bytes:
    """Returns the table that inverts values of at least a threshold."""
    return bytes(v if v < threshold else 255 - v for v in range(256))


def brightened_below_half(added: int) -> bytes:
    """Returns the table that adds to the values below 128."""
    return bytes(min(255, v + added) if v < 128 else v for v in range(256))


def brightened(factor: float) -> bytes:
    """Returns the table that blends with black; 0 is black, 1 no change."""
    return ImageEnhance.Brightness(RAMP).enhance(factor).tobytes()


def _plain_factor(level: float) -> float:
    return level / 10 * 1.8 + 0.1


def _increasing_factor(level: float, sign: int) -> float:
    return max(0.1, 1.0 + sign * (level / 10 * 0.9))


def _bits(level: float) -> int:
    return int(level / 10 * 4)


def _threshold(level: float) -> int:
    return min(256, int(level / 10 * 256))


def _unit(level: float) -> float:
    return min(level / 10, 1.0)


def operations(p: Pixels) -> dict[str, Operation]:
    """Returns all operations by their names in timm, computed by the given library."""
    return {
        "AutoContrast": lambda image, level, sign, filter_: p.autocontrast(image),
        "Equalize": lambda image, level, sign, filter_: p.equalize(image),
        "Invert": lambda image, level, sign, filter_: p.lookup(image, solarized(0)),
        "Posterize": lambda i, level, s, f: p.lookup(i, posterized(_bits(level))),
        "PosterizeIncreasing": lambda i, level, s, f: p.lookup(
            i, posterized(max(4 - _bits(level), 0))
        ),
        "Solarize": lambda i, level, s, f: p.lookup(i, solarized(_threshold(level))),
        "SolarizeIncreasing": lambda i, level, s, f: p.lookup(
            i, solarized(256 - _threshold(level))
        ),
        "SolarizeAdd": lambda i, level, s, f: p.lookup(
            i, brightened_below_half(min(128, int(level / 10 * 110)))
        ),
        "Color": lambda i, level, s, f: p.color(i, _plain_factor(level)),
        "ColorIncreasing": lambda i, level, s, f: p.color(i, _increasing_factor(level, s)),
        "Contrast": lambda i, level, s, f: p.contrast(i, _plain_factor(level)),
        "ContrastIncreasing": lambda i, level, s, f: p.contrast(i, _increasing_factor(level, s)),
        "Brightness": lambda i, level, s, f: p.lookup(i, brightened(_plain_factor(level))),
        "BrightnessIncreasing": lambda i, level, s, f: p.lookup(
            i, brightened(_increasing_factor(level, s))
        ),
        "Sharpness": lambda i, level, s, f: p.sharpness(i, _plain_factor(level)),
        "SharpnessIncreasing": lambda i, level, s, f: p.sharpness(i, _increasing_factor(level, s)),
        "Desaturate": lambda i, level, s, f: p.color(i, 1 - (0.5 + 0.5 * _unit(level))),
        "GaussianBlur": lambda i, level, s, f: p.gaussian_blur(i, 0.1 + 1.9 * _unit(level)),
        "Rotate": lambda i, level, s, f: p.warp(i, rotation(i.size, s * level / 10 * 30), f),
        # each row moves left by the factor times its number, each column up
        "ShearX": lambda i, level, s, f: p.warp(i, (1, s * (level / 10 * 0.3), 0, 0, 1, 0), f),
        "ShearY": lambda i, level, s, f: p.warp(i, (1, 0, 0, s * (level / 10 * 0.3), 1, 0), f),
        # by a fraction of the side
        "TranslateXRel": lambda i, level, s, f: p.warp(
            i, (1, 0, s * (level / 10 * 0.45) * i.width, 0, 1, 0), f
        ),
        "TranslateYRel": lambda i, level, s, f: p.warp(
            i, (1, 0, 0, 0, 1, s * (level / 10 * 0.45) * i.height), f
        ),
    }


OPERATIONS = operations(PillowPixels())
