"""Uploads weights to the Hugging Face hub."""

import argparse

from mambaout_jax.cli.weights_arguments import WEIGHTS_HELP

SUMMARY = "Uploads weights to the Hugging Face hub, with a model card; timm loads them too."
EXAMPLE = "runs/tiny user/mambaout-tiny-pets --private"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("weights", metavar="WEIGHTS", help=WEIGHTS_HELP)
    parser.add_argument("repository", metavar="OWNER/NAME", help="made if it does not exist")
    parser.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        help="whether a new repository is private (default: the owner's setting on the hub)",
    )
    parser.add_argument("--revision", metavar="BRANCH", help="made if missing (default: main)")


def run(args: argparse.Namespace) -> int:
    """Uploads; the token is huggingface_hub's, such as HF_TOKEN."""
    from mambaout_jax.push import push_to_hub

    url = push_to_hub(args.weights, args.repository, private=args.private, revision=args.revision)
    print(f"pushed {args.weights} to {url}")
    return 0
