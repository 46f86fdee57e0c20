"""The right classes of each image: its label, its reassessed labels, a subset of the classes."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mambaout_jax.data.records import Record, Source
from mambaout_jax.errors import UserError, first_line
from mambaout_jax.files import read_text
from mambaout_jax.labels import imagenet_wordnet_ids


def read_subset(path: Path, num_classes: int) -> list[int]:
    """Reads a subset of the classes: one number or ImageNet-1k WordNet id per line.

    Raises:
        UserError: the file cannot be read, or a line is not a class.
    """
    ids = {name: index for index, name in enumerate(imagenet_wordnet_ids())}
    try:
        lines = read_text(path).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the class subset {path}: {first_line(error)}") from None
    classes: list[int] = []
    for number, line in enumerate(lines, 1):
        word = line.strip()
        if not word:
            continue
        index = int(word) if word.isdecimal() else ids.get(word, num_classes)
        if index >= num_classes or index in classes:
            problem = "is there twice" if index in classes else "is not a class"
            raise UserError(
                f"{path}, line {number}: {word!r} {problem}; expected numbers below {num_classes} "
                "or WordNet ids such as n01440764, one per line"
            )
        classes.append(index)
    if not classes:
        raise UserError(f"the class subset {path} is empty")
    return classes


def read_real_labels(path: Path) -> list[list[int]]:
    """Reads reassessed labels: a list of right classes for each ImageNet validation image.

    Source: Beyer et al., "Are we done with ImageNet?", real.json.

    Raises:
        UserError: the file cannot be read or has another form.
    """
    try:
        labels = json.loads(read_text(path))
        if isinstance(labels, list) and all(type(i) is int for row in labels for i in row):
            return labels
    except UserError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"cannot read the reassessed labels {path}: {first_line(error)}") from None
    raise UserError(f"the reassessed labels {path} are not a list of lists of class numbers")


class GroundTruthSource(Source):
    """The images of a source, each with the list of its right classes as its label.

    The classes are those of the weights. A list is int32 [K], padded with -1; it is empty for an
    image without reassessed labels, or with none in the subset. A dataset with as many classes as
    the subset has the subset's classes, in the subset's order.
    """

    def __init__(
        self,
        source: Source,
        num_classes: int,
        subset: Sequence[int] | None = None,
        real: Sequence[Sequence[int]] | None = None,
    ):
        """Matches the classes of the source with those of the weights.

        Args:
            source: the images with their labels.
            num_classes: number of classes of the weights.
            subset: the classes that count, see `read_subset`; None: all.
            real: see `read_real_labels`; None: the labels of the source.

        Raises:
            UserError: the classes do not match.
        """
        self.name = source.name
        self.class_names = source.class_names
        self._source = source
        self._allowed = np.isin(
            np.arange(num_classes), range(num_classes) if subset is None else subset
        )
        classes: Sequence[int] = range(num_classes)
        if subset is not None and source.num_classes == len(subset):
            classes = subset
        if source.num_classes != len(classes):
            theirs = f" or the {len(subset)} of the subset" if subset is not None else ""
            raise UserError(
                f"{source.name} has {source.num_classes} classes: expected the {num_classes} of "
                f"the weights{theirs}"
            )
        self._classes = np.array(classes, np.int32)
        self._real = None if real is None else _padded(real, num_classes)
        lists = source.label_shape or (1,)
        self.label_shape = lists if self._real is None else self._real.shape[1:]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        record = self._source[index]
        if self._real is None:
            labels = np.atleast_1d(record["label"])
            right = np.where(labels >= 0, self._classes[labels], -1)
        else:
            right = self._real[_real_index(record["name"], len(self._real))]
        right = np.where(self._allowed[right], right, -1)  # -1 stays -1
        return {"image": record["image"], "label": right, "name": record["name"]}


def _padded(real: Sequence[Sequence[int]], num_classes: int) -> np.ndarray:
    """Returns int32 [images, K]: each list without repetitions, padded with -1."""
    rows = [sorted(set(row)) for row in real]
    for number, row in enumerate(rows, 1):
        if row and not 0 <= row[0] <= row[-1] < num_classes:
            raise UserError(
                f"the reassessed labels of image {number} are {row}: expected classes of the "
                f"weights, 0 to {num_classes - 1}"
            )
    padded = np.full((len(rows), max([1, *map(len, rows)])), -1, np.int32)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded


def _real_index(name: str, count: int) -> int:
    """Returns the index of an ImageNet validation image, which is in its name.

    Raises:
        UserError: the name has no such number.
    """
    match = re.search(r"ILSVRC2012_val_(\d{8})", name)
    if not match or not 0 < int(match[1]) <= count:
        raise UserError(
            f"{name} has no reassessed labels: expected ILSVRC2012_val_00000001 to _{count:08d} in "
            "its name"
        )
    return int(match[1]) - 1
