"""The operations of RandAugment and 3-Augment on RGB pictures, equal to timm's pixels.

An operation is called as operation(image, level, sign, filter): the level in
[0, 10] sets the strength, the sign (1 or -1) the direction, where it has one.
"""

import math
from collections.abc import Callable
from typing import Any

from PIL import Image, ImageEnhance, ImageFilter, ImageOps

FILL = (124, 116, 104)  # the ImageNet mean, where a moved picture leaves nothing

Picture = Any  # Pillow's, or a backend's own with its size, width, height and pillow()
Operation = Callable[[Picture, float, int, Image.Resampling], Picture]
Warp = Callable[[Picture, tuple[float, ...], Image.Resampling], Picture]
Sharpness = Callable[[Picture, float], Picture]


def pillow(picture: Picture) -> Image.Image:
    """Returns a picture of either backend as Pillow's."""
    return picture if isinstance(picture, Image.Image) else picture.pillow()


def warp(
    image: Image.Image, coefficients: tuple[float, ...], filter_: Image.Resampling
) -> Image.Image:
    """Takes pixel (x, y) from (ax + by + c, dx + ey + f); outside lies the fill colour."""
    return image.transform(
        image.size, Image.Transform.AFFINE, coefficients, resample=filter_, fillcolor=FILL
    )


def rotation(size: tuple[int, int], degrees: float) -> tuple[float, ...]:
    """Returns the coefficients of a counter-clockwise turn about the middle, as Pillow's are."""
    angle = -math.radians(degrees % 360)
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = size[0] / 2, size[1] / 2
    return cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y


def _lookup(image: Picture, table: list[int]) -> Image.Image:
    return pillow(image).point(table * 3)


def posterize(image: Picture, bits: int) -> Image.Image:
    """Keeps the highest bits of each value; zero bits leave black."""
    mask = 256 - (1 << (8 - bits))
    return _lookup(image, [value & mask for value in range(256)])


def solarize(image: Picture, threshold: int) -> Image.Image:
    """Inverts the values from a threshold on."""
    return _lookup(image, [v if v < threshold else 255 - v for v in range(256)])


def solarize_add(image: Picture, added: int) -> Image.Image:
    """Adds to the values below 128."""
    return _lookup(image, [min(255, v + added) if v < 128 else v for v in range(256)])


def invert(image: Picture) -> Image.Image:
    """Inverts each value."""
    return _lookup(image, [255 - value for value in range(256)])


def color(image: Picture, factor: float) -> Image.Image:
    """Blends with the greyscale picture; 0 is grey, 1 no change."""
    return ImageEnhance.Color(pillow(image)).enhance(factor)


def contrast(image: Picture, factor: float) -> Image.Image:
    """Blends with the mean grey; 0 is the mean, 1 no change."""
    return ImageEnhance.Contrast(pillow(image)).enhance(factor)


def brightness(image: Picture, factor: float) -> Image.Image:
    """Blends with black; 0 is black, 1 no change."""
    return ImageEnhance.Brightness(pillow(image)).enhance(factor)


def sharpness(image: Image.Image, factor: float) -> Image.Image:
    """Blends with a smoothed picture; 0 is smooth, 1 no change."""
    return ImageEnhance.Sharpness(image).enhance(factor)


def gaussian_blur(image: Picture, radius: float) -> Image.Image:
    """Blurs with Pillow's approximation of a Gaussian of that standard deviation, in pixels."""
    return pillow(image).filter(ImageFilter.GaussianBlur(radius))


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


def operations(warp: Warp, sharpness: Sharpness) -> dict[str, Operation]:
    """Returns every operation by timm's name, by way of the two that backends differ in."""
    return _IN_PLACE | {
        "Rotate": lambda i, level, s, f: warp(i, rotation(i.size, s * level / 10 * 30), f),
        # a row moves left by the factor for each row down, a column up for each column right
        "ShearX": lambda i, level, s, f: warp(i, (1, s * (level / 10 * 0.3), 0, 0, 1, 0), f),
        "ShearY": lambda i, level, s, f: warp(i, (1, 0, 0, s * (level / 10 * 0.3), 1, 0), f),
        # by a part of the side
        "TranslateXRel": lambda i, level, s, f: warp(
            i, (1, 0, s * (level / 10 * 0.45) * i.width, 0, 1, 0), f
        ),
        "TranslateYRel": lambda i, level, s, f: warp(
            i, (1, 0, 0, 0, 1, s * (level / 10 * 0.45) * i.height), f
        ),
        "Sharpness": lambda i, level, s, f: sharpness(i, _plain_factor(level)),
        "SharpnessIncreasing": lambda i, level, s, f: sharpness(i, _increasing_factor(level, s)),
    }


_IN_PLACE: dict[str, Operation] = {
    "AutoContrast": lambda image, level, sign, filter_: ImageOps.autocontrast(pillow(image)),
    "Equalize": lambda image, level, sign, filter_: ImageOps.equalize(pillow(image)),
    "Invert": lambda image, level, sign, filter_: invert(image),
    "Posterize": lambda image, level, sign, filter_: posterize(image, _bits(level)),
    "PosterizeIncreasing": lambda i, level, s, f: posterize(i, max(4 - _bits(level), 0)),
    "Solarize": lambda i, level, s, f: solarize(i, _threshold(level)),
    "SolarizeIncreasing": lambda i, level, s, f: solarize(i, 256 - _threshold(level)),
    "SolarizeAdd": lambda i, level, s, f: solarize_add(i, min(128, int(level / 10 * 110))),
    "Color": lambda i, level, s, f: color(i, _plain_factor(level)),
    "ColorIncreasing": lambda i, level, s, f: color(i, _increasing_factor(level, s)),
    "Contrast": lambda i, level, s, f: contrast(i, _plain_factor(level)),
    "ContrastIncreasing": lambda i, level, s, f: contrast(i, _increasing_factor(level, s)),
    "Brightness": lambda i, level, s, f: brightness(i, _plain_factor(level)),
    "BrightnessIncreasing": lambda i, level, s, f: brightness(i, _increasing_factor(level, s)),
    "Desaturate": lambda i, level, s, f: color(i, 1 - (0.5 + 0.5 * _unit(level))),
    "GaussianBlur": lambda i, level, s, f: gaussian_blur(i, 0.1 + 1.9 * _unit(level)),
}

OPERATIONS = operations(warp, sharpness)
