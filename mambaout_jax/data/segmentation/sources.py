"""Where images with masks are read from: a folder, or a dataset that TFDS prepared."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from mambaout_jax.data.folder import image_files, local_folder, read_encoded
from mambaout_jax.data.prepared import TfdsSource
from mambaout_jax.data.records import Record
from mambaout_jax.data.segmentation.masks import MaskSource
from mambaout_jax.data.synthetic import SyntheticSource
from mambaout_jax.errors import UserError, did_you_mean
from mambaout_jax.files import read_text

_CLASSES = "classes.txt"  # a name a line
_ADE_CLASSES = "objectInfo150.txt"  # the table in ADE20K's archive; names are in the last column


class FolderMaskSource(MaskSource):
    """Reads `directory/images/split/NAME.jpg` and `directory/annotations/split/NAME.png`.

    That is the layout of ADE20K's archive (ADEChallengeData2016). The names of the classes are the
    lines of `directory/classes.txt`, or the last column of ADE20K's `objectInfo150.txt`. Without
    these files they are numbers.
    """

    def __init__(
        self, directory: str, split: str, num_classes: int | None, reduce_zero_label: bool
    ):
        expected = f"images/{split}/NAME.jpg and annotations/{split}/NAME.png"
        root = local_folder(directory, expected, "folders of images and masks")
        for part in ("images", "annotations"):
            if not (root / part / split).is_dir():
                known = [p.name for p in sorted((root / part).glob("*")) if p.is_dir()]
                raise UserError(
                    f"{root} has no folder {part}/{split}{did_you_mean(split, known)} (the splits "
                    f"in {part} are {', '.join(known) or 'none'})"
                )
        self.name = f"{root.resolve().name}/{split}"
        self.reduce_zero_label = reduce_zero_label
        self.class_names = _class_names(root, num_classes)
        self._images = os.fspath(root / "images" / split)
        self._masks = os.fspath(root / "annotations" / split)
        images = image_files(Path(self._images), "folder of images")
        _check_pairs(self._images, images, self._masks)
        # An array: as Python objects a million files take three times the memory in every worker.
        self._files = np.array([os.fsencode(image) for image in images])

    def __len__(self) -> int:
        return len(self._files)

    def name_of(self, index: int) -> str:
        """See `Source`."""
        return os.path.join(self._images, os.fsdecode(self._files[index]))

    def __getitem__(self, index: int) -> Record:
        image = self.name_of(index)
        mask = os.path.join(self._masks, _mask_file(os.path.basename(image)))
        return {
            "image": read_encoded(image),
            "label": read_encoded(mask),
            "name": image,
            "label_name": mask,
        }


class TfdsMaskSource(TfdsSource, MaskSource):
    """Reads images and masks of a dataset that TFDS prepared as ArrayRecord.

    The masks are an image feature of one channel. TFDS's own `scene_parse150` has none: its
    annotations are the RGB images of the instances of 100 classes.
    """

    _usual_keys = ("image", "annotation")

    def __init__(
        self, directory: str, split: str, num_classes: int | None, reduce_zero_label: bool
    ):
        self.reduce_zero_label = reduce_zero_label
        self._num_classes = num_classes
        super().__init__(directory, split)
        self._arguments = (directory, split, num_classes, reduce_zero_label)

    def _names_of_classes(self, features: dict[str, Any], directory: str) -> list[str]:
        import tensorflow_datasets as tfds

        image, mask = features.get(self._image_key), features.get(self._label_key)
        if not isinstance(image, tfds.features.Image) or not isinstance(mask, tfds.features.Image):
            found = ", ".join(sorted(features))
            raise UserError(f"{directory} has no images with masks: its features are {found}")
        if isinstance(mask, tfds.features.LabeledImage) and mask.num_classes:
            return list(mask.names)[self.reduce_zero_label :]
        return _numbered(self._num_classes, f"{directory} does not name its classes")

    def _encoded_keys(self) -> tuple[str, ...]:
        return self._image_key, self._label_key

    def _record(self, example: Any, name: str) -> Record:
        return {
            "image": example[self._image_key],
            "label": example[self._label_key],
            "name": name,
            "label_name": f"{self._label_key!r} of {name}",
        }


class SyntheticMaskSource(SyntheticSource, MaskSource):
    """Random images with random labels for each pixel; only made as whole batches."""

    reduce_zero_label = False


def _mask_file(image: str) -> str:
    """Returns the name of an image's mask."""
    return os.path.splitext(image)[0] + ".png"


def _check_pairs(directory: str, images: list[str], masks_directory: str) -> None:
    """Checks that each image has a mask and each mask an image."""
    with os.scandir(masks_directory) as entries:
        masks = {entry.name for entry in entries if not entry.name.startswith(".")}
    expected = {_mask_file(image): image for image in images}
    if missing := sorted(expected.keys() - masks):
        raise UserError(
            f"{os.path.join(directory, expected[missing[0]])} has no mask: expected "
            f"{os.path.join(masks_directory, missing[0])}{_others(missing)}"
        )
    if missing := sorted(masks - expected.keys()):
        raise UserError(
            f"the mask {os.path.join(masks_directory, missing[0])} has no image in {directory}: "
            f"remove it or add the image{_others(missing)}"
        )


def _others(missing: list[str]) -> str:
    return f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""


def _class_names(root: Path, num_classes: int | None) -> list[str]:
    """Returns the names of the classes, from a file of them if there is one."""
    file = next((root / n for n in (_CLASSES, _ADE_CLASSES) if (root / n).exists()), None)
    if file is None:
        return _numbered(num_classes, f"{root} has no {_CLASSES} with a class name a line")
    try:
        lines = read_text(file).rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file} cannot be read as UTF-8 text: write a class name a line"
        ) from error
    if file.name == _ADE_CLASSES:  # "Idx Ratio Train Val Stuff Name", names as "door;double door"
        lines = [line.rsplit("\t")[-1].split(";")[0].split(",")[0] for line in lines[1:]]
    names = [line.strip() for line in lines]
    for number, name in enumerate(names, 1):
        if not name or name in names[: number - 1]:
            wrong = f"names {name!r} again" if name else "is empty"
            raise UserError(f"line {number} of {file} {wrong}: expected a new class name")
    return names


def _numbered(num_classes: int | None, reason: str) -> list[str]:
    if num_classes is None:
        raise UserError(f"{reason}: set data.num_classes")
    return [f"class {label}" for label in range(num_classes)]
