"""curves.png: loss and top-1 of a run."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mambaout_jax.files import write_file


def draw_curves(rows: Sequence[Mapping[str, Any]], path: epath.Path, title: str = "") -> None:
    """Draws loss and top-1 against epochs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    # The name of the workdir may have bytes that are not UTF-8, or dollar signs.
    figure.suptitle(title.encode(errors="replace").decode(), parse_math=False)
    loss, top1 = figure.subplots(1, 2)
    loss.plot(epochs, [row["train_loss"] for row in rows], label="training, on augmented images")
    loss.plot(epochs, [row["eval_loss"] for row in rows], label="evaluation")
    loss.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    loss.legend()
    top1.plot(epochs, [row["top1"] for row in rows], color="tab:orange")
    best = max(reversed(rows), key=lambda row: row["top1"])
    top1.plot(best["epoch"], best["top1"], "o", color="tab:orange")
    top1.set(
        xlabel="epoch",
        ylabel="top-1, %",
        title=f"best {best['top1']:.2f}% at epoch {best['epoch']:g}, last {rows[-1]['top1']:.2f}%",
    )
    for axes in (loss, top1):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
        axes.grid(alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    write_file(path, png.getvalue())
