"""The tasks: what the data, the loss and the evaluation of a run depend on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from mambaout_jax.inference.evaluate import CLASSES, Measures
from mambaout_jax.inference.evaluate_masks import MASKS
from mambaout_jax.training import classification, segmentation
from mambaout_jax.training.recipe import Batch, Recipe


@dataclasses.dataclass(frozen=True)
class Task:
    """What a run learns. All functions are pure, and run on the devices.

    Attributes:
        augment: of a key, the step's number, a batch of the loader and the recipe: the inputs of
            the loss, among them "image", float32 [N, H, W, 3].
        loss: of the network's outputs in training, the inputs and the recipe: the mean loss.
        measures: of evaluation.
        dense: whether each pixel has a label, uint8 [N, H, W], and evaluation images are of several
            sizes; else each image has one, int32 [N].
    """

    augment: Callable[[jax.Array, jax.Array, Batch, Recipe], Batch]
    loss: Callable[[Any, Batch, Recipe], jax.Array]
    measures: Measures
    dense: bool = False


TASKS: dict[str, Task] = {
    "classification": Task(classification.augment, classification.loss, CLASSES),
    "segmentation": Task(segmentation.augment, segmentation.loss, MASKS, dense=True),
}
