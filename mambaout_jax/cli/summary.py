"""Prints a network's layers with their parameters and multiply-accumulates."""

import argparse

SUMMARY = "Prints the layers of a variant with their parameters and multiply-accumulates."
EXAMPLE = "mambaout_tiny --size=288"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "name", nargs="?", metavar="MODEL", help="a variant, see: python -m mambaout_jax models"
    )
    parser.add_argument("--model", metavar="MODEL", help="the same, as in other commands")
    parser.add_argument(
        "--size", type=int, help="of a square image in pixels (default: the variant's)"
    )
    parser.add_argument(
        "--token-mixer", metavar="NAME", help="such as conv_ssm, or conv,conv,conv_ssm,conv_ssm"
    )
    parser.add_argument(
        "--kernel-size", type=int, metavar="K", help="of the depthwise convolutions"
    )
    parser.add_argument("--attention", metavar="NAME", help="of a ViT: full or causal")
    parser.add_argument("--classes", type=int, help="width of the logits (default: 1000)")
    parser.add_argument(
        "--depth",
        type=int,
        default=2,
        help="levels shown: 1 stages, 2 blocks, 3 layers (default: 2)",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the table."""
    from mambaout_jax.cli.table import format_table
    from mambaout_jax.errors import UserError
    from mambaout_jax.models.flops import count_layers
    from mambaout_jax.models.mambaout import create_model
    from mambaout_jax.models.pretrained import variant_preprocessing
    from mambaout_jax.models.vit import VITS

    name = args.model or args.name
    if not name or (args.name and args.name != name):
        raise UserError("expected one variant, such as: python -m mambaout_jax summary " + EXAMPLE)
    vit = name in VITS
    default_size = variant_preprocessing(name).shape[0]
    size = default_size if args.size is None else args.size
    for option, number, least in (
        ("--size", size, 1),
        ("--depth", args.depth, 0),
        ("--classes", args.classes or 0, 0),
    ):
        if number < least:
            raise UserError(f"{option} is {number}: expected at least {least}")
    options = {"image_size": size} if vit else {"depthwise": "xla"}
    chosen = {key: getattr(args, key) for key in ("token_mixer", "kernel_size", "attention")}
    options |= {key: value for key, value in chosen.items() if value is not None}
    model = create_model(name, num_classes=args.classes, **options)
    layers = count_layers(model, (size, size, 3))
    rows = [
        (
            "  " * (len(layer.path) - 1) + "/".join(layer.path[-1:]),
            layer.kind,
            "x".join(map(str, layer.shape)),
            f"{layer.params:,}",
            f"{layer.macs:,}",
        )
        for layer in layers
        if 0 < len(layer.path) <= args.depth and layer.kind != "Dropout"
    ]
    total = next(layer for layer in layers if not layer.path)
    rows.append((name, "", f"{size}x{size}x3 in", f"{total.params:,}", f"{total.macs:,}"))
    print(format_table(("layer", "kind", "output", "parameters", "MACs"), rows, left=2))
    return 0
