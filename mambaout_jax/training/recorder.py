"""What a run leaves to look at: metrics.csv, curves.png, TensorBoard events; wandb if asked."""

import csv
import io
import os
import time
import uuid
from typing import Any

from etils import epath

from mambaout_jax.errors import UserError
from mambaout_jax.files import write_file, writing

COLUMNS = ("step", "epoch", "learning_rate", "train_loss", "eval_loss", "top1", "top5")


class Recorder:
    """Writes a run's metrics into its workdir; top-1 and top-5 are in percent.

    Rows after `start_step` are dropped from a metrics.csv that is there already: they are of a run
    that was stopped after its last checkpoint, and will come again. Of several processes, one is
    `enabled`; the others write nothing.
    """

    def __init__(
        self,
        workdir: epath.Path,
        start_step: int = 0,
        wandb_project: str = "",
        enabled: bool = True,
    ):
        self.enabled, self.wandb = enabled, None
        if not enabled:
            return
        self.workdir = workdir
        self.path = workdir / "metrics.csv"
        self.rows = [row for row in read_rows(self.path) if row["step"] <= start_step]
        self.events = open_events(workdir / "tensorboard", start_step)
        if wandb_project:
            try:
                import wandb
            except ImportError as error:
                raise UserError(
                    "config.log.wandb_project asks for wandb, which is not installed: "
                    "pip install 'mambaout_jax[wandb]', or leave the key empty"
                ) from error

            run = uuid.uuid5(uuid.NAMESPACE_URL, str(workdir.resolve())).hex
            self.wandb = wandb.init(
                project=wandb_project, dir=os.fspath(workdir), id=run, resume="allow"
            )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes scalars of a step, as events only."""
        if not self.enabled:
            return
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        # What is not a number, as the loss before the first is read, is left out.
        scalars = [Summary.Value(tag=name, simple_value=x) for name, x in values.items() if x == x]
        summary = Summary(value=scalars)
        with writing(self.workdir):
            self.events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        if self.wandb:
            self.wandb.log(values, step=step)

    def row(self, values: dict[str, float]) -> None:
        """Writes a row of all `COLUMNS`, and draws the curves anew."""
        if not self.enabled:
            return
        self.rows.append({column: values[column] for column in COLUMNS})
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_file(self.path, text.getvalue())
        names = {"eval_loss": "eval/loss", "top1": "eval/top1", "top5": "eval/top5"}
        self.scalars(int(values["step"]), {names[key]: values[key] for key in names})
        draw_curves(self.rows, self.workdir / "curves.png")

    def flush(self) -> None:
        """Writes the events out: to be called before a checkpoint, which later rows follow."""
        if self.enabled:
            with writing(self.workdir):
                self.events.flush()

    def close(self) -> None:
        """Writes the events out, and ends them."""
        if not self.enabled:
            return
        with writing(self.workdir):
            self.events.close()
        if self.wandb:
            self.wandb.finish()


def read_rows(path: epath.Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.csv, none where there is no such file."""
    if not path.exists():
        return []
    return [
        {key: int(value) if key == "step" else float(value) for key, value in row.items()}
        for row in csv.DictReader(path.read_text().splitlines())
    ]


def open_events(folder: epath.Path, start_step: int) -> Any:
    """Returns the writer of a new event file, which replaces what older ones say of later steps."""
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    # Written as they come, not by the thread of a SummaryWriter: where that fails, on a full disk,
    # nobody learns of it, and the run waits for it forever.
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        events = EventsWriter(str(folder / "events"), filename_suffix=f".{os.getpid()}")
        log = SessionLog(status=SessionLog.START)
        events.write_event(Event(wall_time=time.time(), step=start_step + 1, session_log=log))
    return events


def draw_curves(rows: list[dict[str, Any]], path: epath.Path) -> None:
    """Draws loss and top-1 against epochs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, top1 = figure.subplots(1, 2)
    loss.plot(epochs, [row["train_loss"] for row in rows], label="training")
    loss.plot(epochs, [row["eval_loss"] for row in rows], label="evaluation")
    loss.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    loss.legend()
    top1.plot(epochs, [row["top1"] for row in rows], color="tab:orange")
    best = max(rows, key=lambda row: row["top1"])
    top1.set(xlabel="epoch", ylabel="top-1, %", title=f"best {best['top1']:.2f}%")
    for axes in (loss, top1):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    write_file(path, png.getvalue())
