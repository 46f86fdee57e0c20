"""Classifies images, or predicts their masks."""

import argparse
import dataclasses
import json
import sys
from typing import Any

from mambaout_jax.cli.weights_arguments import add_weights_arguments, weights_options

SUMMARY = "Classifies images and folders of images, or predicts their masks."
EXAMPLE = "photo.jpg photos/ --weights=mambaout_tiny"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="an image, or a folder of images")
    parser.add_argument(
        "--top", type=int, default=5, help="number of classes for each image (default: 5)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--batch-size", type=int, default=64, help="images per step, on all devices (default: 64)"
    )
    parser.add_argument(
        "--masks",
        metavar="DIR",
        help="folder for the masks that a segmentation network predicts",
    )
    add_weights_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the classes of the images; returns 1 if an image could not be decoded."""
    from mambaout_jax.runtime.memory import memory_for

    options = weights_options(args)
    if args.masks:
        with memory_for(lambda reason: f"not enough memory for an image ({reason}): shrink it"):
            return _write_masks(args, options)
    with memory_for(
        lambda reason: (
            f"not enough memory for {args.batch_size} images a step ({reason}): try a smaller "
            "--batch-size"
        )
    ):
        return _print_classes(args, options)


def _print_classes(args: argparse.Namespace, options: dict[str, Any]) -> int:
    from tqdm import tqdm

    from mambaout_jax.inference.predictor import Predictor, find_images

    files = find_images(args.paths)
    predictor = Predictor.load(
        **options, dtype=args.dtype, batch_size=min(args.batch_size, len(files)), top=args.top
    )
    results = predictor.predict_files(files)
    # disable=None: no progress bar without a terminal.
    progress = tqdm(results, total=len(files), unit="image", disable=None, leave=False)
    failed = 0
    records = []
    for result in progress:
        if result.error:
            failed += 1
            tqdm.write(f"error: {result.error}", file=sys.stderr)
        if args.json:
            best = [dataclasses.asdict(guess) for guess in result.best]
            record = {"file": result.name, "predictions": best}
            records.append(record | ({"error": result.error} if result.error else {}))
        elif not result.error:
            lines = [f"  {guess.probability:7.2%}  {guess.label}" for guess in result.best]
            tqdm.write("\n".join([result.name, *lines]), file=sys.stdout)
    if args.json:  # in ASCII: a name that is not UTF-8 has escapes that Python reads back
        print(json.dumps(records, indent=2))
    return 1 if failed else 0


def _write_masks(args: argparse.Namespace, options: dict[str, Any]) -> int:
    """Writes each image's mask and overlay; returns 1 if an image could not be decoded."""
    from mambaout_jax.inference.mask_predictor import MaskPredictor
    from mambaout_jax.inference.predictor import find_images
    from mambaout_jax.weights.load import read_weights

    files = find_images(args.paths)
    predictor = MaskPredictor.from_weights(*read_weights(**options), dtype=args.dtype)
    failed = 0
    for prediction in predictor.predict_files(files):
        if prediction.error:
            failed += 1
            print(f"error: {prediction.error}", file=sys.stderr)
        else:
            print(*predictor.save(prediction, args.masks))
    return 1 if failed else 0
