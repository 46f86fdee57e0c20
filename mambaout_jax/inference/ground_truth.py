"""Which classes are right for a picture: its label, real labels, a subset of the classes."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from mambaout_jax.data.sources import Source
from mambaout_jax.errors import UserError
from mambaout_jax.labels import imagenet_wordnet_ids


def read_subset(path: Path, num_classes: int) -> list[int]:
    """Reads a subset of ImageNet-1k's or other classes: a number or a WordNet id a line.

    Raises:
        UserError: when the file cannot be read or a line is no class.
    """
    ids = {name: index for index, name in enumerate(imagenet_wordnet_ids())}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the subset of classes {path} cannot be read: {error}") from None
    classes: list[int] = []
    for number, line in enumerate(lines, 1):
        word = line.strip()
        if not word:
            continue
        index = int(word) if word.isdecimal() else ids.get(word, num_classes)
        if index >= num_classes or index in classes:
            what = "stands there twice" if index in classes else "is no class"
            raise UserError(
                f"{path}, line {number}: {word!r} {what}: expected numbers below {num_classes} or "
                "WordNet ids such as n01440764, one a line"
            )
        classes.append(index)
    if not classes:
        raise UserError(f"the subset of classes {path} is empty")
    return classes


def read_real_labels(path: Path) -> list[list[int]]:
    """Reads real labels: for each validation picture, by its number, a list of right classes.

    Source: Beyer et al., "Are we done with ImageNet?", real.json.

    Raises:
        UserError: when the file is not of that form.
    """
    try:
        labels = json.loads(path.read_text())
        if all(isinstance(i, int) for row in labels for i in row) and isinstance(labels, list):
            return labels
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"the real labels {path} cannot be read: {error}") from None
    raise UserError(f"the real labels {path} are not a list of lists of class numbers")


class Truth:
    """Tells which classes are right for a picture.

    Pictures without a right answer, by the real labels or by the subset, are left out. The classes
    of a data set that holds the subset's alone are the subset's, in its order.
    """

    def __init__(
        self,
        source: Source,
        num_classes: int,
        subset: Sequence[int] | None = None,
        real: Sequence[Sequence[int]] | None = None,
    ):
        """Checks that the data set's classes can be the network's.

        Raises:
            UserError: when they cannot.
        """
        self._real = real
        self._subset = None if subset is None else set(subset)
        self._classes: Sequence[int] = range(num_classes)
        if subset is not None and source.num_classes == len(subset):
            self._classes = subset
        if source.num_classes != len(self._classes):
            theirs = f" or the subset's {len(subset)}" if subset is not None else ""
            raise UserError(
                f"{source.name} has {source.num_classes} classes: expected the weights' "
                f"{num_classes}{theirs}"
            )

    def __call__(self, label: int, name: str) -> set[int]:
        """Returns the right classes' numbers, none where the picture is to be left out.

        Raises:
            UserError: when real labels are asked for and the name does not tell which are its.
        """
        right = {self._classes[label]}
        if self._real is not None:
            match = re.search(r"ILSVRC2012_val_(\d{8})", name)
            if not match or not 0 < int(match[1]) <= len(self._real):
                raise UserError(
                    f"{name} has no real labels: expected the name ILSVRC2012_val_00000001 to "
                    f"_{len(self._real):08d} in it"
                )
            right = set(self._real[int(match[1]) - 1])
        return right if self._subset is None else right & self._subset
