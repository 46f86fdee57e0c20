"""Evaluation: every picture of a split once, whatever the batch, the devices and the processes."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import metrics
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mambaout_jax.data.preprocess import normalize
from mambaout_jax.models.mambaout import MambaOut
from mambaout_jax.runtime.compilation import compiler_options
from mambaout_jax.runtime.sharding import (
    BATCH,
    global_batch,
    over_mesh,
)
from mambaout_jax.training.step import Batch, Recipe

logger = logging.getLogger(__name__)


class StoppedError(Exception):
    """An evaluation that was stopped before its end."""


@flax.struct.dataclass
class EvalMetrics(metrics.Collection):
    """Sums and counts of an evaluation, divided once at its end."""

    loss: metrics.Average.from_output("loss")  # type: ignore[valid-type]
    top1: metrics.Average.from_output("top1")  # type: ignore[valid-type]
    top5: metrics.Average.from_output("top5")  # type: ignore[valid-type]


def eval_step(
    params: Any,
    batch: Batch,
    *,
    model: MambaOut,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> EvalMetrics:
    """Returns the sums of one batch: "image" uint8 [N, H, W, 3], "label" [N], "mask" bool [N]."""
    images = normalize(batch["image"], mean, std)
    logits = jnp.asarray(model.apply({"params": params}, images))
    _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
    hits = best == batch["label"][:, None]
    return EvalMetrics.single_from_model_output(
        loss=optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]),
        top1=hits[:, 0].astype(jnp.float32),
        top5=hits.any(axis=1).astype(jnp.float32),
        mask=batch["mask"],
    )


def compile_eval_step(model: MambaOut, recipe: Recipe, shardings: Any, mesh: Mesh) -> Any:
    """Returns the jitted `eval_step` over the mesh; `shardings` are the parameters'."""
    return jax.jit(
        over_mesh(eval_step, mesh, model=model, mean=recipe.mean, std=recipe.std),
        in_shardings=(shardings, NamedSharding(mesh, BATCH)),
        out_shardings=NamedSharding(mesh, P()),
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )


def evaluate(
    eval_step: Callable[..., EvalMetrics],
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    stop_requested: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Returns "loss", "top1" and "top5" (in percent) and "examples" of a whole split.

    Args:
        eval_step: compiled over `mesh`.
        params: parameters on the mesh.
        batches: this process's part of each batch, padding masked.
        mesh: of the devices.
        stop_requested: called before each batch, the same number of times in every process.

    Raises:
        StoppedError: when a stop was requested.
    """
    total = EvalMetrics.empty()
    for batch in batches:
        if stop_requested():
            raise StoppedError
        total = total.merge(eval_step(params, global_batch(batch, mesh)))
    means = total.compute()
    return {
        "loss": float(means["loss"]),
        "top1": 100 * float(means["top1"]),
        "top5": 100 * float(means["top5"]),
        "examples": int(total.loss.count),
    }
