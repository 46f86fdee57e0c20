"""Arguments that several commands share: the weights, the model, its type and the dataset.

In every command `--weights` is what `read_weights` takes, and `--model` is the variant.
"""

import argparse
from typing import Any

from mambaout_jax.errors import UserError

WEIGHTS_HELP = (
    "a variant or a name (see: python -m mambaout_jax models), hf-hub:OWNER/NAME[@REVISION], a "
    ".safetensors, .pth or .pt file, a converted checkpoint, or a run's working directory"
)


def add_weights_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --weights, and the arguments of `add_network_arguments`."""
    parser.add_argument("--weights", metavar="NAME_OR_PATH", help=WEIGHTS_HELP)
    add_network_arguments(parser)


def add_checkpoints_arguments(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    """Adds the checkpoints to evaluate, of which `optional` allows none, and --batch-size."""
    default = " (default: the weights of --model)" if optional else ""
    parser.add_argument(
        "weights",
        nargs="*" if optional else "+",
        metavar="NAME_OR_PATH",
        help=f"{WEIGHTS_HELP}; wildcards match files, or else names on the hub{default}",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=256,
        help="images in a step; halved while memory is too small (default: 256)",
    )


def add_dataset_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --data and --data-dir."""
    parser.add_argument(
        "--data",
        default="imagenet2012",
        metavar="NAME",
        help="a TFDS dataset prepared as ArrayRecord (default: imagenet2012), or 'folder' for "
        "images at DATA_DIR/SPLIT/CLASS/",
    )
    parser.add_argument("--data-dir", default="", help="where the dataset is")


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --model, --allow-non-finite and --dtype."""
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="the variant of a file's weights, or their name on the hub, which also selects the "
        "preprocessing (default: found by the tensors)",
    )
    parser.add_argument(
        "--allow-non-finite", action="store_true", help="accept weights with NaN or infinity"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="type of the computation (default: float32)",
    )


def weights_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments for `read_weights`.

    Raises:
        UserError: --weights is missing.
    """
    if not args.weights:
        given = args.model or "mambaout_tiny"
        raise UserError(f"no weights: expected --weights=NAME_OR_PATH, such as --weights={given}")
    return {
        "name_or_path": args.weights,
        "model": args.model,
        "allow_non_finite": args.allow_non_finite,
    }
