"""Evaluation of one checkpoint's weights by all processes, with a batch that fits into memory."""

import collections
import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mambaout_jax.data.loader import EvalBatches, LoaderOptions
from mambaout_jax.data.preprocess import Preprocessing
from mambaout_jax.data.segmentation.whole import WholeImages
from mambaout_jax.data.sources import Source
from mambaout_jax.errors import UserError
from mambaout_jax.inference.evaluate import (
    CLASSES,
    Measures,
    Sums,
    accumulate,
    compile_eval_step,
)
from mambaout_jax.models.mambaout import MambaOut
from mambaout_jax.runtime.memory import is_exhausted, memory_for
from mambaout_jax.runtime.processes import all_or_none, check_alike, gather
from mambaout_jax.runtime.sharding import make_mesh
from mambaout_jax.weights.store import WeightsInfo

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The evaluation of one checkpoint.

    Attributes:
        results: as `evaluate` returns them.
        sums: over all processes, of which the results were made.
        batch_size: images in a step of all devices, which fitted into memory.
    """

    results: dict[str, float]
    sums: Sums
    batch_size: int


def evaluate_weights(
    params: Mapping[str, Any],
    info: WeightsInfo,
    source: Source,
    *,
    preprocessing: Preprocessing | WholeImages,
    batch_size: int,
    loader: LoaderOptions,
    dtype: str = "float32",
    classes: Sequence[int] | None = None,
    measures: Measures = CLASSES,
    options: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Evaluates weights on the images of a source; all processes must call it alike.

    Each process evaluates its part of the images on its own devices. The sums are added at the
    end, and no process waits for another before. When memory is exhausted, all processes start
    again with half the batch size, and the log says so.

    Args:
        params: the weights.
        info: their description.
        source: the images. A label is a class of the weights, or a list as `eval_step` takes it.
        preprocessing: of the images.
        batch_size: images in a step of all devices; rounded up to a multiple of their number.
        loader: processes and threads that decode.
        dtype: of the computation.
        classes: see `eval_step`; None for other tasks than classification.
        measures: of the task.
        options: further ones of its step.

    Raises:
        UserError: the weights have no classes, the processes differ, an image cannot be decoded,
            no image has a right class, or memory is too small for one image per device.
    """
    if not info.num_classes:
        raise UserError("these weights have no classes to predict: expected weights with a head")
    check_alike(**{"number of images": str(len(source))})
    mesh = make_mesh(devices=jax.local_devices())
    model = info.create_model(dtype=jnp.dtype(dtype))
    subset = None if classes is None else tuple(classes)
    step_options = {"mean": preprocessing.mean, "std": preprocessing.std, **(options or {})}
    step_options |= {} if subset is None else {"classes": subset}
    step = _compiled_once(model, mesh, measures.step, tuple(step_options.items()))
    with all_or_none(), memory_for(lambda reason: f"not enough memory for the weights ({reason})"):
        placed = jax.block_until_ready(jax.device_put(params, NamedSharding(mesh, P())))
    devices = jax.device_count()
    batch_size = -(-batch_size // devices) * devices
    while True:
        batches = EvalBatches(
            source,
            preprocessing,
            batch_size=batch_size,
            loader=loader,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        sums = _sum_over_processes(step, placed, batches, mesh)
        if sums is not None:
            break
        batch_size = _smaller(batch_size, devices)
    if not sums.get("examples"):
        raise UserError(f"no image of {source.name} has a right class among those to evaluate")
    return Evaluation(measures.results(sums), sums, batch_size)


@functools.lru_cache(maxsize=1)  # checkpoints of the same network compile once
def _compiled_once(
    model: MambaOut,
    mesh: Mesh,
    step: Callable[..., dict[str, jax.Array]],
    options: tuple[tuple[str, Any], ...],
) -> Callable[..., dict[str, jax.Array]]:
    replicated = NamedSharding(mesh, P())
    return compile_eval_step(model, replicated, mesh, step=step, **dict(options))


def _sum_over_processes(
    step: Callable[..., dict[str, jax.Array]],
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
) -> Sums | None:
    """Returns the sums over all processes, or None if one of them ran out of memory."""
    sums: Sums | None = None
    with all_or_none():
        try:
            sums = accumulate(step, params, _counted(batches), mesh)
        except MemoryError:
            pass
        except jax.errors.JaxRuntimeError as error:
            if not is_exhausted(error):
                raise
    if jax.process_count() == 1:
        return sums
    total: Sums = collections.defaultdict(float)
    for part in map(json.loads, gather(json.dumps(sums, default=np.ndarray.tolist))):
        if part is None:
            return None
        for name, value in part.items():
            total[name] += np.asarray(value) if isinstance(value, list) else value
    return total


def _counted(batches: Iterable[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batches in which at least one image counts."""
    for batch in batches:
        valid = batch["label"].reshape(len(batch["mask"]), -1) >= 0
        if (batch["mask"] & valid.any(axis=1)).any():
            yield batch


def _smaller(batch_size: int, devices: int) -> int:
    """Returns the next batch size to try.

    Raises:
        UserError: there is none.
    """
    if batch_size == devices:
        raise UserError("not enough memory for one image per device: use a smaller network")
    smaller = -(-batch_size // (2 * devices)) * devices
    if jax.process_index() == 0:
        logger.warning("not enough memory for %d images a step: trying %d", batch_size, smaller)
    return smaller
