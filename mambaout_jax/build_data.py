"""Turns the data, augmentation and evaluation keys of a config into datasets and batches."""

from typing import Any

from ml_collections import ConfigDict

from mambaout_jax.data.augment import Augmentation
from mambaout_jax.data.loader import EvalBatches, LoaderOptions, TrainBatches
from mambaout_jax.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from mambaout_jax.data.segmentation.augment import SegmentationAugmentation
from mambaout_jax.data.segmentation.whole import WholeImages
from mambaout_jax.data.sources import Dataset

LONG_SIDE = 4  # of a whole image for segmentation, at most, in short sides: 2048 to 512


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
