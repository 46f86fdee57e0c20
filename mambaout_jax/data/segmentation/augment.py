"""Augmentation of images with masks: random resize, crop, flip and photometric distortion.

Source: the training pipeline of mmsegmentation's UperNet on Swin, with Pillow in place of OpenCV:
Pillow's bilinear filter is antialiased where it shrinks an image, and its nearest neighbour is that
of pixel centres. Every random number comes from the generator that is passed in.
"""

import dataclasses

import numpy as np
from PIL import Image

from mambaout_jax.data.buffers import Arrays, Batch
from mambaout_jax.data.records import Record, Source
from mambaout_jax.data.segmentation.masks import IGNORED, MaskLabels, MaskSource, decode
from mambaout_jax.data.segmentation.photometric import distort
from mambaout_jax.data.segmentation.resizing import IMAGE_FILL, resized_size, write_padded
from mambaout_jax.errors import UserError

_TRIES = 10

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


@dataclasses.dataclass(frozen=True)
class SegmentationAugmentation:
    """How images with masks are augmented on the host. The defaults are those of ADE20K.

    Attributes:
      crop_size: side of the square result in pixels.
      scale: pixels that the long and the short side may have at most after resizing, times the
        random ratio.
      ratio_range: bounds of the ratio.
      cat_max_ratio: fraction of a crop's labelled pixels that one class may cover, if one of ten
        crops allows it; 1: any.
      hflip: probability of a horizontal flip.
      photometric: whether brightness, contrast, saturation and hue are changed.
    """

    crop_size: int = 512
    scale: tuple[int, int] = (2048, 512)
    ratio_range: tuple[float, float] = (0.5, 2.0)
    cat_max_ratio: float = 0.75
    hflip: float = 0.5
    photometric: bool = True

    @property
    def arrays(self) -> Arrays:
        """The arrays of an example: an image, and labels of which IGNORED is not counted."""
        shape = (self.crop_size, self.crop_size)
        return (("image", (*shape, 3), "uint8"), ("label", shape, "uint8"))

    def examples(self, source: Source, backend: str) -> "AugmentedMasks":
        """Returns what makes the examples of a `MaskSource`.

        Raises:
          UserError: the backend is "fast".
        """
        assert isinstance(source, MaskSource)
        if backend == "fast":
            raise UserError(
                "data.backend is 'fast', which has no augmentation of masks: expected 'auto' or "
                "'pillow' for segmentation"
            )
        return AugmentedMasks(self, source.mask_labels)


class AugmentedMasks:
    """Augmented images with their labels. See `examples.TrainingExamples`.

    Where the resized image is smaller than the crop, the image is padded with the colour that is
    nearest to 0 after normalisation, and the labels with IGNORED, at the right and at the bottom.
    """

    made_by = "Pillow"

    def __init__(self, augmentation: SegmentationAugmentation, labels: MaskLabels):
        self.arrays = augmentation.arrays
        self._options = augmentation
        self._labels = labels

    def __call__(self, record: Record, rng: np.random.Generator, out: Batch) -> None:
        """See `examples.TrainingExamples`.

        Raises:
          BadImageError: a file is damaged.
          UserError: the mask does not fit its image or the classes.
        """
        options = self._options
        image, labels = decode(record, self._labels)
        ratio = rng.uniform(*options.ratio_range)
        long, short = (int(side * ratio) for side in options.scale)
        size = resized_size(image.size, (long, short))
        labels = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
        box = draw_crop(labels, options.crop_size, options.cat_max_ratio, rng)
        image, labels = image.resize(size, Image.Resampling.BILINEAR).crop(box), cut(labels, box)
        if rng.random() < options.hflip:
            image, labels = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), labels[:, ::-1]
        if options.photometric:
            image = distort(image, rng)
        write_padded(np.asarray(image), out["image"], IMAGE_FILL)
        write_padded(labels, out["label"], IGNORED)


def draw_crop(labels: np.ndarray, side: int, cat_max_ratio: float, rng: np.random.Generator) -> Box:
    """Draws the box of a random crop in which no class covers too much.

    Args:
      labels: uint8 [height, width].
      side: of the square box; it is cut where the image is smaller.
      cat_max_ratio: fraction of the labelled pixels below which the largest class must be, with
        another class beside it. The eleventh box is taken whatever its labels; 1: the first one is.
      rng: the source of every random number.

    Returns:
      The box.
    """
    height, width = labels.shape
    bottom, right = max(height - side, 0), max(width - side, 0)

    def draw() -> Box:
        top, left = int(rng.integers(bottom + 1)), int(rng.integers(right + 1))
        return left, top, min(left + side, width), min(top + side, height)

    box = draw()
    if cat_max_ratio >= 1 or bottom == right == 0:
        return box
    for _ in range(_TRIES):
        counts = np.bincount(cut(labels, box).ravel(), minlength=IGNORED + 1)[:IGNORED]
        if counts.max() < min(cat_max_ratio * counts.sum(), counts.sum()):
            return box
        box = draw()
    return box


def cut(labels: np.ndarray, box: Box) -> np.ndarray:
    """Returns the part of labels [height, width] in a box."""
    left, top, right, bottom = box
    return labels[top:bottom, left:right]
