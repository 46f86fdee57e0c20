"""Evaluates checkpoints on ImageNet and on the test sets made for its classes."""

import argparse
import os
import sys

from mambaout_jax.cli.results import Row, add_output_arguments, check_outputs, write_rows
from mambaout_jax.cli.validate import THREADS, expand_weights
from mambaout_jax.cli.weights_arguments import add_checkpoints_arguments, add_network_arguments

SUMMARY = "Evaluates checkpoints on ImageNet, ImageNet-V2, -A, -R, -Sketch and ReaL."
EXAMPLE = "--model=mambaout_tiny --data=imagenet,v2,a,r,sketch,real --data-dir=/data/tfds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_checkpoints_arguments(parser, optional=True)
    parser.add_argument(
        "--data",
        default="imagenet,v2,a,r,sketch,real",
        metavar="NAMES",
        help="test sets, with commas (default: imagenet,v2,a,r,sketch,real)",
    )
    parser.add_argument(
        "--data-dir", default="", help="TFDS's folder with the datasets (default: $TFDS_DATA_DIR)"
    )
    add_output_arguments(parser)
    add_network_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Prints a table and writes the results; the status is 1 if a checkpoint could not be read."""
    from mambaout_jax.runtime.processes import joined

    with joined():
        return _evaluate_all(args)


def _evaluate_all(args: argparse.Namespace) -> int:
    """Evaluates each checkpoint on each test set; the first process prints and writes."""
    import jax

    from mambaout_jax.cli.table import format_table
    from mambaout_jax.errors import UserError
    from mambaout_jax.inference.benchmarks import find_benchmarks
    from mambaout_jax.runtime.processes import all_or_none, check_alike

    primary = jax.process_index() == 0
    with all_or_none():
        if primary:
            check_outputs(args)
        if args.batch_size < 1:
            raise UserError(f"--batch-size is {args.batch_size}: expected at least 1")
        if not args.weights and not args.model:
            raise UserError("no weights: expected NAME_OR_PATH, or --model=mambaout_tiny")
        checkpoints = expand_weights(args.weights or [args.model])
        benchmarks = find_benchmarks(args.data)
        sources = {name: each.open(args.data_dir) for name, each in benchmarks.items()}
    check_alike(data=args.data, checkpoints=str(checkpoints), batch_size=str(args.batch_size))
    rows: list[Row] = []
    for weights in checkpoints:
        try:
            for row in _evaluate(args, weights, benchmarks, sources):
                rows.append(row)
                if primary:
                    write_rows(args, rows)
        except UserError as error:
            if primary:
                print(f"error: {weights}: {error}", file=sys.stderr)
    if primary and rows:
        columns = ("model", "dataset", "examples", "top1", "top5")
        cells = [[str(row[column]) for column in columns] for row in rows]
        print(format_table(columns, cells, left=2))
    return 1 if len(rows) < len(checkpoints) * len(benchmarks) else 0


def _evaluate(args: argparse.Namespace, weights: str, benchmarks, sources):
    """Yields the row of one checkpoint on each test set, in the columns of timm's results."""
    import jax

    from mambaout_jax.data.loader import LoaderOptions
    from mambaout_jax.errors import UserError
    from mambaout_jax.inference.evaluate_weights import evaluate_weights
    from mambaout_jax.labels import IMAGENET_CLASSES
    from mambaout_jax.runtime.processes import all_or_none
    from mambaout_jax.weights.load import read_weights

    with all_or_none():
        params, info = read_weights(
            weights,
            model=args.model if args.weights else None,
            allow_non_finite=args.allow_non_finite,
        )
        info.check_task("classification", "use main.py --mode=eval with its config")
        if info.num_classes != IMAGENET_CLASSES:
            raise UserError(
                f"the weights have {info.num_classes} classes: expected ImageNet-1k's "
                f"{IMAGENET_CLASSES}"
            )
    height, width = info.preprocessing.shape
    for name, benchmark in benchmarks.items():
        results = evaluate_weights(
            params,
            info,
            sources[name],
            preprocessing=info.preprocessing,
            batch_size=args.batch_size,
            loader=LoaderOptions(workers=-1, threads=THREADS, backend="auto"),
            dtype=args.dtype,
            classes=benchmark.classes,
        ).results
        row: Row = {
            "dataset": name,
            "model": os.fspath(weights),
            "img_size": height if height == width else f"{height}x{width}",
        }
        for key in ("top1", "top5"):
            row |= {key: round(results[key], 3), f"{key}_err": round(100 - results[key], 3)}
        yield row | {
            "param_count": round(sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6, 2),
            "crop_pct": info.preprocessing.crop_pct,
            "interpolation": info.preprocessing.interpolation,
            "crop_mode": info.preprocessing.crop_mode,
            "examples": results["examples"],
        }
