"""Training pictures on the host: random-resized crop, flip, policy, colour jitter.

Pictures stay uint8 from the file to the device. Every draw comes from the generator that is
passed in, so that a picture's augmentation is a function of that generator's state alone.
Mixing, normalisation and random erasing follow on the device, in `on_device`.
"""

import math

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from mambaout_jax.data import backends, image_ops, randaugment
from mambaout_jax.errors import UserError

_CROP_TRIES = 10
_FILTERS = {
    "bilinear": (Image.Resampling.BILINEAR,),
    "bicubic": (Image.Resampling.BICUBIC,),
    "random": (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC),
}


class TrainTransform:
    """Makes a training picture of an encoded file; cloudpickle takes it, and threads may share it.

    Attributes:
      backend_name: which backend it uses.
    """

    def __init__(self, config: ConfigDict):
        """Reads the options.

        Args:
          config: the whole configuration.

        Raises:
          UserError: an option has no meaning.
        """
        augment = config.augment
        if augment.interpolation not in _FILTERS:
            raise UserError(
                f"augment.interpolation is {augment.interpolation!r}; it is one of "
                f"{', '.join(_FILTERS)}."
            )
        self._backend = backends.open_backend(config.data.backend)
        self.backend_name = type(self._backend).__name__
        self._filters = _FILTERS[augment.interpolation]
        self._size = config.data.image_size
        self._scale = _interval("augment.crop_scale", augment.crop_scale)
        self._ratio = _interval("augment.crop_ratio", augment.crop_ratio)
        self._hflip = augment.hflip
        self._jitter = augment.color_jitter
        self._policy = randaugment.parse_policy(
            augment.policy,
            self._filters,
            image_ops.operations(self._backend),
        )

    def __call__(self, file_bytes: bytes, rng: np.random.Generator, name: str) -> np.ndarray:
        """Decodes and augments a picture.

        Args:
          file_bytes: the encoded file.
          rng: where every draw comes from.
          name: what a message calls the file.

        Returns:
          uint8 [image_size, image_size, 3].

        Raises:
          BadImageError: the file is no picture, or a damaged one.
        """
        picture = self._backend.open(file_bytes, name)
        box = draw_crop(picture.size, self._scale, self._ratio, rng)
        filter_ = self._filters[int(rng.integers(len(self._filters)))]
        mirrored = rng.random() < self._hflip
        size = (self._size, self._size)
        image = self._backend.resized_crop(picture, box, size, filter_, mirrored)
        image = self._policy(image, rng)
        if self._jitter:
            image = color_jitter(image, self._jitter, rng, self._backend)
        return np.asarray(image)


def draw_crop(
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Draws the box of a random-resized crop.

    The area is uniform in `scale`, the aspect log-uniform in `ratio`; after ten boxes that do not
    fit, the largest centred one of an allowed aspect is taken. Source: Szegedy et al., "Going
    Deeper with Convolutions", as timm draws it.

    Args:
      size: (width, height) of the picture.
      scale: bounds of the box's part of the picture's area.
      ratio: bounds of the box's width divided by its height.
      rng: where every draw comes from.

    Returns:
      (left, top, right, bottom) in pixels.
    """
    width, height = size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_CROP_TRIES):
        area = rng.uniform(*scale) * width * height
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def color_jitter(
    picture: image_ops.Picture,
    strength: float,
    rng: np.random.Generator,
    pixels: image_ops.Pixels,
) -> image_ops.Picture:
    """Changes brightness, contrast and saturation, in a drawn order.

    Args:
      picture: the library's own.
      strength: each factor is uniform in [max(0, 1 - strength), 1 + strength].
      rng: where every draw comes from.
      pixels: the library that does it.

    Returns:
      The changed picture.
    """
    for index in rng.permutation(3):
        factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
        if index == 0:
            picture = pixels.lookup(picture, image_ops.brightened(factor))
        elif index == 1:
            picture = pixels.contrast(picture, factor)
        else:
            picture = pixels.color(picture, factor)
    return picture


def _interval(key: str, bounds: tuple[float, float]) -> tuple[float, float]:
    if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
        raise UserError(f"{key} is {tuple(bounds)}; it is two rising positive numbers.")
    return float(bounds[0]), float(bounds[1])
