"""Converts weights between PyTorch and this project.

From PyTorch: a .pth, .pt or .safetensors file in the paper's or timm's layout, or published weights
from the hub, become a checkpoint for evaluation, fine-tuning and `load_pretrained`. To PyTorch: a
checkpoint or a run's working directory becomes a file that timm loads.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax

from mambaout_jax.errors import UserError
from mambaout_jax.weights.identify import find_layout
from mambaout_jax.weights.info import WeightsInfo
from mambaout_jax.weights.integrity import digest
from mambaout_jax.weights.load import convert, locate, read_file, read_weights
from mambaout_jax.weights.output import check_absent
from mambaout_jax.weights.store import save_weights
from mambaout_jax.weights.torch_file import write_state_dict
from mambaout_jax.weights.torch_layout import to_torch
from mambaout_jax.weights.verify import TOLERANCE, largest_difference

EXAMPLES = """examples:
  python tools/convert_torch_weights.py --input=mambaout_tiny.pth --output=weights/tiny
  python tools/convert_torch_weights.py --to-torch --input=weights/tiny --output=tiny.safetensors"""


def from_torch_file(args: argparse.Namespace) -> None:
    """Converts a PyTorch file to a checkpoint."""
    check_absent(args.output)
    path, hub_name = locate(args.input)
    model = args.model or hub_name
    file = read_file(path, model)
    params, info = convert(
        file.tensors, model, hub_name or path.name, allow_non_finite=args.allow_non_finite
    )
    print(f"input: {path}, {find_layout(file.tensors)} layout, {file.describe()}")
    print(f"model: {info.model}{'' if model else ' (found by the tensors)'}")
    report(params, info)
    if args.verify:
        verify(file.tensors, params, info)
    del file  # writing needs as much memory again
    save_weights(args.output, params, info)
    print(f"written: {args.output}")


def to_torch_file(args: argparse.Namespace) -> None:
    """Converts a checkpoint to a PyTorch file."""
    check_absent(args.output)
    params, info = read_weights(
        args.input, model=args.model, allow_non_finite=args.allow_non_finite
    )
    tensors = to_torch(params, info.create_model(), layout=args.layout)
    print(f"input: {args.input}, output in the {args.layout} layout")
    print(f"model: {info.model}")
    report(params, info)
    if args.verify:
        verify(tensors, params, info)
    write_state_dict(Path(args.output), tensors)
    print(f"written: {args.output}")


def report(params: Mapping[str, Any], info: WeightsInfo) -> None:
    """Prints what was converted."""
    leaves = jax.tree.leaves(params)
    count = sum(leaf.size for leaf in leaves)
    print(f"mapped: {len(leaves)} tensors, {count:,} parameters, {info.num_classes:,} classes")
    print(f"digest: sha256 {digest(params)}")


def verify(tensors: Mapping[str, np.ndarray], params: Mapping[str, Any], info: WeightsInfo) -> None:
    """Prints the largest difference from timm's logits.

    Raises:
        UserError: it is larger than rounding errors.
    """
    difference, largest = largest_difference(tensors, params, info)
    height, width = info.preprocessing.shape
    print(
        f"verified: on a {height}x{width} image the logits differ from timm's by at most "
        f"{difference:.2e}; the largest is {largest:.2f}"
    )
    if not difference <= TOLERANCE * max(1.0, largest):
        raise UserError("the difference is larger than rounding errors: nothing was written")


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and converts."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", required=True, help="a file, a checkpoint or a name on the hub")
    parser.add_argument("--output", required=True, help="file or directory to write; must be new")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="the variant of a file's weights, or their name on the hub, which also selects the "
        "preprocessing (default: found by the tensors)",
    )
    parser.add_argument("--verify", action="store_true", help="compare the logits with timm's")
    parser.add_argument(
        "--allow-non-finite", action="store_true", help="accept weights with NaN or infinity"
    )
    parser.add_argument("--to-torch", action="store_true", help="write a .safetensors or .pth file")
    parser.add_argument(
        "--layout",
        choices=("timm", "original"),
        help="tensor names that --to-torch writes (default: timm)",
    )
    args = parser.parse_args(argv)
    if not args.input or not args.output:
        parser.error("--input and --output each name a file or a directory, and one is empty")
    if args.layout and not args.to_torch:
        parser.error("--layout is for --to-torch: the layout of an input is found by its tensors")
    args.layout = args.layout or "timm"
    jax.config.update("jax_platforms", "cpu")  # an accelerator would not be faster
    try:
        (to_torch_file if args.to_torch else from_torch_file)(args)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
