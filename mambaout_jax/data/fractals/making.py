"""Makes the files of the dataset in several processes, in a fixed order."""

import dataclasses
import functools
import io
import itertools
import multiprocessing
from collections.abc import Iterator, Mapping
from pathlib import Path

from mambaout_jax.data.fractals.images import make_jpeg

_CHUNK = 50  # images that a process makes at a time


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be made.

    Attributes:
      classes: the number of classes.
      images: of a class, by split.
      processes: that make them.
    """

    classes: int
    images: Mapping[str, int]
    processes: int


def class_name(label: int) -> str:
    """Returns the name of a class, and of its folder."""
    return f"fractal{label:03d}"


def make_files(plan: Plan, split: str) -> Iterator[tuple[str, int, io.BytesIO]]:
    """Yields (file name, label, JPEG file) of every image of a split, class by class."""
    places = itertools.product(range(plan.classes), range(plan.images[split]))
    make = functools.partial(_make_file, split)
    # Spawned rather than forked: the parent may have threads.
    with multiprocessing.get_context("spawn").Pool(plan.processes) as pool:
        for label, index, data in pool.imap(make, places, _CHUNK):
            yield f"{class_name(label)}-{index:04d}.jpg", label, io.BytesIO(data)


def _make_file(split: str, place: tuple[int, int]) -> tuple[int, int, bytes]:
    label, index = place
    return label, index, make_jpeg(label, split, index)


def write_folders(plan: Plan, output: Path) -> None:
    """Writes output/split/class/image.jpg, as `data.source = "folder"` and timm read it."""
    for split in plan.images:
        for label in range(plan.classes):
            (output / split / class_name(label)).mkdir(parents=True)
        for name, label, file in make_files(plan, split):
            (output / split / class_name(label) / name).write_bytes(file.getvalue())
