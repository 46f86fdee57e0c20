"""Records metrics: metrics.csv, curves.png, TensorBoard events, and optionally wandb."""

import contextlib
import csv
import functools
import io
import logging
import math
import os
import re
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from PIL import Image

from mambaout_jax.bucket import is_bucket
from mambaout_jax.errors import AccessError, StorageError, UserError
from mambaout_jax.files import flush, read_bytes, read_text, write_file, writing
from mambaout_jax.inference.evaluate import CLASSES
from mambaout_jax.runtime.storage import reading
from mambaout_jax.training.curves import draw_curves
from mambaout_jax.training.events import open_events

logger = logging.getLogger(__name__)

POSITION_COLUMNS = ("step", "epoch", "learning_rate", "train_loss")
COLUMNS = (*POSITION_COLUMNS, *CLASSES.columns)
METRICS, CURVES, MASKS = "metrics.csv", "curves.png", "masks.png"

Row = dict[str, Any]


class Recorder:
    """Writes a run's metrics into its workdir; top-1 and top-5 are in percent.

    Of several processes, one is `enabled`; the others write nothing.
    """

    def __init__(
        self,
        workdir: epath.Path,
        start_step: int = 0,
        rows: Sequence[Row] = (),
        *,
        title: str = "",
        measures: Mapping[str, str] = CLASSES.columns,
        wandb_project: str = "",
        enabled: bool = True,
    ):
        """Continues from a step; metrics.csv is written again with the next row.

        Args:
            workdir: of the run.
            start_step: steps done before.
            rows: of the evaluations before.
            title: of the curves: the run, the model and the data.
            measures: the columns of the task, each with the name of its result.
            wandb_project: of Weights & Biases; "": none.
            enabled: whether to write at all.

        Raises:
            UserError: when wandb is asked for and not installed.
        """
        self.enabled, self.rows = enabled, list(rows)
        self.measures = measures
        self.workdir, self.start_step, self.title = workdir, start_step, title
        self.events: Any = None
        self.wandb = start_wandb(workdir, wandb_project) if enabled and wandb_project else None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes scalars of a step as events; those that are NaN are left out."""
        if not self.enabled:
            return
        values = {name: value for name, value in values.items() if not math.isnan(value)}
        self._event(step, [{"tag": name, "simple_value": x} for name, x in values.items()])
        if self.wandb:
            self.wandb.log(values, step=step)

    def row(self, values: Row) -> None:
        """Adds a row of all columns, and draws the curves again."""
        columns = (*POSITION_COLUMNS, *self.measures)
        self.rows.append({column: values[column] for column in columns})
        if not self.enabled:
            return
        write_rows(self.rows, self.workdir / METRICS, columns)
        scalars = {f"eval/{name}": values[column] for column, name in self.measures.items()}
        self.scalars(int(values["step"]), scalars)
        draw_curves(self.rows, self.workdir / CURVES, self.title)

    def picture(self, step: int, name: str, png: bytes) -> None:
        """Writes a picture of a step: a PNG file in the workdir, and an event."""
        if not self.enabled:
            return
        write_file(self.workdir / name, png)
        width, height = Image.open(io.BytesIO(png)).size
        image = {"width": width, "height": height, "colorspace": 3, "encoded_image_string": png}
        self._event(step, [{"tag": f"eval/{Path(name).stem}", "image": image}])

    def _event(self, step: int, values: Sequence[dict[str, Any]]) -> None:
        """Writes one event; each value is the fields of a `Summary.Value`."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        with writing(self.workdir / "tensorboard"):
            if self.events is None:
                self.events = open_events(self.workdir / "tensorboard", self.start_step)
            summary = Summary(value=[Summary.Value(**value) for value in values])
            self.events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
        if not is_bucket(self.workdir):  # before the buffer is full: this is tried again
            self.flush()

    def flush(self) -> None:
        """Writes the events out: to be called before a checkpoint is saved."""
        if self.events:
            flush(self.events, self.workdir / "tensorboard")

    def close(self) -> None:
        """Writes the events out, and closes the files."""
        if self.events:
            with writing(self.workdir / "tensorboard"):
                self.events.close()
        if self.wandb:
            self.wandb.finish()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        """Closes; but after an error of storage, which further attempts would hide and delay."""
        if error is None:
            self.close()
        elif not isinstance(error, StorageError | AccessError):
            with contextlib.suppress(UserError):
                self.close()


