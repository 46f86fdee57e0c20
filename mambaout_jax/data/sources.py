"""Random access to encoded pictures: TFDS in ArrayRecord form, or a folder of class folders.

A source is a sequence of records, picklable for worker processes, that hands out the bytes of the
encoded file. Decoding is left to the pipeline, so that every source gives the same pixels.
"""

import abc
import os
import re
from pathlib import Path
from typing import TypedDict

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mambaout_jax.errors import UserError

_IMAGE_SUFFIXES = frozenset(
    (".jpeg", ".jpg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
)
_EMBEDDED = ("digits",)  # data sets that lie, prepared, beside this file


class Record(TypedDict):
    """One picture as it is stored."""

    image: bytes  # the encoded file
    label: int
    name: str  # of the file or record, for messages


class Source(abc.ABC):
    """A split of a data set: `len(source)` records, `source[i]` one of them.

    Attributes:
      name: what the data set and split are called, free of the machine's paths.
      class_names: the classes in the order of their labels.
    """

    name: str
    class_names: list[str]

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record: ...


class FolderSource(Source):
    """Reads `directory/split/class/picture`; labels follow the sorted class names.

    The class folders of `reference_split` number the classes where that split exists, so that a
    class without a held-out picture shifts no label.
    """

    def __init__(self, directory: str, split: str, reference_split: str):
        root = Path(directory).expanduser()
        if not root.is_dir():
            raise UserError(f"data.dir is {directory!r}, which is no folder; name one that exists.")
        if not (root / split).is_dir():
            known = ", ".join(_folders(root)) or "no folder at all"
            raise UserError(f"{root} has no split {split!r}; there is {known}.")
        self.name = f"{root.resolve().name}/{split}"
        folders = _folders(root / split)
        reference = root / reference_split
        self.class_names = _folders(reference) if reference.is_dir() else folders
        if strangers := sorted(set(folders) - set(self.class_names)):
            raise UserError(f"{root / split / strangers[0]} is a class that {reference} lacks.")
        if not folders:
            raise UserError(f"{root / split} has no class folders; put pictures at class/picture.")
        labels = {name: label for label, name in enumerate(self.class_names)}
        self._directory = os.fspath(root / split)
        files: list[bytes] = []
        counts: list[int] = []
        for folder in folders:
            pictures = _pictures(root / split / folder)
            files += [os.fsencode(f"{folder}/{picture}") for picture in pictures]
            counts.append(len(pictures))
        # arrays: as Python objects a million files take three times the memory in every worker
        self._files = np.array(files)
        self._labels = np.repeat([labels[folder] for folder in folders], counts)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Record:
        path = os.path.join(self._directory, os.fsdecode(self._files[index]))
        try:
            image = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from error
        return {"image": image, "label": int(self._labels[index]), "name": path}


class TfdsSource(Source):
    """Reads a split of a data set that TFDS prepared as ArrayRecord; needs no TensorFlow.

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
                f"{directory} is prepared as {info.file_format.value}, which needs TensorFlow to "
                f"be read; convert it with: tfds convert_format --dataset_version_dir={directory} "
                f"--out_file_format=array_record"
            )
        self._arguments = (directory, split)
        image_key, label_key = info.supervised_keys or ("image", "label")
        self._image_key, self._label_key = str(image_key), str(label_key)
        features = dict(info.features.items())
        label_feature = features.get(self._label_key)
        if not isinstance(label_feature, tfds.features.ClassLabel) or not isinstance(
            features.get(self._image_key), tfds.features.Image
        ):
            raise UserError(f"{directory} holds no labelled pictures; it has {sorted(features)}.")
        self.name = f"{info.full_name}/{split}"
        self.class_names = list(label_feature.names)
        decoders = {self._image_key: tfds.decode.SkipDecoding()}
        try:
            self._records = builder.as_data_source(
                split, decoders=decoders, file_format=array_record
            )
        except (ValueError, KeyError) as error:
            known = ", ".join(sorted(info.splits)) or "none"
            raise UserError(
                f"{info.full_name} has no split {split!r}; its splits are {known}, and a part of "
                f"one is written 'train[:90%]'."
            ) from error

    def __reduce__(self) -> tuple:
        return type(self), self._arguments

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        example = self._records[index]
        name = example.get("file_name", b"")
        return {
            "image": example[self._image_key],
            "label": int(example[self._label_key]),
            "name": f"{self.name}[{index}]" + (f" ({name.decode()})" if name else ""),
        }


def open_source(data: ConfigDict, split: str) -> Source:
    """Opens one split of the data set that the configuration names.

    Args:
      data: the `data` part of the configuration.
      split: the split's name, `data.train_split` or `data.eval_split` as a rule.

    Returns:
      The split's records.

    Raises:
      UserError: the data set, the split or its classes are not what the configuration says.
    """
    source: Source
    if data.source == "folder":
        source = FolderSource(data.dir, split, reference_split=data.train_split)
    elif data.source == "tfds":
        source = TfdsSource(_prepared_directory(data.name, data.dir), split)
    else:
        raise UserError(f"data.source is {data.source!r}; it is either 'tfds' or 'folder'.")
    if len(source) == 0:
        raise UserError(f"{source.name} holds no pictures.")
    if source.num_classes != data.num_classes:
        raise UserError(
            f"data.num_classes is {data.num_classes}, but {source.name} has {source.num_classes} "
            f"classes; pass --config.data.num_classes={source.num_classes}."
        )
    return source


def _prepared_directory(name: str, directory: str) -> str:
    """Returns the folder of a prepared version: the newest one, or the one in `name:1.0.0`."""
    dataset, _, version = name.partition(":")
    if directory or dataset not in _EMBEDDED:
        default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        root = epath.Path(directory or default).expanduser()
    else:
        root = epath.Path(__file__).parent
    if (root / "dataset_info.json").exists():
        return os.fspath(root)  # the version's own folder was given
    folder = root / dataset
    versions = [child.name for child in folder.iterdir()] if folder.is_dir() else []
    versions = [child for child in versions if re.fullmatch(r"\d+\.\d+\.\d+", child)]
    if version:
        versions = [child for child in versions if child == version]
    if not versions:
        raise UserError(
            f"{name} is not prepared in {root}; set data.dir or TFDS_DATA_DIR to where it is, or "
            f"prepare it with: tfds build {name} --file_format=array_record --data_dir={root}"
        )
    newest = max(versions, key=lambda child: tuple(map(int, child.split("."))))
    return os.fspath(folder / newest)


def _folders(directory: Path) -> list[str]:
    """Returns the sorted names of the folders in a folder, hidden ones excepted."""
    with os.scandir(directory) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _pictures(directory: Path) -> list[str]:
    """Returns the sorted names of a class folder's pictures; anything else is an error."""
    with os.scandir(directory) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    if not names:
        raise UserError(f"The class folder {directory} is empty; fill it or remove it.")
    for name in names:
        if os.path.splitext(name)[1].lower() not in _IMAGE_SUFFIXES:
            raise UserError(f"{directory / name} is no image; move it out of the class folder.")
    return names
