"""Which dataset to read, and opening it.

A source is a sequence of records that worker processes can unpickle. It returns the bytes of the
encoded file; decoding is left to the pipeline, so every source gives the same pixels.
"""

import dataclasses

from mambaout_jax.data.folder import FolderSource
from mambaout_jax.data.prepared import TfdsSource, prepared_directory
from mambaout_jax.data.records import Source
from mambaout_jax.data.segmentation.masks import MAX_CLASSES, MaskSource
from mambaout_jax.data.segmentation.sources import (
    FolderMaskSource,
    SyntheticMaskSource,
    TfdsMaskSource,
)
from mambaout_jax.data.synthetic import SyntheticSource
from mambaout_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Which dataset to read.

    Attributes:
      kind: "tfds" (prepared as ArrayRecord), "folder" (directory/split/class/image; for masks see
        `FolderMaskSource`) or "synthetic" (random images in memory).
      name: TFDS name, such as "imagenet2012" or "imagenet2012:5.1.0"; "digits" ships with the
        package. The other kinds need none.
      directory: where the data is; for TFDS, "" stands for $TFDS_DATA_DIR.
      train_split: name of the training split.
      eval_split: name of the evaluation split.
      num_classes: number of classes that the dataset must have; None: any number.
      task: "classification" (images with classes) or "segmentation" (images with masks).
      reduce_zero_label: of masks, see `segmentation.masks.MaskLabels`.
    """

    kind: str
    name: str
    directory: str
    train_split: str
    eval_split: str
    num_classes: int | None
    task: str = "classification"
    reduce_zero_label: bool = False


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
    source = (
        _open_masks(dataset, split) if dataset.task == "segmentation" else _open(dataset, split)
    )
    if len(source) == 0:
        raise UserError(f"{source.name} has no images")
    if dataset.num_classes not in (None, source.num_classes):
        raise UserError(
            f"{source.name} has {source.num_classes} classes, but the model has "
            f"{dataset.num_classes}: train with --config.data.num_classes={source.num_classes}, or "
            f"use other weights"
        )
    return source


def _open(dataset: Dataset, split: str) -> Source:
    if dataset.kind == "folder":
        return FolderSource(dataset.directory, split, reference_split=dataset.train_split)
    if dataset.kind == "tfds":
        return TfdsSource(prepared_directory(dataset.name, dataset.directory), split)
    if dataset.kind == "synthetic":
        return SyntheticSource(split, dataset.num_classes)
    raise ValueError(f"unknown kind of dataset: {dataset.kind!r}")


def _open_masks(dataset: Dataset, split: str) -> MaskSource:
    source: MaskSource
    numbering = dataset.num_classes, dataset.reduce_zero_label
    if dataset.kind == "folder":
        source = FolderMaskSource(dataset.directory, split, *numbering)
    elif dataset.kind == "tfds":
        directory = prepared_directory(dataset.name, dataset.directory)
        source = TfdsMaskSource(directory, split, *numbering)
    elif dataset.kind == "synthetic":
        source = SyntheticMaskSource(split, dataset.num_classes)
    else:
        raise ValueError(f"unknown kind of dataset: {dataset.kind!r}")
    most = MAX_CLASSES - dataset.reduce_zero_label
    if source.num_classes > most:
        raise UserError(
            f"{source.name} has {source.num_classes} classes: expected {most} at most, because "
            f"the labels of masks have 8 bits"
        )
    return source
