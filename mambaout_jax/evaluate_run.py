"""`--mode=eval`: evaluates a workdir, or any weights, with the config of a run."""

import json
import logging
import math
from collections.abc import Collection
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from mambaout_jax import config as configuration
from mambaout_jax.bucket import absolute
from mambaout_jax.build_data import (
    build_dataset,
    build_eval_options,
    build_evaluation,
    build_loader_options,
    build_preprocessing,
    fill_in,
)
from mambaout_jax.data.sources import open_source
from mambaout_jax.errors import UserError
from mambaout_jax.files import write_json
from mambaout_jax.inference.evaluate import describe
from mambaout_jax.inference.evaluate_weights import evaluate_weights
from mambaout_jax.inference.segmentation import class_table, per_class
from mambaout_jax.models.mixers import DEFAULTS
from mambaout_jax.runtime.processes import all_or_none, check_alike
from mambaout_jax.runtime.sharding import check_batch, make_mesh
from mambaout_jax.runtime.workdir import RECORD, read_record
from mambaout_jax.training.task import TASKS
from mambaout_jax.weights.load import read_weights

logger = logging.getLogger(__name__)


def evaluate_workdir(
    config: ConfigDict, workdir: epath.Path, given: Collection[str] = ()
) -> dict[str, Any]:
    """Evaluates the best checkpoint of a run, or any weights, on the evaluation split.

    A workdir with a run is evaluated with the run's own config, but for the keys that the command
    line sets; if it sets `init_from`, those weights are evaluated, as they are in a workdir without
    a run. The result is logged and written to WORKDIR/eval.json.

    Args:
        config: of the command line.
        workdir: of a run, or a new one for the result.
        given: the keys that the command line sets.

    Raises:
        UserError: when the weights do not fit the config, or the config, the data or an image is
            wrong.
    """
    workdir = absolute(workdir)
    with all_or_none():
        if (workdir / RECORD).exists():
            configuration.overlay(config, read_record(workdir), given)
            if "init_from" not in given:
                config.init_from = ""  # the run began with those; now it has its own
        fill_in(config)
    check_alike(config=json.dumps(configuration.shared(config), sort_keys=True))
    configuration.check(config)
    weights = str(config.init_from or workdir)
    preprocessing = build_preprocessing(config)
    with all_or_none():
        check_batch(config.eval.batch_size, 1, make_mesh(), "eval.batch_size")
        params, info = read_weights(weights)
        mixers = DEFAULTS | info.overrides
        for key, ours, theirs in (
            ("model.name", config.model.name, info.model),
            ("model.token_mixer", config.model.token_mixer, mixers["token_mixer"]),
            ("model.kernel_size", config.model.kernel_size, mixers["kernel_size"]),
            ("segmentation.channels", config.segmentation.channels, mixers["channels"]),
            ("model.attention", config.model.attention, mixers["attention"]),
            ("data.num_classes", config.data.num_classes, info.num_classes),
        ):
            if ours != theirs:
                raise UserError(f"config.{key} is {ours!r}, but the weights have {theirs!r}")
        source = open_source(build_dataset(config), config.data.eval_split)
    if preprocessing != info.preprocessing:
        logger.warning("evaluating with %s; the weights' is %s", preprocessing, info.preprocessing)
    measures = TASKS[config.task].measures
    evaluation = evaluate_weights(
        params,
        info,
        source,
        preprocessing=build_evaluation(config),
        batch_size=config.eval.batch_size,
        loader=build_loader_options(config),
        dtype=config.model.dtype,
        measures=measures,
        options=build_eval_options(config),
    )
    results = evaluation.results
    report = {
        "weights": weights,
        "model": info.model,
        "data": source.name,
        **{name: results.get(name) for name in measures.columns.values()},
        "examples": results["examples"],
        "image_size": config.data.image_size,
        "crop_pct": config.eval.crop_pct,
        "crop_mode": config.eval.crop_mode,
        "dtype": config.model.dtype,
    }
    loss = f", loss {results['loss']:.4f}" if "loss" in results else ""
    logger.info(
        "%s on %s: %s%s over %d images",
        *(weights, source.name, describe(results, digits=3)),
        *(loss, results["examples"]),
    )
    if TASKS[config.task].dense:
        matrix, names = evaluation.sums["confusion"], source.class_names
        logger.info("\n%s", class_table(matrix, names))
        iou = per_class(matrix)[0].tolist()  # NaN: no pixels
        report["classes"] = {
            name: None if math.isnan(x) else x for name, x in zip(names, iou, strict=True)
        }
    if jax.process_index() == 0:
        write_json(workdir / "eval.json", report)
    return report
