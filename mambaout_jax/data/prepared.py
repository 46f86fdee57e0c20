"""Images of a dataset that TFDS prepared in ArrayRecord form."""

import functools
import os
import re
import threading
from typing import Any

import numpy as np
from etils import epath

from mambaout_jax.bucket import failed, io_errors, is_bucket, open_bucket
from mambaout_jax.data.decoding import BadImageError
from mambaout_jax.data.reading import repeat, unreadable
from mambaout_jax.data.records import Record, Source
from mambaout_jax.errors import (
    AccessError,
    StorageError,
    UserError,
    did_you_mean,
    first_line,
)
from mambaout_jax.files import check_files

_EMBEDDED = ("digits",)  # datasets that ship, prepared, beside this file
_MOST_LABELS = 16  # of an image with several right classes; imagenet2012_real has 9 at most


class TfdsSource(Source):
    """Reads a split of a dataset that TFDS prepared as ArrayRecord; needs no TensorFlow.

    `split` may use TFDS's slices, such as "train[:90%]". The label is a class, or, as in
    imagenet2012_real, a list of right classes.
    """

    _usual_keys = ("image", "label")  # where the dataset does not name them

    def __init__(self, directory: str, split: str):
        self._reopening = threading.Lock()
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
        self._arguments: tuple = (directory, split)
        image_key, label_key = info.supervised_keys or self._usual_keys
        self._image_key, self._label_key = str(image_key), str(label_key)
        self.name = f"{info.full_name}/{split}"
        self.class_names = self._names_of_classes(dict(info.features.items()), directory)
        self._open_records = functools.partial(
            builder.as_data_source,
            split,
            decoders={key: tfds.decode.SkipDecoding() for key in self._encoded_keys()},
            file_format=array_record,
        )
        try:
            self._records = self._open_records()
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
        example = self._example(index)
        file = example.get("file_name", b"")
        name = self.name_of(index) + (f" ({file.decode()})" if file else "")
        return self._record(example, name)

    def _names_of_classes(self, features: dict[str, Any], directory: str) -> list[str]:
        """Returns the names of the classes, or raises UserError: the features do not fit."""
        import tensorflow_datasets as tfds

        label = features.get(self._label_key)
        if isinstance(label, tfds.features.Sequence):
            self.label_shape, label = (_MOST_LABELS,), label.feature
        if not isinstance(label, tfds.features.ClassLabel) or not isinstance(
            features.get(self._image_key), tfds.features.Image
        ):
            found = ", ".join(sorted(features))
            raise UserError(f"{directory} has no labelled images: its features are {found}")
        return list(label.names)

    def _encoded_keys(self) -> tuple[str, ...]:
        """Returns the features that stay encoded files."""
        return (self._image_key,)

    def _record(self, example: Any, name: str) -> Record:
        """Returns the record of an example with a name for messages."""
        label = example[self._label_key]
        label = _padded(label, name) if self.label_shape else int(label)
        return {"image": example[self._image_key], "label": label, "name": name}

    def _example(self, index: int) -> Any:
        name = self.name_of(index)
        in_bucket = is_bucket(self._arguments[0])
        try:
            return repeat(lambda: self._read(index), name)
        except AccessError:
            raise
        except StorageError as error:
            if in_bucket:  # all of it is out of reach, not one record
                raise
            raise unreadable(name, error) from error
        except io_errors(self._arguments[0], OSError, RuntimeError) as error:
            if in_bucket:
                raise failed(f"{name} cannot be read", error) from error
            raise BadImageError(
                f"{name} cannot be read ({first_line(error)}): prepare the dataset again"
            ) from error

    def _read(self, index: int) -> Any:
        records = self._records
        try:
            return records[index]
        except (OSError, RuntimeError):  # a reader that has failed once fails from then on
            with self._reopening:
                if self._records is records:  # else another thread has opened new readers
                    self._records = self._open_records()
            raise


def _padded(labels: Any, name: str) -> np.ndarray:
    """Returns a list of classes as int32 [_MOST_LABELS], without repetitions, padded with -1."""
    classes = np.unique(np.asarray(labels, np.int32))
    if len(classes) > _MOST_LABELS:
        raise UserError(f"{name} has {len(classes)} right classes: expected {_MOST_LABELS} at most")
    return np.pad(classes, (0, _MOST_LABELS - len(classes)), constant_values=-1)


def prepared_directory(name: str, directory: str) -> str:
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
        check_files(root)
        return os.fspath(root)  # the version's own folder was given
    versions = _versions(root / dataset)
    if version:
        versions = [child for child in versions if child == version]
    if not versions:
        known = {*_EMBEDDED, *_prepared_names(root)} - {dataset}
        raise UserError(
            f"no dataset {name!r} in {root}{did_you_mean(dataset, sorted(known))} "
            "(set the data directory or TFDS_DATA_DIR to the folder that holds it, or prepare it "
            f"with: tfds build {name} --file_format=array_record --data_dir={root})"
        )
    newest = max(versions, key=lambda child: tuple(map(int, child.split("."))))
    check_files(root / dataset / newest)
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
