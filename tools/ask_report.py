"""The table and the images of ask.py's runs."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def grouped(results: Sequence[Result]) -> dict[tuple[str, int], list[Result]]:
    """Returns the runs of each network and image size."""
    groups: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        groups.setdefault((result["network"], result["size"]), []).append(result)
    return groups


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and its standard error; NaN for the error of one value."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def table(results: Sequence[Result]) -> str:
    """Returns the table in Markdown: one row for each network and image size."""
    lines = [
        "| network | image | runs | top-1 % | parameters | MACs | images/s | L | 6 D | L > 6 D |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (network, size), runs in grouped(results).items():
        mean, error = mean_and_error([run["top1"] for run in runs])
        speeds = [run["images_per_s"] for run in runs if run["images_per_s"] is not None]
        speed = f"{statistics.median(speeds):,.0f}" if speeds else "-"
        one = runs[0]
        limit = 6 * one["width"]
        accuracy = f"{mean:.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")
        lines.append(
            f"| {network} | {size} | {len(runs)} | {accuracy} | {one['params']:,} | "
            f"{one['macs']:,} | {speed} | {one['tokens']:,} | {limit:,} | "
            f"{'yes' if one['tokens'] > limit else 'no'} |"
        )
    return "\n".join(lines) + "\n"


def write(results: Sequence[Result], output: Path) -> None:
    """Writes the table and the images."""
    (output / "table.md").write_text(table(results))
    draw(results, "macs", "MACs for one image", output / "accuracy_over_macs.png")
    draw_attention(results, output / "full_against_causal.png")
    draw(results, "tokens", "tokens L", output / "accuracy_over_tokens.png")


def draw(results: Sequence[Result], measure: str, label: str, path: Path) -> None:
    """Draws top-1 with its standard error over a measure, one line for each network."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for (network, _), runs in grouped(results).items():
        mean, error = mean_and_error([run["top1"] for run in runs])
        lines.setdefault(network, []).append((runs[0][measure], mean, error))
    for network, points in lines.items():
        x, y, errors = zip(*sorted(points), strict=True)
        bars = [0 if math.isnan(error) else error for error in errors]
        axes.errorbar(x, y, yerr=bars, marker="o", capsize=3, label=network)
    axes.set_xscale("log")
    axes.set_xlabel(label)
    axes.set_ylabel("top-1 %")
    axes.legend()
    figure.savefig(path, dpi=120)


def draw_attention(results: Sequence[Result], path: Path) -> None:
    """Draws top-1 of ViTs with full and with causal attention, as the paper's Fig. 3(b).

    Draws nothing where one of the two is missing.
    """
    from matplotlib.figure import Figure

    groups = grouped(results)
    sizes = sorted(size for name, size in groups if name == "ViT-full")
    sizes = [size for size in sizes if ("ViT-causal", size) in groups]
    if not sizes:
        return
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for offset, attention in ((-0.2, "full"), (0.2, "causal")):
        tops = [[run["top1"] for run in groups[f"ViT-{attention}", size]] for size in sizes]
        means, errors = zip(*map(mean_and_error, tops), strict=True)
        bars = [0 if math.isnan(error) else error for error in errors]
        places = [index + offset for index in range(len(sizes))]
        axes.bar(places, means, 0.4, yerr=bars, capsize=3, label=f"{attention} attention")
    axes.set_xticks(range(len(sizes)), [f"{size} pixels" for size in sizes])
    axes.set_ylabel("top-1 %")
    axes.legend()
    figure.savefig(path, dpi=120)
