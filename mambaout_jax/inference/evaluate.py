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
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mambaout_jax import config as configuration
from mambaout_jax.build import build_eval_batches, build_preprocessing, build_recipe
from mambaout_jax.data.preprocess import normalize
from mambaout_jax.errors import UserError
from mambaout_jax.files import write_json
from mambaout_jax.models.mambaout import MambaOut
from mambaout_jax.runtime.compilation import compiler_options
from mambaout_jax.runtime.sharding import (
    BATCH,
    check_batch,
    global_batch,
    make_mesh,
    over_mesh,
    state_shardings,
)
from mambaout_jax.training.step import Batch, Recipe
from mambaout_jax.weights.load import read_weights

logger = logging.getLogger(__name__)


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


def compile_eval_step(
    model: MambaOut, recipe: Recipe, shardings: Any, mesh: Mesh
) -> Callable[..., EvalMetrics]:
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
) -> dict[str, float]:
    """Returns "loss", "top1" and "top5" (in percent) and "examples" of a whole split.

    Args:
        eval_step: compiled over `mesh`.
        params: parameters on the mesh.
        batches: this process's part of each batch, padding masked.
        mesh: of the devices.
    """
    total = EvalMetrics.empty()
    for batch in batches:
        total = total.merge(eval_step(params, global_batch(batch, mesh)))
    means = total.compute()
    return {
        "loss": float(means["loss"]),
        "top1": 100 * float(means["top1"]),
        "top5": 100 * float(means["top5"]),
        "examples": int(total.loss.count),
    }


def evaluate_weights(config: ConfigDict, workdir: epath.Path) -> dict[str, Any]:
    """Evaluates `config.init_from`, or the best checkpoint of the workdir, on the held-out split.

    The result is logged and written to WORKDIR/eval.json.

    Raises:
        UserError: when the weights do not fit the configuration, or something of it is amiss.
    """
    configuration.check(config)
    mesh = make_mesh(config.mesh.fsdp)
    check_batch(config.eval.batch_size, 1, mesh, "eval.batch_size")
    batches = build_eval_batches(
        config, process_index=jax.process_index(), process_count=jax.process_count()
    )
    params, info = read_weights(config.init_from or workdir)
    for key, ours, theirs in (
        ("model.name", config.model.name, info.model),
        ("data.num_classes", config.data.num_classes, info.num_classes),
    ):
        if ours != theirs:
            raise UserError(f"config.{key} is {ours!r}, but the weights have {theirs!r}")
    preprocessing = build_preprocessing(config)
    if preprocessing != info.preprocessing:
        logger.warning("evaluating with %s; the weights' is %s", preprocessing, info.preprocessing)
    shardings = state_shardings(params, mesh)
    model = info.create_model(dtype=jnp.dtype(config.model.dtype))
    eval_step = compile_eval_step(model, build_recipe(config, 1), shardings, mesh)
    results = evaluate(eval_step, jax.device_put(params, shardings), batches, mesh)
    report = {
        "weights": str(config.init_from or workdir),
        "model": info.model,
        "data": f"{config.data.name}/{config.data.eval_split}",
        **results,
        "image_size": config.data.image_size,
        "crop_pct": config.eval.crop_pct,
        "crop_mode": config.eval.crop_mode,
        "dtype": config.model.dtype,
    }
    logger.info(
        "%s on %s: top-1 %.3f%%, top-5 %.3f%%, loss %.4f over %d pictures",
        *(report[key] for key in ("weights", "data", "top1", "top5", "loss", "examples")),
    )
    if jax.process_index() == 0:
        write_json(workdir / "eval.json", report)
    return report
