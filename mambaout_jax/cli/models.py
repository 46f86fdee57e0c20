"""Lists the variants and the published weights."""

import argparse
import functools
import json
from typing import Any

SUMMARY = "Lists the variants, their sizes and accuracies, and the published weights."
EXAMPLE = "--json"

_IMAGE_SIZE = 224  # pixels, for the multiply-accumulates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    """Prints a table of variants and one of weights."""
    from mambaout_jax.cli.table import format_table
    from mambaout_jax.models.pretrained import EMBEDDED, PRETRAINED

    variants = _variants()
    weights: list[dict[str, Any]] = [
        {
            "weights": name,
            "size": entry.preprocessing.size,
            "classes": entry.num_classes,
            "top1": entry.top1,
        }
        for name, entry in PRETRAINED.items()
    ]
    if args.json:
        print(json.dumps({"variants": variants, "weights": weights}, indent=2))
        return 0

    def accuracy(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    header = ("model", "parameters", f"MACs at {_IMAGE_SIZE}", "top-1 at 224", "at 288")
    rows = [
        (
            row["model"],
            f"{row['params']:,}",
            f"{row['macs'] / 1e9:.2f} G",
            accuracy(row["top1_224"]),
            accuracy(row["top1_288"]),
        )
        for row in variants
    ]
    print(format_table(header, rows))
    print("\nTop-1 in percent on ImageNet-1k, as published. Weights by name:\n")
    named = [
        (w["weights"], str(w["size"]), f"{w['classes']:,}", accuracy(w["top1"])) for w in weights
    ]
    print(format_table(("weights", "pixels", "classes", "top-1"), named))
    print(f"\n{EMBEDDED} ships with the package: it was trained on handwritten digits.")
    return 0


@functools.cache
def _variants() -> list[dict[str, Any]]:
    from mambaout_jax.models.flops import count_total
    from mambaout_jax.models.mambaout import create_model
    from mambaout_jax.models.variants import VARIANTS

    rows = []
    for name, variant in VARIANTS.items():
        # The plain convolution is the fastest to trace, and has the same count.
        total = count_total(create_model(name, depthwise="xla"), (_IMAGE_SIZE, _IMAGE_SIZE, 3))
        rows.append(
            {
                "model": name,
                "params": total.params,
                "macs": total.macs,
                "top1_224": variant.top1_224,
                "top1_288": variant.top1_288,
            }
        )
    return rows
