"""Compares the FLOPs of a Transformer block and of Gated CNN blocks with each token mixer."""

import argparse

SUMMARY = "Counts the FLOPs of a Transformer block and of Gated CNN blocks of the same width."
EXAMPLE = "--width=384 --size 800 1280"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("--width", type=int, default=384, help="channels D (default: 384)")
    parser.add_argument("--size", type=int, nargs=2, default=(224, 224), metavar=("H", "W"),
                        help="of the image in pixels (default: 224 224)")  # fmt: skip
    parser.add_argument("--kernel-size", type=int, default=7, metavar="K",
                        help="of the depthwise convolutions (default: 7)")  # fmt: skip
    parser.add_argument(
        "--patch", type=int, default=16, help="side of a token in pixels (default: 16)"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the counts and the verdict of the paper's rule, L > 6 D."""
    from mambaout_jax.cli.table import format_table
    from mambaout_jax.errors import UserError
    from mambaout_jax.models.flops import attention_block_macs, count_total, long_sequence
    from mambaout_jax.models.mambaout import GatedCNNBlock
    from mambaout_jax.models.mixers import TOKEN_MIXERS, check_kernel_size

    check_kernel_size(args.kernel_size)
    height, width = (side // args.patch if args.patch > 0 else 0 for side in args.size)
    if min(height, width, args.width) < 1:
        raise UserError("expected a positive --width and a --size of at least one --patch")
    tokens, channels = height * width, args.width
    linear, quadratic = attention_block_macs(channels, tokens)
    rows = [
        ("Transformer: projections and MLP, 24 D² L", f"{2 * linear:,}"),
        ("Transformer: attention's products, 4 D L²", f"{2 * quadratic:,}"),
        ("Transformer block, full or causal", f"{2 * (linear + quadratic):,}"),
    ]
    for mixer in TOKEN_MIXERS:
        block = GatedCNNBlock(depthwise="xla", token_mixer=mixer, kernel_size=args.kernel_size)
        macs = count_total(block, (height, width, channels)).macs
        name = f"{mixer} (MambaOut)" if mixer == "conv" else mixer
        rows.append((f"Gated CNN block, {name}", f"{2 * macs:,}"))
    print(f"width D = {channels:,}, {height} x {width} tokens, L = {tokens:,}\n")
    print(format_table(("", "FLOPs"), rows))
    limit = long_sequence(channels)
    verdict = "a long sequence" if tokens > limit else "not a long sequence"
    print(
        f"\nquadratic / linear = L / 6D = {quadratic / linear:.3f}; "
        f"L = {tokens:,} {'>' if tokens > limit else '<='} 6D = {limit:,}: {verdict}"
    )
    return 0
