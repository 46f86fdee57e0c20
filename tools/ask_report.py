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
    draw_macs(results, output / "accuracy_over_macs.png")
    draw_attention(results, output / "full_against_causal.png")
    draw_tokens(results, output / "accuracy_over_tokens.png")


def _axes(results: Sequence[Result], width: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4), layout="constrained")
    axes = figure.subplots()
    counts = sorted({len(runs) for runs in grouped(results).values()})
    seeds = " or ".join(map(str, counts))
    spread = "mean and standard error of" if counts[-1] > 1 else "top-1 of"
    axes.set_title(f"{spread} {seeds} seed{'s' if counts[-1] > 1 else ''}", fontsize="medium")
    axes.set_ylabel("top-1 %")
    return figure, axes


def _style(network: str, index: int) -> dict[str, Any]:
    """Returns the look of a network's line; ViTs are dashed, of one colour in all images."""
    if network in _VIT_COLOURS:
        return {"color": _VIT_COLOURS[network], "marker": "s", "linestyle": "--"}
    return {"color": _COLOURS[index % len(_COLOURS)], "marker": "o"}


_VIT_COLOURS = {"ViT-full": "tab:red", "ViT-causal": "tab:purple"}
_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")


def _draw_lines(
    axes: Any, results: Sequence[Result], measure: str, spread: float = 1.0
) -> dict[str, list[tuple[int, float, float]]]:
    """Draws top-1 over a measure, a line for each network.

    Lines are moved apart by the factor `spread` on the measure. Returns (size, x, y) of the points.
    """
    points: dict[str, list[tuple[int, float, float, float]]] = {}
    for (network, size), runs in grouped(results).items():
        mean, error = mean_and_error([run["top1"] for run in runs])
        error = 0 if math.isnan(error) else error
        points.setdefault(network, []).append((size, runs[0][measure], mean, error))
    for index, (network, line) in enumerate(points.items()):
        factor = spread ** (index - (len(points) - 1) / 2)
        points[network] = [(size, x * factor, y, e) for size, x, y, e in sorted(line)]
        _, x, y, errors = zip(*points[network], strict=True)
        axes.errorbar(x, y, yerr=errors, capsize=3, label=network, **_style(network, index))
    axes.set_xscale("log")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return {network: [point[:3] for point in line] for network, line in points.items()}


def draw_macs(results: Sequence[Result], path: Path) -> None:
    """Draws top-1 with its standard error over the MACs (Fig. 1b's form)."""
    from matplotlib.ticker import EngFormatter, NullFormatter

    figure, axes = _axes(results, 7)
    for index, (network, line) in enumerate(_draw_lines(axes, results, "macs").items()):
        place = {"xytext": (-4, 5), "ha": "right"} if index % 2 else {"xytext": (6, -10)}
        for size, x, y in line:
            axes.annotate(
                f"{size} px", (x, y), **place, textcoords="offset points", fontsize="x-small",
                color=_style(network, index)["color"],
            )  # fmt: skip
    axes.margins(x=0.1)
    axes.set_xlabel("MACs for one image")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    figure.savefig(path, dpi=120)


def draw_tokens(results: Sequence[Result], path: Path) -> None:
    """Draws top-1 with its standard error over the tokens L, and where L = 6 D if that is near."""
    from matplotlib.ticker import NullLocator

    figure, axes = _axes(results, 7)
    _draw_lines(axes, results, "tokens", spread=1.02)
    sizes = {run["tokens"]: run["size"] for run in results}
    labels = [f"{tokens:,}\n{size} px" for tokens, size in sizes.items()]
    axes.set_xticks(list(sizes), labels)
    axes.xaxis.set_minor_locator(NullLocator())
    for limit in sorted({6 * run["width"] for run in results}):
        if limit <= max(sizes):
            axes.axvline(limit, color="grey", linestyle=":")
            axes.annotate(f"L = 6 D, D = {limit // 6}", (limit, 0.02), (3, 0), rotation=90,
                          xycoords=("data", "axes fraction"), textcoords="offset points",
                          fontsize="x-small")  # fmt: skip
    axes.set_xlabel("tokens L (networks side by side at each L)")
    figure.savefig(path, dpi=120)


def draw_attention(results: Sequence[Result], path: Path) -> None:
    """Draws top-1 of ViTs with full and with causal attention, as the paper's Fig. 3(b).

    Draws nothing where one of the two is missing.
    """
    groups = grouped(results)
    sizes = sorted(size for name, size in groups if name == "ViT-full")
    sizes = [size for size in sizes if ("ViT-causal", size) in groups]
    if not sizes:
        return
    drawn = [run for run in results if run["network"] in _VIT_COLOURS and run["size"] in sizes]
    figure, axes = _axes(drawn, 5)
    for offset, attention in ((-0.2, "full"), (0.2, "causal")):
        name = f"ViT-{attention}"
        tops = [mean_and_error([run["top1"] for run in groups[name, size]]) for size in sizes]
        means = [mean for mean, _ in tops]
        errors = [0 if math.isnan(error) else error for _, error in tops]
        places = [index + offset for index in range(len(sizes))]
        bars = axes.bar(
            places, means, 0.38, yerr=errors, capsize=3, color=_VIT_COLOURS[name], alpha=0.8,
            label=f"{attention} attention",
        )  # fmt: skip
        labels = [
            f"{mean:.1f}" + (f" ± {error:.1f}" if error else "")
            for mean, error in zip(means, errors, strict=True)
        ]
        axes.bar_label(bars, labels, padding=2, fontsize="small")
    axes.set_xticks(range(len(sizes)), [f"{size} px" for size in sizes])
    axes.margins(y=0.12)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False)
    figure.savefig(path, dpi=120)
