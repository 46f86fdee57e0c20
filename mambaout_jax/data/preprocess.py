"""Preprocessing for evaluation: decoding, resizing, cropping, and normalisation.

This file imports neither Pillow nor the data libraries before an image is decoded.
"""

import dataclasses
import math
import os
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from mambaout_jax.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from mambaout_jax.data.buffers import Arrays, Batch
    from mambaout_jax.data.examples import EvaluationGroup
    from mambaout_jax.data.records import Record, Source

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of R, G and B in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a network's input.

    Attributes:
      size: side of a square input in pixels, or (height, width).
      crop_pct: the crop's fraction of the resized image's side.
      crop_mode: "center" keeps the aspect ratio and crops; "squash" resizes both sides to fit.
      interpolation: name of a Pillow filter in lower case; antialiased.
      mean: of R, G and B in [0, 1], subtracted.
      std: of R, G and B in [0, 1], the divisor.
    """

    size: int | tuple[int, int] = 224
    crop_pct: float = 1.0
    crop_mode: str = "center"
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise UserError(f"size is {self.size}: expected one or two positive numbers of pixels")
        if not self.crop_pct > 0:
            raise UserError(
                f"crop_pct is {self.crop_pct}: expected a positive fraction, such as 0.95"
            )
        if self.crop_mode not in ("center", "squash"):
            raise UserError(f"crop_mode is {self.crop_mode!r}: expected 'center' or 'squash'")

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of the input in pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def groups(self, source: "Source") -> "list[EvaluationGroup]":
        """Returns one group of all images, which become inputs of the same shape."""
        from mambaout_jax.data.examples import EvaluationGroup

        return [EvaluationGroup(range(len(source)), PreprocessedImages(self, source.label_shape))]


class PreprocessedImages:
    """Images as a network expects them, with their classes. See `examples.EvaluationExamples`."""

    def __init__(self, preprocessing: Preprocessing, label_shape: tuple[int, ...]):
        self._preprocessing = preprocessing
        image = ("image", (*preprocessing.shape, 3), "uint8")
        self.arrays: Arrays = (image, ("label", label_shape, "int32"))

    def __call__(self, record: "Record", out: "Batch") -> None:
        """See `examples.EvaluationExamples`."""
        out["label"][...] = record["label"]
        if (out["label"] >= 0).any():
            out["image"][:] = preprocess_image(record["image"], self._preprocessing, record["name"])
        else:  # the image has no right class and is not counted
            out["image"][:] = 0


def preprocess_image(
    image: "bytes | str | os.PathLike[str] | Image.Image",
    preprocessing: Preprocessing,
    name: str | None = None,
) -> np.ndarray:
    """Decodes and crops an image exactly as timm's evaluation does.

    Source: timm's evaluation transform on Pillow: `convert("RGB")`, EXIF orientation not applied,
    resize with antialias, centre crop.

    Args:
      image: an encoded file of any format that Pillow reads, its path, or a PIL image.
      preprocessing: of the network.
      name: how messages name the image; a path's own by default.

    Returns:
      uint8 [H, W, 3].

    Raises:
      mambaout_jax.data.decoding.BadImageError: the file cannot be read, is not an image, or is
        damaged.
      UserError: the interpolation is unknown.
    """
    from PIL import Image

    from mambaout_jax.data import decoding

    if isinstance(image, str | os.PathLike):
        name = name or os.fspath(image)
        image = read_image_file(image)
    if isinstance(image, Image.Image):
        rgb = image.convert("RGB")
    elif isinstance(image, bytes | bytearray | memoryview):
        rgb = decoding.decode(image, name or "the image")
    else:
        raise UserError(
            f"an image is a {type(image).__name__}: expected a file's bytes, a path or a PIL image"
        )
    filter_ = decoding.resampling(preprocessing.interpolation)
    height, width = _resized_size(rgb.size, preprocessing)
    rgb = rgb.resize((width, height), filter_)
    return np.asarray(_center_crop(rgb, preprocessing.shape))


def read_image_file(path: str | os.PathLike[str]) -> bytes:
    """Returns a file's bytes. A pipe or a device is refused: reading it may never end.

    Raises:
      mambaout_jax.data.decoding.BadImageError: the file cannot be read, or is not a regular file.
    """
    from mambaout_jax.data.decoding import BadImageError

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadImageError(f"{os.fspath(path)} is not a regular file")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BadImageError(f"{os.fspath(path)} cannot be read: {error.strerror}") from error


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Turns pixels into the network's input.

    Args:
      images: uint8 [N, H, W, 3], or any dtype with values in [0, 255].
      mean: of R, G and B in [0, 1].
      std: of R, G and B in [0, 1].

    Returns:
      float32 [N, H, W, 3].
    """
    shift, scale = (255 * jnp.array(v, jnp.float32).reshape(1, 1, 1, -1) for v in (mean, std))
    return (images.astype(jnp.float32) - shift) / scale


def _resized_size(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    """Returns the (height, width) that an image of Pillow size (width, height) is resized to."""
    target_h, target_w = (math.floor(x / preprocessing.crop_pct) for x in preprocessing.shape)
    width, height = size
    if preprocessing.crop_mode == "squash":
        return target_h, target_w
    if target_h == target_w:  # the short side becomes the target; the long one is truncated
        if width <= height:
            return int(target_w * height / width), target_w
        return target_h, int(target_h * width / height)
    ratio = min(height / target_h, width / target_w)
    return round(height / ratio), round(width / ratio)


def _center_crop(image: "Image.Image", size: tuple[int, int]) -> "Image.Image":
    """Crops (height, width) at the centre; a side that is too short is padded with black."""
    height, width = size
    pad_w, pad_h = max(width - image.width, 0), max(height - image.height, 0)
    left = round((image.width + pad_w - width) / 2) - pad_w // 2
    top = round((image.height + pad_h - height) / 2) - pad_h // 2
    return image.crop((left, top, left + width, top + height))
