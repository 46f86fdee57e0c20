"""TFDS builder of the shapes."""

import io
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from mambaout_jax.data.shapes.images import CLASSES, SIZE, make_files, name_of

_DESCRIPTION = """
Discs, squares and triangles, striped or checked, in random colours over a noisy ground, with masks.
Made by mambaout_jax.data.shapes, from formulas alone.
"""


class Builder(tfds.core.GeneratorBasedBuilder):
    """Splits: `train` and `validation`."""

    name = "shapes"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012

    # No checksums: nothing is downloaded. TFDS needs importlib_resources to look for them.
    url_infos: ClassVar[dict] = {}

    def __init__(self, *, images: Mapping[str, int], **options: Any):
        """Takes the number of images by split, and the options of TFDS."""
        self._images = images
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        png = {"encoding_format": "png"}
        mask = tfds.features.LabeledImage(labels=list(CLASSES), shape=(SIZE, SIZE, 1), **png)
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIZE, SIZE, 3), **png),
                    "annotation": mask,
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "annotation"),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterable]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in self._images}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict]]:
        """Yields the images of a split."""
        for index in range(self._images[split]):
            image, mask = map(io.BytesIO, make_files(split, index))
            name = name_of(index)
            yield name, {"image": image, "annotation": mask, "file_name": f"{name}.png"}
