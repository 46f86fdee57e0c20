"""The arguments that name weights and the way they are computed."""

import argparse

WEIGHTS_HELP = (
    "a name of the hub's (see: python -m mambaout_jax models), a .safetensors, .pth or .pt file, "
    "a converted checkpoint, or a run's working directory"
)


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --network and --dtype."""
    parser.add_argument(
        "--network",
        metavar="NAME",
        help="the variant of a file's weights, where their tensors do not tell it",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="type of the computation (default: float32)",
    )
