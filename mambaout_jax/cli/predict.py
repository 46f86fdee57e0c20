"""Classifies pictures."""

import argparse
import dataclasses
import json
import sys

from mambaout_jax.cli.weights_arguments import WEIGHTS_HELP, add_network_arguments

SUMMARY = "Classifies pictures and folders of pictures."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a picture, or a folder of them")
    parser.add_argument("--model", required=True, metavar="NAME_OR_PATH", help=WEIGHTS_HELP)
    parser.add_argument("--top", type=int, default=5, help="classes told a picture (default: 5)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--batch-size", type=int, default=64, help="pictures a step, over all devices (default: 64)"
    )
    add_network_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Prints what the pictures show; the status is 1 where one could not be decoded."""
    from tqdm import tqdm

    from mambaout_jax.inference.predictor import Predictor, find_pictures

    files = find_pictures(args.paths)
    predictor = Predictor.load(
        args.model,
        model=args.network,
        dtype=args.dtype,
        batch_size=min(args.batch_size, len(files)),
        top=args.top,
    )
    results = predictor.predict_files(files)
    # Without a terminal there is no bar (disable=None).
    progress = tqdm(results, total=len(files), unit="picture", disable=None, leave=False)
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
    if args.json:
        print(json.dumps(records, indent=2, ensure_ascii=False))
    return 1 if failed else 0
