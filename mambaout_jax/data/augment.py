"""Augmentation of training images on the host: random-resized crop, flip, policy, colour jitter.

Images stay uint8 from the file to the device. Every random number comes from the generator that
is passed in, so an image's augmentation depends on that generator's state alone. Mixing,
normalisation and random erasing follow on the device, in the training step.
"""

import dataclasses
import math

import numpy as np
from PIL import Image

from mambaout_jax.data import backends, image_ops, randaugment
from mambaout_jax.data.buffers import Arrays, Batch
from mambaout_jax.data.records import Record, Source

_CROP_TRIES = 10
_FILTERS = {
    "bilinear": (Image.Resampling.BILINEAR,),
    "bicubic": (Image.Resampling.BICUBIC,),
    "random": (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC),
}


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How training images are augmented on the host.

    Attributes:
      image_size: side of the square result in pixels.
      crop_scale: bounds of the random crop's fraction of the image's area.
      crop_ratio: bounds of the random crop's width divided by its height.
      interpolation: "bilinear", "bicubic", or "random" (either, with equal probability).
      hflip: probability of a horizontal flip.
      policy: timm's RandAugment string, "3a" (3-Augment), or "" (none).
      color_jitter: strength of the jitter of brightness, contrast and saturation; 0: none.
    """

    image_size: int
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    interpolation: str
    hflip: float
    policy: str
    color_jitter: float

    @property
    def arrays(self) -> Arrays:
        """The arrays of an example."""
        return (("image", (self.image_size, self.image_size, 3), "uint8"), ("label", (), "int32"))

    def examples(self, source: Source, backend: str) -> "LabelledImages":
        """Returns what makes the examples of any source with this backend."""
        del source
        return LabelledImages(self, backend)


class LabelledImages:
    """Augmented images with their classes. See `examples.TrainingExamples`."""

    def __init__(self, augmentation: Augmentation, backend: str):
        self.arrays = augmentation.arrays
        self._transform = TrainTransform(augmentation, backend)
        self.made_by = self._transform.made_by

    def __call__(self, record: Record, rng: np.random.Generator, out: Batch) -> None:
        """See `examples.TrainingExamples`."""
        self._transform(record["image"], rng, record["name"], out["image"])
        out["label"][...] = record["label"]


class TrainTransform:
    """Makes a training image of an encoded file. It can be pickled, and threads may share it.

    Attributes:
      made_by: the libraries that it uses, in words.
      shape: of its images, [image_size, image_size, 3].
    """

    def __init__(self, augmentation: Augmentation, backend: str):
        """Prepares the transform.

        Args:
          augmentation: the options.
          backend: see `backends.open_backend`.

        Raises:
          UserError: the policy has an unknown part, or a library is missing.
        """
        self._backend = backends.open_backend(backend)
        self.made_by = self._backend.made_by
        self.shape = (augmentation.image_size, augmentation.image_size, 3)
        self._options = augmentation
        self._backend_name = backend
        self._filters = _FILTERS[augmentation.interpolation]
        self._policy = randaugment.parse_policy(
            augmentation.policy,
            self._filters,
            image_ops.operations(self._backend),
        )

    def __reduce__(self) -> tuple:
        return type(self), (self._options, self._backend_name)

    def __call__(
        self, file_bytes: bytes, rng: np.random.Generator, name: str, out: np.ndarray
    ) -> None:
        """Decodes and augments an image.

        Args:
          file_bytes: the encoded file.
          rng: the source of every random number.
          name: the name of the file in messages.
          out: where the image is written, uint8 [image_size, image_size, 3].

        Raises:
          BadImageError: the file is not an image, or a damaged one.
        """
        options = self._options
        opened = self._backend.open(file_bytes, name)
        box = draw_crop(opened.size, options.crop_scale, options.crop_ratio, rng)
        filter_ = self._filters[int(rng.integers(len(self._filters)))]
        mirrored = rng.random() < options.hflip
        size = (options.image_size, options.image_size)
        image = self._backend.resized_crop(opened, box, size, filter_, mirrored)
        image = self._policy(image, rng)
        if options.color_jitter:
            image = color_jitter(image, options.color_jitter, rng, self._backend)
        self._backend.write(image, out)


def draw_crop(
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Draws the box of a random-resized crop.

    The area is uniform in `scale`, the aspect ratio log-uniform in `ratio`. After ten boxes that do
    not fit, the result is the largest centred box of an allowed aspect ratio. Source: Szegedy et
    al., "Going Deeper with Convolutions", as timm implements it.

    Args:
      size: (width, height) of the image.
      scale: bounds of the box's fraction of the image's area.
      ratio: bounds of the box's width divided by its height.
      rng: the source of every random number.

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
    image: image_ops.AnyImage,
    strength: float,
    rng: np.random.Generator,
    pixels: image_ops.Pixels,
) -> image_ops.AnyImage:
    """Changes brightness, contrast and saturation, in random order.

    Args:
      image: an image of the library `pixels`.
      strength: each factor is uniform in [max(0, 1 - strength), 1 + strength].
      rng: the source of every random number.
      pixels: the library that changes the pixels.

    Returns:
      The changed image.
    """
    for index in rng.permutation(3):
        factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
        if index == 0:
            image = pixels.lookup(image, image_ops.brightened(factor))
        elif index == 1:
            image = pixels.contrast(image, factor)
        else:
            image = pixels.color(image, factor)
    return image
