"""Writes a network that jax alone can run."""

import argparse

from mambaout_jax.cli.weights_arguments import WEIGHTS_HELP, add_network_arguments

SUMMARY = "Writes a trained network as one file that runs with jax alone, at any batch size."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("output", metavar="FILE", help="the zip file to write")
    parser.add_argument("--model", required=True, metavar="NAME_OR_PATH", help=WEIGHTS_HELP)
    parser.add_argument(
        "--platforms",
        nargs="+",
        choices=("cpu", "cuda", "rocm", "tpu"),
        default=["cpu", "cuda", "tpu"],
        help="that the file runs on (default: cpu cuda tpu)",
    )
    add_network_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Writes the file."""
    from mambaout_jax.inference.export import export_model
    from mambaout_jax.weights.load import read_weights

    params, info = read_weights(args.model, model=args.network)
    model = info.create_model(dtype=args.dtype)
    export_model(args.output, model, params, info, platforms=args.platforms)
    print(f"wrote {args.output} for {', '.join(args.platforms)}")
    return 0
