"""Validation of checkpoints on labelled pictures, as timm's users know it, on one machine.

Training's own evaluation, over many processes, is `mambaout_jax.inference.evaluate`.
"""

import dataclasses
import fnmatch
import functools
import glob
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from mambaout_jax.data.sources import Source
from mambaout_jax.errors import UserError
from mambaout_jax.inference.ground_truth import Truth, read_subset
from mambaout_jax.inference.predictor import Predictor
from mambaout_jax.models.pretrained import list_pretrained
from mambaout_jax.weights.load import read_weights

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured of one checkpoint; accuracies and errors in percent."""

    weights: str
    model: str
    top1: float
    top1_err: float
    top5: float
    top5_err: float
    examples: int
    params: int
    size: str
    crop_pct: float
    crop_mode: str
    interpolation: str
    batch_size: int


def expand_weights(patterns: Iterable[str]) -> list[str]:
    """Returns the checkpoints that are meant: wildcards stand for files and for hub names.

    Raises:
        UserError: when a wildcard matches nothing.
    """
    found: list[str] = []
    for pattern in patterns:
        matches = [pattern]
        if glob.has_magic(pattern) and not os.path.exists(pattern):
            matches = sorted(glob.glob(os.path.expanduser(pattern)))
            matches = matches or fnmatch.filter(list_pretrained(), pattern)
        if not matches:
            raise UserError(f"no checkpoint and no name of the hub's matches {pattern!r}")
        found += [match for match in matches if match not in found]
    return found


def validate(
    weights: str,
    open_source: Callable[[int], Source],
    *,
    model: str | None = None,
    dtype: str = "float32",
    batch_size: int = 256,
    subset_file: Path | None = None,
    real: Sequence[Sequence[int]] | None = None,
) -> Result:
    """Measures one checkpoint, with its own preprocessing.

    Where memory does not suffice the batch size is halved, and the log says so.

    Args:
        weights: a name or path, as `mambaout_jax.read_weights` takes it.
        open_source: opens the pictures, given the number of the network's classes.
        model: the variant, where a file's weights do not tell it.
        dtype: of the computation.
        batch_size: pictures a step to begin with.
        subset_file: the only classes to choose from, see `read_subset`.
        real: see `read_real_labels`.

    Raises:
        UserError: when there are no such weights, the pictures do not belong to their classes, one
            cannot be decoded, or memory does not suffice for one picture a device.
    """
    params, info = read_weights(weights, model=model)
    source = open_source(info.num_classes)
    subset = None if subset_file is None else read_subset(subset_file, info.num_classes)
    truth = Truth(source, info.num_classes, subset, real)
    network = info.create_model(dtype=dtype)
    build = functools.partial(Predictor, network, params, info, classes=subset)
    top1, top5, examples, batch_size = _count(build, source, truth, batch_size)
    height, width = info.preprocessing.shape
    return Result(
        weights=weights,
        model=info.model,
        top1=100 * top1 / examples,
        top1_err=100 - 100 * top1 / examples,
        top5=100 * top5 / examples,
        top5_err=100 - 100 * top5 / examples,
        examples=examples,
        params=sum(leaf.size for leaf in jax.tree.leaves(params)),
        size=f"{height}x{width}",
        crop_pct=info.preprocessing.crop_pct,
        crop_mode=info.preprocessing.crop_mode,
        interpolation=info.preprocessing.interpolation,
        batch_size=batch_size,
    )


def _count(
    build: Callable[..., Predictor], source: Source, truth: Truth, batch_size: int
) -> tuple[int, int, int, int]:
    """Returns the hits at 1 and at 5, the pictures counted, and the batch size that fitted."""
    while True:
        predictor = build(batch_size=batch_size)
        try:
            hits = np.array(list(_hits(predictor, source, truth)), int).reshape(-1, 2)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            smaller = predictor.batch_size // 2
            if smaller < jax.local_device_count():
                raise UserError(
                    "memory does not suffice for one picture a device: use a smaller network"
                ) from error
            logger.warning(
                "memory does not suffice for %d pictures a step: trying %d",
                predictor.batch_size,
                smaller,
            )
            batch_size = smaller
            continue
        if not len(hits):
            raise UserError(f"no picture of {source.name} has a class to be measured by")
        return int(hits[:, 0].sum()), int(hits[:, 1].sum()), len(hits), predictor.batch_size


def _hits(predictor: Predictor, source: Source, truth: Truth) -> Iterator[tuple[bool, bool]]:
    """Yields, for each picture that counts, whether the best and one of the best five is right."""
    rights: list[set[int]] = []

    def pictures() -> Iterator[tuple[str, Callable[[], bytes]]]:
        for index in range(len(source)):
            record = source[index]
            right = truth(record["label"], record["name"])
            if right:
                rights.append(right)
                yield record["name"], functools.partial(bytes, record["image"])

    for number, (_, found) in enumerate(predictor.predict_encoded(pictures())):
        if isinstance(found, UserError):
            raise found
        right, best = rights[number], found[1].tolist()
        yield best[0] in right, not right.isdisjoint(best)
