r"""Converts weights between PyTorch and this project.

From PyTorch: a .pth, .pt or .safetensors file, of the paper's code or of timm, or a name of the
hub's, becomes a checkpoint that evaluation, fine-tuning and `load_pretrained` take.

    python tools/convert_torch_weights.py --model=mambaout_tiny \
        --input=mambaout_tiny.pth --output=DIR

To PyTorch: a checkpoint or a run's working directory becomes a file that timm loads.

    python tools/convert_torch_weights.py --to-torch --input=DIR --output=tiny.safetensors
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
from mambaout_jax.weights.load import convert, locate, read_weights
from mambaout_jax.weights.store import WeightsInfo, digest, save_weights
from mambaout_jax.weights.torch_file import check_absent, read_state_dict, write_state_dict
from mambaout_jax.weights.torch_layout import to_torch
from mambaout_jax.weights.verify import TOLERANCE, largest_difference


def from_torch_file(args: argparse.Namespace) -> None:
    """Converts a file of PyTorch's to a checkpoint."""
    check_absent(args.output)
    path, hub_name = locate(args.input)
    file = read_state_dict(path)
    model = args.model or hub_name
    params, info = convert(file.tensors, model, source=hub_name or path.name)
    print(f"input: {path}, {find_layout(file.tensors)} layout, {file.describe()}")
    print(f"model: {info.model}{'' if model else ' (told by the tensors)'}")
    report(params, info)
    if args.verify:
        verify(file.tensors, params, info)
    del file  # writing takes as much memory again
    save_weights(args.output, params, info)
    print(f"written: {args.output}")


def to_torch_file(args: argparse.Namespace) -> None:
    """Converts a checkpoint to a file of PyTorch's."""
    check_absent(args.output)
    params, info = read_weights(args.input, model=args.model)
    tensors = to_torch(params, info.create_model(), layout=args.layout)
    print(f"input: {args.input}, output in the {args.layout} layout")
    print(f"model: {info.model}")
    report(params, info)
    if args.verify:
        verify(tensors, params, info)
    write_state_dict(Path(args.output), tensors)
    print(f"written: {args.output}")


def report(params: Mapping[str, Any], info: WeightsInfo) -> None:
    """Prints what was mapped."""
    leaves = jax.tree.leaves(params)
    count = sum(leaf.size for leaf in leaves)
    print(f"mapped: {len(leaves)} tensors, {count:,} parameters, {info.num_classes:,} classes")
    print(f"digest: sha256 {digest(params)}")


def verify(tensors: Mapping[str, np.ndarray], params: Mapping[str, Any], info: WeightsInfo) -> None:
    """Prints the largest difference from timm's logits.

    Raises:
        UserError: when it is more than rounding explains.
    """
    difference, largest = largest_difference(tensors, params, info)
    height, width = info.preprocessing.shape
    print(
        f"verified: on a {height}x{width} picture the logits differ from timm's by "
        f"{difference:.2e} at most; the largest is {largest:.2f}"
    )
    if not difference <= TOLERANCE * max(1.0, largest):
        raise UserError("that is more than rounding explains: nothing was written")


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line and converts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", required=True, help="file, directory or a name of the hub's")
    parser.add_argument("--output", required=True, help="what to write; must not exist")
    parser.add_argument("--model", help="variant or hub name; told by the tensors where left out")
    parser.add_argument("--verify", action="store_true", help="compare the logits with timm's")
    parser.add_argument("--to-torch", action="store_true", help="write a .safetensors or .pth file")
    parser.add_argument(
        "--layout", choices=("timm", "original"), help="of what --to-torch writes; default timm"
    )
    args = parser.parse_args(argv)
    if not args.input or not args.output:
        parser.error("--input and --output each name a file or a directory, and one is empty")
    if args.layout and not args.to_torch:
        parser.error("--layout goes with --to-torch: the layout of an input is told by itself")
    args.layout = args.layout or "timm"
    jax.config.update("jax_platforms", "cpu")  # nothing here is worth an accelerator
    try:
        (to_torch_file if args.to_torch else from_torch_file)(args)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
