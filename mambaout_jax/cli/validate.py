"""Measures checkpoints on labelled pictures."""

import argparse
import os
import sys
from pathlib import Path

from mambaout_jax.cli.weights_arguments import WEIGHTS_HELP, add_network_arguments

SUMMARY = "Measures the accuracy of one or many checkpoints on labelled pictures."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "weights",
        nargs="+",
        metavar="NAME_OR_PATH",
        help=f"{WEIGHTS_HELP}; wildcards match files, else names of the hub's",
    )
    parser.add_argument(
        "--data",
        default="imagenet2012",
        metavar="NAME",
        help="a TFDS data set prepared as ArrayRecord (default: imagenet2012), or 'folder' for "
        "pictures at DATA_DIR/SPLIT/CLASS/",
    )
    parser.add_argument("--data-dir", default="", help="where the data lies")
    parser.add_argument("--split", default="validation", help="default: validation")
    parser.add_argument("--real", type=Path, metavar="real.json", help="measure by real labels")
    parser.add_argument(
        "--subset", type=Path, metavar="FILE", help="class numbers or WordNet ids, one a line"
    )
    parser.add_argument("--batch-size", type=int, default=256, help="to begin with (default: 256)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the results here as CSV")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here as JSON")
    add_network_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Prints and writes the results; the status is 1 where a checkpoint could not be measured."""
    from mambaout_jax.errors import UserError
    from mambaout_jax.inference.ground_truth import read_real_labels
    from mambaout_jax.inference.validate import Result, expand_weights, validate

    for path in filter(None, (args.csv, args.json)):
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise UserError(f"cannot write {path}: expected a file in a folder that can be written")
    real = read_real_labels(args.real) if args.real else None
    results: list[Result] = []
    failed = 0
    for weights in expand_weights(args.weights):
        try:
            result = validate(
                weights,
                lambda num_classes: _open(args, num_classes),
                model=args.network,
                dtype=args.dtype,
                batch_size=args.batch_size,
                subset_file=args.subset,
                real=real,
            )
        except UserError as error:
            failed += 1
            print(f"error: {weights}: {error}", file=sys.stderr)
            continue
        results.append(result)
        print(
            f"{weights}: top-1 {result.top1:.3f}%, top-5 {result.top5:.3f}% "
            f"of {result.examples:,} pictures",
            flush=True,
        )
        _write(args, results)
    return 1 if failed else 0


def _open(args: argparse.Namespace, num_classes: int):
    """Opens the images."""
    from mambaout_jax.data.sources import Dataset, FolderSource, open_source

    if args.data == "folder":
        return FolderSource(args.data_dir, args.split, reference_split="train")
    dataset = Dataset(
        kind="tfds",
        name=args.data,
        directory=args.data_dir,
        train_split="train",
        eval_split=args.split,
        num_classes=num_classes,
    )
    return open_source(dataset, args.split)


def _write(args: argparse.Namespace, results: list) -> None:
    """Writes what was measured so far, so that a long list may be broken off."""
    import csv
    import dataclasses
    import json

    from mambaout_jax.errors import UserError

    rows = [dataclasses.asdict(result) for result in results]
    try:
        if args.csv:
            with args.csv.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
        if args.json:
            args.json.write_text(json.dumps(rows, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}") from None
