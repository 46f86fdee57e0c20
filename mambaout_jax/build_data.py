"""Turns the data, augmentation and evaluation keys of a config into datasets and batches."""

import dataclasses
import logging
from typing import Any

import jax
from ml_collections import ConfigDict

from mambaout_jax import config as configuration
from mambaout_jax.data.augment import Augmentation
from mambaout_jax.data.folder import find_splits
from mambaout_jax.data.loader import EvalBatches, LoaderOptions, TrainBatches
from mambaout_jax.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from mambaout_jax.data.segmentation.augment import SegmentationAugmentation
from mambaout_jax.data.segmentation.whole import WholeImages
from mambaout_jax.data.sources import Dataset, open_source
from mambaout_jax.errors import UserError

logger = logging.getLogger(__name__)

LARGEST_BATCH = 128  # that `fill_in` chooses
STEPS_PER_EPOCH = 8  # at least, with a batch that `fill_in` chooses
LONG_SIDE = 4  # of a whole image for segmentation, at most, in short sides: 2048 to 512


def fill_in(config: ConfigDict) -> None:
    """Replaces the keys that a config leaves to the data, and logs what they become.

    Splits "" are found in a folder, see `find_splits`; `data.num_classes` 0 is that of the training
    split. A batch size 0 is the largest power of two that gives eight steps an epoch, at most 128.

    Raises:
        UserError: a name in the config is unknown, the data cannot be read, or one split alone
            is "".
    """
    configuration.check_choices(config)
    data, chosen = config.data, []
    if "" in (data.train_split, data.eval_split):
        if data.train_split or data.eval_split or data.source != "folder":
            raise UserError(
                f"config.data.train_split is {data.train_split!r} and config.data.eval_split "
                f"{data.eval_split!r}: expected two names, or a folder, in which both are found"
            )
        if not data.dir:
            raise UserError("no images: expected --config.data.dir=FOLDER, with class folders")
        data.train_split, data.eval_split = find_splits(data.dir)
        chosen += [f"training on {data.train_split}", f"evaluation on {data.eval_split}"]
    if 0 in (data.num_classes, config.batch_size):
        dataset = build_dataset(config)
        if not data.num_classes:
            dataset = dataclasses.replace(dataset, num_classes=None)
        source = open_source(dataset, data.train_split)
        if not data.num_classes:
            data.num_classes = source.num_classes
            chosen.append(f"{source.num_classes} classes")
        if not config.batch_size:
            size = max(len(source) // STEPS_PER_EPOCH, jax.device_count())
            config.batch_size = 2 ** min(size, LARGEST_BATCH).bit_length() // 2
            chosen.append(f"batches of {config.batch_size} of its {len(source):,} images")
    config.eval.batch_size = config.eval.batch_size or config.batch_size
    if chosen:
        logger.info("%s: %s", data.dir or data.name, ", ".join(chosen))


def build_dataset(config: ConfigDict) -> Dataset:
    """Returns which dataset to read."""
    return Dataset(
        kind=config.data.source,
        name=config.data.name,
        directory=config.data.dir,
        train_split=config.data.train_split,
        eval_split=config.data.eval_split,
        num_classes=config.data.num_classes,
        task=config.task,
        reduce_zero_label=config.data.reduce_zero_label,
    )


def build_augmentation(config: ConfigDict) -> Augmentation | SegmentationAugmentation:
    """Returns how training images are augmented on the host."""
    augment, size = config.augment, config.data.image_size
    if config.task == "segmentation":
        return SegmentationAugmentation(
            crop_size=size,
            scale=(LONG_SIDE * size, size),
            ratio_range=tuple(config.segmentation.ratio_range),
            cat_max_ratio=config.segmentation.cat_max_ratio,
            hflip=augment.hflip,
            photometric=config.segmentation.photometric,
        )
    return Augmentation(
        image_size=size,
        crop_scale=tuple(augment.crop_scale),
        crop_ratio=tuple(augment.crop_ratio),
        interpolation=augment.interpolation,
        hflip=augment.hflip,
        policy=augment.policy,
        color_jitter=augment.color_jitter,
    )


def build_preprocessing(config: ConfigDict) -> Preprocessing:
    """Returns how evaluation prepares its images; of segmentation `size` is the short side."""
    return Preprocessing(
        size=round(config.data.image_size * config.eval.scales[0]),
        crop_pct=config.eval.crop_pct,
        crop_mode=config.eval.crop_mode,
        interpolation="bicubic",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def build_evaluation(config: ConfigDict) -> Preprocessing | WholeImages:
    """Returns how evaluation prepares its images, and of segmentation their masks."""
    if config.task == "classification":
        return build_preprocessing(config)
    size = config.data.image_size
    return WholeImages(
        short_side=size,
        long_side=LONG_SIDE * size,
        scales=tuple(config.eval.scales),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def build_eval_options(config: ConfigDict) -> dict[str, Any]:
    """Returns further options of the task's step of evaluation."""
    if config.task == "classification":
        return {}
    return {"flip": config.eval.flip, "window": config.eval.window, "stride": config.eval.stride}


def build_loader_options(config: ConfigDict) -> LoaderOptions:
    """Returns the processes and threads that load images."""
    data = config.data
    return LoaderOptions(workers=data.workers, threads=data.threads, backend=data.backend)


def build_train_batches(
    config: ConfigDict, *, process_index: int = 0, process_count: int = 1, start_step: int = 0
) -> TrainBatches:
    """Returns the training batches of one process.

    Raises:
        UserError: see `TrainBatches`.
    """
    return TrainBatches(
        build_dataset(config),
        build_augmentation(config),
        batch_size=config.batch_size,
        seed=config.seed,
        repeats=config.augment.repeats,
        max_bad_fraction=config.augment.max_bad_fraction,
        loader=build_loader_options(config),
        process_index=process_index,
        process_count=process_count,
        start_step=start_step,
    )


def build_eval_batches(
    config: ConfigDict, *, process_index: int = 0, process_count: int = 1
) -> EvalBatches:
    """Returns the evaluation batches of one process.

    Raises:
        UserError: see `EvalBatches`.
    """
    return EvalBatches(
        build_dataset(config),
        build_evaluation(config),
        batch_size=config.eval.batch_size,
        loader=build_loader_options(config),
        process_index=process_index,
        process_count=process_count,
    )
