"""Images in a folder of class folders."""

import os
import re
from pathlib import Path

import numpy as np

from mambaout_jax.bucket import is_bucket
from mambaout_jax.data.reading import read_file, repeat, unreadable
from mambaout_jax.data.records import Record, Source
from mambaout_jax.errors import StorageError, UserError, did_you_mean
from mambaout_jax.files import kind_of

_SUFFIXES = frozenset(
    (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)
# Names of a split for evaluation, the first that is there; else a part of the training split.
_EVALUATION = ("validation", "val", "test")
_HELD_OUT = ("[:80%]", "[80%:]")


class FolderSource(Source):
    """Reads `directory/split/class/image`; labels follow the sorted class names.

    A split may be a part of each class's images in the order of their names, such as "train[:80%]"
    and "train[80%:]", and "." is the directory itself. The class folders of `reference_split`
    number the classes where that split exists, so a class without an evaluation image shifts no
    label.
    """

    def __init__(self, directory: str, split: str, reference_split: str):
        root = local_folder(directory, f"{_whole(split)}/CLASS/IMAGE", "class folders")
        name, part = split, _percentages(split)
        split, reference_split = _whole(split), _whole(reference_split)
        if not (root / split).is_dir():
            known = _folders(root)
            there = f"its folders are {', '.join(known)}" if known else "it has no folders"
            raise UserError(f"{root} has no split {split!r}{did_you_mean(split, known)} ({there})")
        self.name = f"{root.resolve().name}/{name}"
        folders = _folders(root / split)
        reference = root / reference_split
        self.class_names = _folders(reference) if reference.is_dir() else folders
        if unknown := sorted(set(folders) - set(self.class_names)):
            raise UserError(
                f"{root / split / unknown[0]} is a class that {reference} does not have"
            )
        if not folders:
            raise UserError(
                f"{root / split} has no class folders: put images at {root / split}/CLASS/IMAGE"
            )
        labels = {name: label for label, name in enumerate(self.class_names)}
        self._directory = os.fspath(root / split)
        files: list[bytes] = []
        counts: list[int] = []
        for folder in folders:
            images = image_files(root / split / folder, "class folder")
            start, stop = (round(len(images) * percentage / 100) for percentage in part)
            images = images[start:stop]
            files += [os.fsencode(f"{folder}/{image}") for image in images]
            counts.append(len(images))
        # Arrays: as Python objects a million files take three times the memory in every worker.
        self._files = np.array(files)
        self._labels = np.repeat([labels[folder] for folder in folders], counts)

    def __len__(self) -> int:
        return len(self._files)

    def name_of(self, index: int) -> str:
        """See `Source`."""
        return os.path.join(self._directory, os.fsdecode(self._files[index]))

    def __getitem__(self, index: int) -> Record:
        path = self.name_of(index)
        return {"image": read_encoded(path), "label": int(self._labels[index]), "name": path}


def find_splits(directory: str) -> tuple[str, str]:
    """Returns the splits of a folder for training and for evaluation.

    They are "train" and one of "validation", "val" and "test". Without the latter, the last fifth
    of each class's training images is for evaluation. Without both, class folders are in the folder
    itself.

    Raises:
      UserError: there is no such folder, or no split for training beside one for evaluation.
    """
    root = local_folder(directory, "class folders, or with train/ and validation/", "class folders")
    names = _folders(root)
    evaluation = next((name for name in _EVALUATION if name in names), "")
    if "train" not in names and evaluation:
        raise UserError(f"{root} has the folder {evaluation} and no folder train: expected both")
    train = "train" if "train" in names else "."
    return (train, evaluation) if evaluation else (train + _HELD_OUT[0], train + _HELD_OUT[1])


def _whole(split: str) -> str:
    """Returns the split that "train[:80%]" is a part of."""
    return split.partition("[")[0]


def _percentages(split: str) -> tuple[int, int]:
    """Returns where a part of a split starts and stops, in percent: "train[80%:]" is (80, 100)."""
    if "[" not in split:
        return 0, 100
    match = re.fullmatch(r"[^[]*\[(?:(\d+)%)?:(?:(\d+)%)?\]", split)
    start, stop = (int(match[1] or 0), int(match[2] or 100)) if match else (0, 0)
    if not start < stop <= 100:
        raise UserError(f"{split!r} is no part of a split: expected one such as 'train[:80%]'")
    return start, stop


def local_folder(directory: str, expected: str, what: str) -> Path:
    """Returns a folder on a disk, which should have files like `expected`, and not in a bucket."""
    if not directory:
        raise UserError(f"no data directory: expected the path of a folder with {expected}")
    if is_bucket(directory):
        raise UserError(
            f"{what} are read from a disk, and {directory} is in a bucket: copy it to a disk, or "
            "prepare the dataset with TFDS"
        )
    root = Path(directory).expanduser()
    if not root.is_dir():
        raise UserError(f"no folder {directory!r}: expected one with {expected}")
    return root


def read_encoded(path: str) -> bytes:
    """Returns the content of an image's file.

    Raises:
      UnreadableError: its storage fails at each attempt.
      UserError: it cannot be opened.
    """
    try:
        return repeat(lambda: read_file(path), path)
    except StorageError as error:
        raise unreadable(path, error) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _folders(directory: Path) -> list[str]:
    """Returns the sorted names of the folders in a folder, except hidden ones."""
    with os.scandir(directory) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def image_files(directory: Path, what: str) -> list[str]:
    """Returns the sorted names of the images in a folder, a `what`; anything else is an error."""
    with os.scandir(directory) as entries:
        files = sorted(
            (entry.name, entry.is_file()) for entry in entries if not entry.name.startswith(".")
        )
    if not files:
        raise UserError(f"the {what} {directory} is empty: fill it or remove it")
    for name, is_file in files:
        if os.path.splitext(name)[1].lower() not in _SUFFIXES:
            raise UserError(f"{directory / name} is not an image: move it out of the {what}")
        if not is_file:
            kind = kind_of(directory / name)
            raise UserError(f"{directory / name} is {kind}, not a file: remove it from the {what}")
    return [name for name, _ in files]
