"""Masks: images whose pixels are labels of classes."""

import dataclasses
import io

import numpy as np
from PIL import Image

from mambaout_jax.data import decoding
from mambaout_jax.data.records import Record, Source
from mambaout_jax.errors import UserError

IGNORED = 255  # label of pixels that count neither in the loss nor in the evaluation
MAX_CLASSES = 255

_ONE_CHANNEL = ("L", "P", "1")  # a palette's indices are labels; its colours are not read


@dataclasses.dataclass(frozen=True)
class MaskLabels:
    """How a dataset's masks number its classes.

    Attributes:
      num_classes: the number of classes.
      reduce_zero_label: whether 0 is unlabelled and k + 1 is class k, as in ADE20K; else k is
        class k. 255 is unlabelled either way.
    """

    num_classes: int
    reduce_zero_label: bool

    def table(self) -> bytes:
        """Returns the label of each of the 256 values in a file."""
        first = [IGNORED, *range(254)] if self.reduce_zero_label else [*range(255)]
        return bytes([*first, IGNORED])

    def check(self, counts: np.ndarray, name: str) -> None:
        """Checks that a mask has only labels of classes.

        Args:
          counts: of each value in its file, [256].
          name: of the file in messages.

        Raises:
          UserError: it has another value.
        """
        first = int(self.reduce_zero_label)
        last = first + self.num_classes - 1
        beyond = np.flatnonzero(counts[last + 1 : IGNORED])
        if beyond.size:
            unlabelled = "0 and 255" if first else "255"
            raise UserError(
                f"the mask {name} has the label {last + 1 + beyond[-1]}, but the "
                f"{self.num_classes} classes are {first} to {last}, and {unlabelled} unlabelled: "
                f"repair it, or set the number of classes and reduce_zero_label"
            )


class MaskSource(Source):
    """A split of images with masks: each record's label is the mask's encoded file.

    Attributes:
      reduce_zero_label: see `MaskLabels`.
    """

    reduce_zero_label: bool

    @property
    def mask_labels(self) -> MaskLabels:
        """How its masks number the classes."""
        return MaskLabels(self.num_classes, self.reduce_zero_label)


def decode(record: Record, labels: MaskLabels) -> tuple[Image.Image, np.ndarray]:
    """Decodes an image and its mask.

    Args:
      record: of a `MaskSource`.
      labels: of the source.

    Returns:
      The image, mode RGB, and its labels, uint8 [height, width]: the classes from 0 on, or IGNORED.

    Raises:
      BadImageError: one of the files is damaged.
      UserError: the mask is not of one channel of 8 bits, is not as large as the image, or has
        labels that are no classes.
    """
    image = decoding.decode(record["image"], record["name"])
    name, file_bytes = record["label_name"], record["label"]
    assert isinstance(file_bytes, bytes)
    with decoding.errors(name), Image.open(io.BytesIO(file_bytes)) as mask:
        mask.load()
    if mask.mode not in _ONE_CHANNEL:
        found = "16 bits or more" if mask.mode[0] in "IF" else f"mode {mask.mode}"
        raise UserError(
            f"the mask {name} has {found}: expected one channel of 8 bits, the labels of classes "
            f"(masks of instances, as in TFDS's scene_parse150, have none)"
        )
    if mask.size != image.size:
        raise UserError(
            f"the mask {name} has {mask.width} x {mask.height} pixels, and its image "
            f"{record['name']} {image.width} x {image.height}: expected the same size"
        )
    values = Image.fromarray(np.asarray(mask, np.uint8))  # mode "L", also of a palette's indices
    labels.check(np.array(values.histogram()), name)
    return image, np.asarray(values.point(labels.table()))
