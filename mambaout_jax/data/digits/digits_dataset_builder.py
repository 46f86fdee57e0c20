"""TFDS builder of the dataset in this package: 1,797 scans of handwritten digits, 8x8 pixels."""

import io
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

_DESCRIPTION = """
Handwritten digits scanned from forms and counted down to 8x8 pixels of 17 grey levels, from the
UCI Machine Learning Repository ("Optical Recognition of Handwritten Digits", the part that
scikit-learn ships). The grey levels 0..16 are stored as round(level * 255 / 16), ink white.
"""
_CITATION = """
@misc{alpaydin1998digits,
  author = {Alpaydin, E. and Kaynak, C.},
  title = {Optical Recognition of Handwritten Digits},
  howpublished = {UCI Machine Learning Repository},
  year = {1998},
  doi = {10.24432/C50P49},
  note = {CC BY 4.0}
}
"""
_HELD_OUT_PER_CLASS = 36


class Builder(tfds.core.GeneratorBasedBuilder):
    """Splits: `train` (1,437 images) and `validation` (360: the last 36 of each class)."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
            citation=_CITATION,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        del dl_manager  # the scans are in scikit-learn
        return {
            "train": self._generate_examples(held_out=False),
            "validation": self._generate_examples(held_out=True),
        }

    def _generate_examples(self, held_out: bool) -> Iterator[tuple[str, dict]]:
        """Yields the images of one split; the held-out ones are the last 36 of each class."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        later_of_class = {
            int(index)
            for digit in range(10)
            for index in np.flatnonzero(digits.target == digit)[-_HELD_OUT_PER_CLASS:]
        }
        for index, (scan, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            if (index in later_of_class) == held_out:
                name = f"digits-{index:04d}.png"
                png = io.BytesIO()
                pixels = np.round(scan * (255 / 16)).astype(np.uint8)
                Image.fromarray(pixels).save(png, format="png")
                png.seek(0)  # TFDS copies an encoded file without TensorFlow
                yield name, {"image": png, "label": int(label), "file_name": name}
