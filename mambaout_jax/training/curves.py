"""curves.png: loss and accuracy of a run."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mambaout_jax.files import write_file
from mambaout_jax.inference.evaluate import NAMES
from mambaout_jax.weights.info import SCORES


def draw_curves(rows: Sequence[Mapping[str, Any]], path: epath.Path, title: str = "") -> None:
    """Draws the losses and the result that decides which checkpoint is best against epochs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    # The name of the workdir may have bytes that are not UTF-8, or dollar signs.
    figure.suptitle(title.encode(errors="replace").decode(), parse_math=False)
    name = next(name for name in SCORES if name in rows[0])
    loss, accuracy = figure.subplots(1, 2)
    loss.plot(epochs, [row["train_loss"] for row in rows], label="training, on augmented images")
    if "eval_loss" in rows[0]:
        loss.plot(epochs, [row["eval_loss"] for row in rows], label="evaluation")
    loss.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    loss.legend()
    accuracy.plot(epochs, [row[name] for row in rows], color="tab:orange")
    best = max(reversed(rows), key=lambda row: row[name])
    accuracy.plot(best["epoch"], best[name], "o", color="tab:orange")
    accuracy.set(
        xlabel="epoch",
        ylabel=f"{NAMES[name]}, %",
        title=f"best {best[name]:.2f}% at epoch {best['epoch']:g}, last {rows[-1][name]:.2f}%",
    )
    for axes in (loss, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
        axes.grid(alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    write_file(path, png.getvalue())
