"""Compares the results of duel.py: a table with standard errors, and the curves."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

MEASURES = {"top1": "top-1 %", "eval_loss": "evaluation loss", "train_loss": "training loss"}
MOST_POINTS = 0.7  # that the mean top-1 of two sides may differ by

Result = dict[str, Any]
Group = tuple[str, str, str]  # side, dtype, fault


def read(output: Path) -> list[Result]:
    """Returns the results in a folder."""
    return [json.loads(path.read_text()) for path in sorted(output.glob("*.json"))]


def grouped(results: list[Result]) -> dict[Group, list[Result]]:
    """Returns the results of each kind of run; the sides without a fault come first."""
    groups: dict[Group, list[Result]] = {}
    for result in sorted(results, key=lambda r: (r["dtype"], r["fault"], r["side"], r["seed"])):
        groups.setdefault((result["side"], result["dtype"], result["fault"]), []).append(result)
    return groups


def finals(results: list[Result], measure: str) -> list[float]:
    """Returns the last value of a measure in each run."""
    return [result["rows"][-1][measure] for result in results]


def standard_error(one: list[float], other: list[float]) -> float:
    """Returns the standard error of the difference of two means; NaN where nothing shows it.

    A single run has the deviation of the other side's.
    """
    deviations = [statistics.stdev(values) for values in (one, other) if len(values) > 1]
    if not deviations:
        return math.nan
    if len(one) == 1 or len(other) == 1:
        return deviations[0] * math.sqrt(1 / len(one) + 1 / len(other))
    return math.sqrt(sum(d**2 / len(v) for d, v in zip(deviations, (one, other), strict=True)))


def compare(ours: list[Result], theirs: list[Result], faulty: bool) -> tuple[list[str], str]:
    """Returns the differences from the reference, one for each measure, and the verdict."""
    cells, beyond, too_far = [], [], False
    for measure, words in MEASURES.items():
        one, other = finals(ours, measure), finals(theirs, measure)
        difference = statistics.mean(one) - statistics.mean(other)
        error = standard_error(one, other)
        digits = 2 if measure == "top1" else 4
        cells.append(f"{difference:+.{digits}f} ± {error:.{digits}f}")
        if not abs(difference) < 2 * error:
            beyond.append(words)
        too_far |= measure == "top1" and not abs(difference) < MOST_POINTS
    if faulty:
        return cells, f"the fault shows in {', '.join(beyond)}" if beyond else "no fault shows"
    if beyond:
        return cells, f"differs in {', '.join(beyond)}"
    return cells, f"top-1 differs by over {MOST_POINTS}" if too_far else "the same"


def mean_and_error(values: list[float], digits: int) -> str:
    """Returns the mean, with its standard error where there is one."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"


def table(results: list[Result]) -> str:
    """Returns the comparison as Markdown."""
    groups = grouped(results)
    head = ["side", "dtype", "fault", "runs", *MEASURES.values(), "seconds a run", "device"]
    lines = [head, ["---"] * len(head)]
    for (side, dtype, fault), runs in groups.items():
        digits = {measure: 2 if measure == "top1" else 4 for measure in MEASURES}
        cells = [mean_and_error(finals(runs, measure), digits[measure]) for measure in MEASURES]
        seconds = f"{statistics.mean(run['seconds'] for run in runs):.0f}"
        devices = ", ".join(sorted({run["device"] for run in runs}))
        lines.append([side, dtype, fault or "none", str(len(runs)), *cells, seconds, devices])
    differences = [["compared", *MEASURES.values(), "verdict"], ["---"] * (len(MEASURES) + 2)]
    for (side, dtype, fault), runs in groups.items():
        theirs = groups.get(("timm", dtype, ""))
        if side == "ours" and theirs:
            cells, verdict = compare(runs, theirs, bool(fault))
            what = f"ours{f' with {fault}' if fault else ''} - timm, {dtype}"
            differences.append([what, *cells, verdict])
    return "\n\n".join(
        "\n".join(f"| {' | '.join(line)} |" for line in rows) for rows in (lines, differences)
    )


def draw(results: list[Result], path: Path) -> None:
    """Draws the curves of all runs, one colour a kind of run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.5), layout="constrained")
    axes = figure.subplots(1, len(MEASURES))
    for number, (group, runs) in enumerate(grouped(results).items()):
        for run in runs:
            for axis, measure in zip(axes, MEASURES, strict=True):
                label = " ".join(filter(None, group)) if run is runs[0] else None
                epochs = [row["epoch"] for row in run["rows"]]
                values = [row[measure] for row in run["rows"]]
                axis.plot(epochs, values, color=f"C{number}", alpha=0.7, lw=1.2, label=label)
    for axis, words in zip(axes, MEASURES.values(), strict=True):
        axis.set(xlabel="epoch", title=words)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def write(output: Path) -> str:
    """Writes table.md and curves.png of the results in a folder, and returns the table."""
    results = read(output)
    if not results:
        return f"no results in {output} yet"
    text = table(results)
    (output / "table.md").write_text(text + "\n")
    draw(results, output / "curves.png")
    return text