def import_in_background() -> None:
    """Imports the modules of the first log line and the first curves, in a thread.

    This takes seconds if PyTorch is installed, because tensorboardX imports it. Python waits for
    the thread at its end: an import that is cut off can crash it. One that fails, as on a host
    whose memory is full, fails again where the module is used.
    """

    def imports() -> None:
        with contextlib.suppress(ImportError, MemoryError):
            import matplotlib.figure  # noqa: F401
            import tensorboardX.event_file_writer  # noqa: F401

    threading.Thread(target=imports, name="imports").start()


def write_rows(rows: Sequence[Row], path: epath.Path, columns: Sequence[str]) -> None:
    """Writes a metrics.csv.

    Raises:
        StorageError: when storage fails for a while.
        UserError: when it cannot be written.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue())


def repair(
    workdir: epath.Path, rows: Sequence[Row], title: str, columns: Sequence[str] = COLUMNS
) -> None:
    """Writes metrics.csv and curves.png of a finished run again where they are not whole.

    Args:
        workdir: of the run.
        rows: of the last checkpoint.
        title: of the curves.
        columns: of metrics.csv.
    """
    try:
        # As text, for NaN does not equal itself.
        whole = repr(typed(rows, columns)) == repr(read_rows(workdir / METRICS, columns))
    except (StorageError, AccessError):
        raise
    except UserError:
        whole = False
    if rows and not (whole and (workdir / CURVES).exists()):
        logger.warning("%s or %s is not whole: writing both again", workdir / METRICS, CURVES)
        write_rows(rows, workdir / METRICS, columns)
        draw_curves(rows, workdir / CURVES, title)


def typed(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> list[Row]:
    """Returns rows with numbers in place of texts, or raises what `read_rows` catches."""
    return [
        {key: int(row[key]) if key == "step" else float(row[key]) for key in columns}
        for row in rows
    ]


def read_rows(path: epath.Path, columns: Sequence[str] = COLUMNS) -> list[Row]:
    """Returns the rows of a metrics.csv, none where there is no such file.

    Raises:
        UserError: when it is damaged.
    """
    if not path.exists():
        return []
    try:
        text = reading(functools.partial(read_text, path), os.fspath(path))
        if not text.endswith("\n"):
            raise ValueError("it is cut off")
        return typed(csv.DictReader(text.splitlines()), columns)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, OSError, csv.Error):
        raise UserError(
            f"{path} is damaged: restore it from a copy, or move it away to go on without the "
            "rows of earlier evaluations"
        ) from None


def start_wandb(workdir: epath.Path, project: str) -> Any:
    """Starts a run of Weights & Biases, or resumes the workdir's.

    Raises:
        UserError: when wandb is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "config.log.wandb_project asks for wandb, which is not installed: "
            "pip install 'mambaout_jax[wandb]', or leave the key empty"
        ) from error
    # wandb writes to disks only.
    folder = None if is_bucket(workdir) else os.fspath(workdir)
    return wandb.init(project=project, dir=folder, id=wandb_id(workdir), resume="allow")


def wandb_id(workdir: epath.Path) -> str:
    """Returns the id of the workdir's run of Weights & Biases, drawn once and kept there.

    Raises:
        StorageError: when it cannot be read.
        UserError: when it cannot be written.
    """
    path = workdir / "wandb_id"
    if path.exists():
        found = reading(functools.partial(read_bytes, path), os.fspath(path))
        if re.fullmatch(rb"[0-9a-f]{32}\s*", found):  # else the file is damaged
            return found.decode().strip()
    drawn = uuid.uuid4().hex
    write_file(path, drawn)
    return drawn
