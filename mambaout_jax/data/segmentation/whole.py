"""Whole images for evaluation, padded to a few shapes so that few programs are compiled."""

import collections
import concurrent.futures
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mambaout_jax.data import decoding
from mambaout_jax.data.buffers import Arrays, Batch
from mambaout_jax.data.examples import EvaluationGroup
from mambaout_jax.data.preprocess import IMAGENET_MEAN, IMAGENET_STD
from mambaout_jax.data.records import Record, Source
from mambaout_jax.data.segmentation.masks import IGNORED, MaskLabels, MaskSource, decode
from mambaout_jax.data.segmentation.resizing import IMAGE_FILL, resized_size, write_padded
from mambaout_jax.data.synthetic import SyntheticSource

_MULTIPLE = 32  # of which padded sides are: the stride of the last stage
_READERS = 16  # threads that read the sizes of images

Shape = tuple[int, int]  # height, width


@dataclasses.dataclass(frozen=True)
class WholeImages:
    """How evaluation prepares images and their labels. The defaults are those of ADE20K.

    An image is resized to `short_side` with its aspect ratio, its long side at most `long_side`,
    and padded at the right and at the bottom. The labels keep the original size: predictions are
    resized to it. Padding and IGNORED labels are not counted.

    With several scales there is an image for each; their predictions are to be averaged.

    Attributes:
      short_side: pixels of the resized short side.
      long_side: pixels that the resized long side may have at most.
      scales: factors of both sides; the first one chooses the shapes.
      max_shapes: padded shapes at most, chosen so that little is padded.
      mean: of R, G and B in [0, 1], subtracted on the device.
      std: of R, G and B in [0, 1], the divisor.
    """

    short_side: int = 512
    long_side: int = 2048
    scales: tuple[float, ...] = (1.0,)
    max_shapes: int = 8
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def resized(self, size: tuple[int, int], scale: float) -> tuple[int, int]:
        """Returns the (width, height) that an image of a (width, height) is resized to."""
        return resized_size(size, (int(self.long_side * scale), int(self.short_side * scale)))

    def groups(self, source: Source) -> list[EvaluationGroup]:
        """Returns the groups of images of one padded shape, a function of the dataset alone.

        Reads the size of each image, on each process: the groups must be the same on all.

        Raises:
          BadImageError: a file is not an image.
        """
        assert isinstance(source, MaskSource)
        if isinstance(source, SyntheticSource):
            square = (self.short_side, self.short_side)
            squares = [_padded_shape(self.resized(square, scale)) for scale in self.scales]
            whole = PaddedImages(self, source.mask_labels, squares, squares[0])
            return [EvaluationGroup(range(len(source)), whole)]
        sizes = image_sizes(source)
        shapes = [_padded_shape(self.resized(size, self.scales[0])) for size in sizes]
        shape_of = merge_shapes(shapes, self.max_shapes)
        members: dict[Shape, list[int]] = {shape: [] for shape in sorted(set(shape_of.values()))}
        for index, shape in enumerate(shapes):
            members[shape_of[shape]].append(index)
        groups = []
        for shape, indices in members.items():
            originals = {sizes[index] for index in indices}
            others = [
                _larger(*(_padded_shape(self.resized(size, scale)) for size in originals))
                for scale in self.scales[1:]
            ]
            label_shape = _larger(*map(_padded_shape, originals))
            whole = PaddedImages(self, source.mask_labels, [shape, *others], label_shape)
            groups.append(EvaluationGroup(indices, whole))
        return groups


class PaddedImages:
    """Resized and padded images with labels of the original size.

    See `examples.EvaluationExamples`. The arrays of an example are:
      "image": uint8 [H, W, 3], padded with the colour nearest to 0 after normalisation.
      "label": uint8 [OH, OW], the original size, padded with IGNORED.
      "input_size": int32 [2], the (height, width) of the image in [H, W].
      "label_size": int32 [2], the (height, width) of the labels in [OH, OW].
    The image at scale number k, from 1 on, is in "image_k" and "input_size_k".
    """

    def __init__(
        self,
        options: WholeImages,
        labels: MaskLabels,
        shapes: Sequence[Shape],
        label_shape: Shape,
    ):
        self._options = options
        self._labels = labels
        images: Arrays = tuple(
            ("image" + _suffix(number), (*shape, 3), "uint8") for number, shape in enumerate(shapes)
        )
        names = ["label_size", *("input_size" + _suffix(number) for number in range(len(shapes)))]
        label = ("label", label_shape, "uint8")
        self.arrays: Arrays = (
            images[0],
            label,
            *images[1:],
            *((name, (2,), "int32") for name in names),
        )

    def __call__(self, record: Record, out: Batch) -> None:
        """See `examples.EvaluationExamples`.

        Raises:
          BadImageError: a file is damaged.
          UserError: the mask does not fit its image or the classes.
        """
        image, labels = decode(record, self._labels)
        for number, scale in enumerate(self._options.scales):
            size = self._options.resized(image.size, scale)
            resized = image.resize(size, Image.Resampling.BILINEAR)
            write_padded(np.asarray(resized), out["image" + _suffix(number)], IMAGE_FILL)
            out["input_size" + _suffix(number)][:] = resized.height, resized.width
        write_padded(labels, out["label"], IGNORED)
        out["label_size"][:] = labels.shape


def image_sizes(source: Source) -> list[tuple[int, int]]:
    """Returns the (width, height) of each image, from the beginning of its file."""

    def size(index: int) -> tuple[int, int]:
        record = source[index]
        return decoding.size(record["image"], record["name"])

    with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
        return list(readers.map(size, range(len(source))))


def merge_shapes(shapes: list[Shape], most: int) -> dict[Shape, Shape]:
    """Chooses a few shapes into which all shapes fit, and where each is put.

    Of all pairs of shapes, the two that add the fewest padded pixels become one, until few are
    left.

    Args:
      shapes: of all images.
      most: shapes that may be left.

    Returns:
      The chosen shape of each shape.
    """
    merged = {shape: [shape] for shape in sorted(set(shapes))}
    counts = collections.Counter(shapes)

    def added(pair: tuple[Shape, Shape]) -> int:
        area = _area(_larger(*pair))
        return sum(counts[shape] * (area - _area(shape)) for shape in pair)

    while len(merged) > most:
        pair = min(itertools.combinations(merged, 2), key=added)
        count = sum(counts.pop(shape) for shape in pair)
        members = [member for shape in pair for member in merged.pop(shape)]
        larger = _larger(*pair)
        merged[larger] = merged.get(larger, []) + members
        counts[larger] += count
    return {member: shape for shape, members in merged.items() for member in members}


def _larger(*shapes: Shape) -> Shape:
    heights, widths = zip(*shapes, strict=True)
    return max(heights), max(widths)


def _area(shape: Shape) -> int:
    return shape[0] * shape[1]


def _padded(side: int) -> int:
    return -(-side // _MULTIPLE) * _MULTIPLE


def _padded_shape(size: tuple[int, int]) -> Shape:
    width, height = size
    return _padded(height), _padded(width)


def _suffix(number: int) -> str:
    """Returns the end of the names of the arrays of a scale."""
    return f"_{number}" if number else ""
