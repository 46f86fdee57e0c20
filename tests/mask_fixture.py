"""Small datasets of images with masks: a folder as ADE20K's, and one that TFDS prepared."""

import io
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from imagenet_fixture import jpeg
from PIL import Image

from mambaout_jax.data.sources import Dataset

SIZES = [(96, 64), (64, 96), (100, 70), (64, 64), (150, 40)]  # (width, height)
CLASSES = 5


def values(number: int, size: tuple[int, int]) -> np.ndarray:
    """Returns the values of a mask's file, uint8 [height, width]: 0 to CLASSES, in patches."""
    rng = np.random.RandomState(number)
    patches = rng.randint(0, CLASSES + 1, (5, 5)).astype(np.uint8)
    return np.asarray(Image.fromarray(patches).resize(size, Image.Resampling.NEAREST))


def png(pixels: np.ndarray) -> bytes:
    """Returns a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def files(number: int) -> tuple[bytes, bytes]:
    """Returns the files of an image and of its mask."""
    size = SIZES[number % len(SIZES)]
    return jpeg(number, size), png(values(number, size))


def write_masks(root: Path, train: int = 12, validation: int = 10) -> Path:
    """Writes root/{images,annotations}/{training,validation}; returns root."""
    for split, count in (("training", train), ("validation", validation)):
        for part in ("images", "annotations"):
            (root / part / split).mkdir(parents=True)
        for number in range(count):
            image, mask = files(number)
            (root / "images" / split / f"{number:02d}.jpg").write_bytes(image)
            (root / "annotations" / split / f"{number:02d}.png").write_bytes(mask)
    return root


def folder_dataset(root: Path, num_classes: int | None = CLASSES) -> Dataset:
    """Returns the dataset of a folder, with labels as in ADE20K."""
    return Dataset(
        "folder", "", str(root), "training", "validation", num_classes, "segmentation", True
    )


with tfds.core.registered.skip_registration():

    class SceneMasks(tfds.core.GeneratorBasedBuilder):
        """Writes the same images and masks with TFDS, without TensorFlow."""

        VERSION = tfds.core.Version("1.0.0")

        def __init__(self, *, names: list[str] | None, **options):
            self.names = names
            super().__init__(**options)

        def _info(self):
            mask = tfds.features.Image(encoding_format="png")  # as in TFDS's scene_parse150
            if self.names:
                mask = tfds.features.LabeledImage(
                    labels=self.names, shape=(None, None, 1), encoding_format="png"
                )
            features = {"image": tfds.features.Image(encoding_format="jpeg"), "annotation": mask}
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "annotation"),
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(12), "test": self._generate_examples(10)}

        def _generate_examples(self, count):
            for number in range(count):
                image, mask = map(io.BytesIO, files(number))
                yield f"{number:02d}", {"image": image, "annotation": mask}


def write_tfds_masks(directory: Path, names: list[str] | None = None) -> Dataset:
    """Writes directory/scene_masks/1.0.0 in ArrayRecord form; returns the dataset."""
    builder = SceneMasks(names=names, data_dir=str(directory), file_format="array_record")
    builder.download_and_prepare()
    classes = len(names) - 1 if names else CLASSES
    return Dataset(
        "tfds", "scene_masks", str(directory), "train", "test", classes, "segmentation", True
    )
