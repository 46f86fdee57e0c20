"""Writes a network that runs with jax alone."""

import argparse

from mambaout_jax.cli.weights_arguments import add_weights_arguments, weights_options

SUMMARY = "Writes a trained network as one file that runs with jax alone, at any batch size."
EXAMPLE = "network.zip --weights=mambaout_tiny"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("output", metavar="FILE", help="the zip file to write")
    parser.add_argument(
        "--platforms",
        nargs="+",
        choices=("cpu", "cuda", "rocm", "tpu"),
        default=["cpu", "cuda", "tpu"],
        help="the platforms that the file runs on (default: cpu cuda tpu)",
    )
    add_weights_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Writes the file."""
    options = weights_options(args)
    from mambaout_jax.inference.export import export_model
    from mambaout_jax.weights.load import read_weights

    params, info = read_weights(**options)
    model = info.create_model(dtype=args.dtype)
    export_model(args.output, model, params, info, platforms=args.platforms)
    print(f"wrote {args.output} for {', '.join(args.platforms)}")
    return 0
