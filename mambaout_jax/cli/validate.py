"""Evaluates checkpoints on labelled images."""

import argparse
import fnmatch
import glob
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from mambaout_jax.cli.results import Row, add_output_arguments, check_outputs, write_rows
from mambaout_jax.cli.weights_arguments import (
    add_checkpoints_arguments,
    add_dataset_arguments,
    add_network_arguments,
)

SUMMARY = "Evaluates one or many checkpoints on labelled images."
EXAMPLE = "mambaout_tiny 'runs/*' --data-dir=/data/tfds"

THREADS = 4  # of each process that decodes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_checkpoints_arguments(parser)
    add_dataset_arguments(parser)
    parser.add_argument("--split", default="validation", help="default: validation")
    parser.add_argument(
        "--real", type=Path, metavar="real.json", help="use reassessed labels (ImageNet ReaL)"
    )
    parser.add_argument(
        "--subset", type=Path, metavar="FILE", help="class numbers or WordNet ids, one per line"
    )
    add_output_arguments(parser)
    add_network_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Prints and writes the results; the status is 1 if a checkpoint could not be evaluated."""
    from mambaout_jax.runtime.processes import joined

    with joined():
        return _evaluate_all(args)


def expand_weights(patterns: Iterable[str]) -> list[str]:
    """Returns the checkpoints: a wildcard matches files, or else names on the hub.

    Raises:
        UserError: a wildcard matches nothing.
    """
    from mambaout_jax.errors import UserError
    from mambaout_jax.models.pretrained import list_pretrained

    found: list[str] = []
    for pattern in patterns:
        matches = [pattern]
        if glob.has_magic(pattern) and not os.path.exists(pattern):
            matches = sorted(glob.glob(os.path.expanduser(pattern)))
            matches = matches or fnmatch.filter(list_pretrained(), pattern)
        if not matches:
            raise UserError(f"no checkpoint and no name on the hub matches {pattern!r}")
        found += [match for match in matches if match not in found]
    return found


def _evaluate_all(args: argparse.Namespace) -> int:
    """Evaluates each checkpoint; of several processes, the first one prints and writes."""
    import jax

    from mambaout_jax.errors import UserError
    from mambaout_jax.inference.ground_truth import read_real_labels
    from mambaout_jax.runtime.processes import all_or_none, check_alike

    primary = jax.process_index() == 0
    with all_or_none():
        if primary:
            check_outputs(args)
        if args.batch_size < 1:
            raise UserError(f"--batch-size is {args.batch_size}: expected at least 1")
        checkpoints = expand_weights(args.weights)
        real = read_real_labels(args.real) if args.real else None
    own = {"data_dir", "csv", "json"}  # each host may have its own
    options = {name: value for name, value in vars(args).items() if name not in own}
    check_alike(options=str(options), checkpoints=str(checkpoints))
    rows: list[Row] = []
    for weights in checkpoints:
        try:
            row = _evaluate(args, weights, real)
        except UserError as error:
            if primary:
                print(f"error: {weights}: {error}", file=sys.stderr)
            continue
        rows.append(row)
        if primary:
            write_rows(args, rows)
    return 1 if len(rows) < len(checkpoints) else 0


def _evaluate(args: argparse.Namespace, weights: str, real: Sequence[Sequence[int]] | None) -> Row:
    """Evaluates one checkpoint, prints its accuracy, and returns its row in timm's columns."""
    import jax

    from mambaout_jax.data.loader import LoaderOptions
    from mambaout_jax.inference.evaluate import describe
    from mambaout_jax.inference.evaluate_weights import evaluate_weights
    from mambaout_jax.inference.ground_truth import GroundTruthSource, read_subset
    from mambaout_jax.runtime.processes import all_or_none
    from mambaout_jax.weights.load import read_weights

    with all_or_none():
        params, info = read_weights(
            weights, model=args.model, allow_non_finite=args.allow_non_finite
        )
        info.check_task("classification", "use main.py --mode=eval with its config")
        subset = read_subset(args.subset, info.num_classes) if args.subset else None
        source = GroundTruthSource(_open(args), info.num_classes, subset, real)
    evaluation = evaluate_weights(
        params,
        info,
        source,
        preprocessing=info.preprocessing,
        batch_size=args.batch_size,
        loader=LoaderOptions(workers=-1, threads=THREADS, backend="auto"),
        dtype=args.dtype,
        classes=subset,
    )
    results = evaluation.results
    if jax.process_index() == 0:
        images = f"{results['examples']:,} images of {source.name}"
        print(f"{weights}: {describe(results, digits=3)} of {images}", flush=True)
    row: Row = {"weights": weights, "model": info.model}
    for key in ("top1", "top5"):
        accuracy = results.get(key)  # no top-5 of five classes or fewer
        row |= {key: accuracy, f"{key}_err": None if accuracy is None else 100 - accuracy}
    height, width = info.preprocessing.shape
    return row | {
        "examples": results["examples"],
        "params": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "size": f"{height}x{width}",
        "crop_pct": info.preprocessing.crop_pct,
        "crop_mode": info.preprocessing.crop_mode,
        "interpolation": info.preprocessing.interpolation,
        "batch_size": evaluation.batch_size,
    }


def _open(args: argparse.Namespace):
    """Opens the images."""
    from mambaout_jax.data.sources import Dataset, open_source

    folder = args.data == "folder"
    dataset = Dataset(
        kind="folder" if folder else "tfds",
        name="" if folder else args.data,
        directory=args.data_dir,
        train_split="train",
        eval_split=args.split,
        num_classes=None,  # compared with the weights by GroundTruthSource
    )
    return open_source(dataset, args.split)
