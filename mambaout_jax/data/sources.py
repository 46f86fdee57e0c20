"""Random access to encoded images: TFDS in ArrayRecord form, or a folder of class folders.

A source is a sequence of records that worker processes can unpickle. It returns the bytes of the
encoded file; decoding is left to the pipeline, so every source gives the same pixels.
"""

import abc
import dataclasses
import os
import re
from pathlib import Path
from typing import TypedDict

import numpy as np
from etils import epath

from mambaout_jax.bucket import failed, io_errors, is_bucket, open_bucket
from mambaout_jax.errors import UserError, did_you_mean

_IMAGE_SUFFIXES = frozenset(
    (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)
_EMBEDDED = ("digits",)  # datasets that ship, prepared, beside this file


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Which dataset to read.

    Attributes:
      kind: "tfds" (prepared as ArrayRecord) or "folder" (directory/split/class/image).
      name: TFDS name, such as "imagenet2012" or "imagenet2012:5.1.0"; "digits" ships with the
        package. A folder needs none.
      directory: where the data is; for TFDS, "" stands for $TFDS_DATA_DIR.
      train_split: name of the training split.
      eval_split: name of the evaluation split.
      num_classes: number of classes that the dataset must have; None: any number.
    """

    kind: str
    name: str
    directory: str
    train_split: str
    eval_split: str
    num_classes: int | None


class Record(TypedDict):
    """One image as it is stored."""

    image: bytes  # the encoded file
    label: int | np.ndarray  # the class, or int32 of the source's `label_shape`
    name: str  # of the file or record, for messages


class Source(abc.ABC):
    """A split of a dataset: `len(source)` records, `source[i]` one of them.

    Attributes:
      name: of the dataset and split, without this machine's paths.
      class_names: the classes in the order of their labels.
      label_shape: of each label; (K,) for lists of right classes, padded with -1.
    """

    name: str
    class_names: list[str]
    label_shape: tuple[int, ...] = ()

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record: ...


class FolderSource(Source):
    """Reads `directory/split/class/image`; labels follow the sorted class names.

    The class folders of `reference_split` number the classes where that split exists, so a class
    without an evaluation image shifts no label.
    """

    def __init__(self, directory: str, split: str, reference_split: str):
        if is_bucket(directory):
            raise UserError(
                f"class folders are read from a disk, and {directory} is in a bucket: copy it to a "
                "disk, or prepare the dataset with TFDS"
            )
        root = Path(directory).expanduser()
        if not root.is_dir():
            raise UserError(f"no folder {directory!r}: expected one with {split}/CLASS/IMAGE")
        if not (root / split).is_dir():
            known = _folders(root)
            raise UserError(
                f"{root} has no split {split!r}{did_you_mean(split, known)}"
                f" (its folders are {', '.join(known) or 'none'})"
            )
        self.name = f"{root.resolve().name}/{split}"
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
            images = _images(root / split / folder)
            files += [os.fsencode(f"{folder}/{image}") for image in images]
            counts.append(len(images))
        # Arrays: as Python objects a million files take three times the memory in every worker.
        self._files = np.array(files)
        self._labels = np.repeat([labels[folder] for folder in folders], counts)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        path = os.path.join(self._directory, os.fsdecode(self._files[index]))
        try:
            image = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        return {"image": image, "label": int(self._labels[index]), "name": path}


class TfdsSource(Source):
    """Reads a split of a dataset that TFDS prepared as ArrayRecord; needs no TensorFlow.

    `split` may use TFDS's slices, such as "train[:90%]".
    """

    def __init__(self, directory: str, split: str):
        self._open(directory, split)

    def _open(self, directory: str, split: str) -> None:
        import tensorflow_datasets as tfds

        array_record = tfds.core.FileFormat.ARRAY_RECORD
        builder = tfds.builder_from_directory(directory)
        info = builder.info
        if array_record not in info.available_file_formats():
            raise UserError(
                f"{directory} is prepared as {info.file_format.value}, and reading that needs "
                f"TensorFlow; convert it with: tfds convert_format "
                f"--dataset_version_dir={directory} --out_file_format=array_record"
            )
        self._arguments = (directory, split)
        image_key, label_key = info.supervised_keys or ("image", "label")
        self._image_key, self._label_key = str(image_key), str(label_key)
        features = dict(info.features.items())
        label_feature = features.get(self._label_key)
        if not isinstance(label_feature, tfds.features.ClassLabel) or not isinstance(
            features.get(self._image_key), tfds.features.Image
        ):
            found = ", ".join(sorted(features))
            raise UserError(f"{directory} has no labelled images: its features are {found}")
        self.name = f"{info.full_name}/{split}"
        self.class_names = list(label_feature.names)
        decoders = {self._image_key: tfds.decode.SkipDecoding()}
        try:
            self._records = builder.as_data_source(
                split, decoders=decoders, file_format=array_record
            )
        except (ValueError, KeyError) as error:
            known = sorted(info.splits)
            raise UserError(
                f"{info.full_name} has no split {split!r}{did_you_mean(split, known)}"
                f" (its splits are {', '.join(known) or 'none'}; a part of one is 'train[:90%]')"
            ) from error

    def __reduce__(self) -> tuple:
        return type(self), self._arguments

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        try:
            example = self._records[index]
        except io_errors(self._arguments[0]) as error:
            raise failed(f"{self.name}[{index}] cannot be read", error) from error
        name = example.get("file_name", b"")
        return {
            "image": example[self._image_key],
            "label": int(example[self._label_key]),
            "name": f"{self.name}[{index}]" + (f" ({name.decode()})" if name else ""),
        }


def open_source(dataset: Dataset, split: str) -> Source:
    """Opens one split of a dataset.

    Args:
      dataset: which one.
      split: name of the split, usually `dataset.train_split` or `dataset.eval_split`.

    Returns:
      The split's records.

    Raises:
      UserError: the dataset or the split does not exist, or has another number of classes.
    """
    source: Source
    if dataset.kind == "folder":
        source = FolderSource(dataset.directory, split, reference_split=dataset.train_split)
    elif dataset.kind == "tfds":
        source = TfdsSource(_prepared_directory(dataset.name, dataset.directory), split)
    else:
        raise ValueError(f"unknown kind of dataset: {dataset.kind!r}")
    if len(source) == 0:
        raise UserError(f"{source.name} has no images")
    if dataset.num_classes not in (None, source.num_classes):
        raise UserError(
            f"{source.name} has {source.num_classes} classes, but the model has "
            f"{dataset.num_classes}: train with --config.data.num_classes={source.num_classes}, or "
            f"use other weights"
        )
    return source


def _prepared_directory(name: str, directory: str) -> str:
    """Returns the folder of a prepared version: the newest one, or the one in `name:1.0.0`."""
    dataset, _, version = name.partition(":")
    if directory or dataset not in _EMBEDDED:
        default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        root = epath.Path(directory or default).expanduser()
        if is_bucket(root):
            open_bucket(root)
    else:
        root = epath.Path(__file__).parent
    if (root / "dataset_info.json").exists():
        return os.fspath(root)  # the version's own folder was given
    versions = _versions(root / dataset)
    if version:
        versions = [child for child in versions if child == version]
    if not versions:
        known = {*_EMBEDDED, *_prepared_names(root)} - {dataset}
        raise UserError(
            f"{name} is not prepared in {root}{did_you_mean(dataset, sorted(known))}; give the "
            f"directory that has it, or set TFDS_DATA_DIR to it, or prepare it with: tfds build "
            f"{name} --file_format=array_record --data_dir={root}"
        )
    newest = max(versions, key=lambda child: tuple(map(int, child.split("."))))
    return os.fspath(root / dataset / newest)


def _versions(folder: epath.Path) -> list[str]:
    """Returns the prepared versions of a dataset."""
    children = [child.name for child in folder.iterdir()] if folder.is_dir() else []
    return [child for child in children if re.fullmatch(r"\d+\.\d+\.\d+", child)]


def _prepared_names(root: epath.Path) -> list[str]:
    """Returns the names of the datasets that are prepared in a folder."""
    if not root.is_dir():
        return []
    return [child.name for child in root.iterdir() if _versions(child)]


def _folders(directory: Path) -> list[str]:
    """Returns the sorted names of the folders in a folder, except hidden ones."""
    with os.scandir(directory) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _images(directory: Path) -> list[str]:
    """Returns the sorted names of a class folder's images; any other file is an error."""
    with os.scandir(directory) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    if not names:
        raise UserError(f"the class folder {directory} is empty: fill it or remove it")
    for name in names:
        if os.path.splitext(name)[1].lower() not in _IMAGE_SUFFIXES:
            raise UserError(f"{directory / name} is not an image: move it out of the class folder")
    return names
