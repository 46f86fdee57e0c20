"""TensorBoard's event files, on a disk or in a bucket."""

import io
import os
import time
from typing import Any

from etils import epath

from mambaout_jax.bucket import is_bucket
from mambaout_jax.files import write_file


class ObjectWriter:
    """A file in a bucket, where nothing can be appended: each flush writes all of it again.

    The interface is that of `tensorboardX.record_writer`.
    """

    def __init__(self, path: str):
        self._path, self._content = path, io.BytesIO()

    def write(self, data: bytes) -> None:
        """Adds to what the next flush writes."""
        self._content.write(data)

    def flush(self) -> None:
        """Writes everything that was added."""
        write_file(self._path, self._content.getvalue())

    def close(self) -> None:
        """Writes everything that was added."""
        self.flush()


class ObjectWriters:
    """Makes an `ObjectWriter` of each event file, as `register_writer_factory` asks for."""

    open = staticmethod(ObjectWriter)

    @staticmethod
    def directory_check(path: str) -> None:
        """Does nothing: a bucket needs no folders."""


def open_events(folder: epath.Path, start_step: int) -> Any:
    """Returns the writer of a new event file, which replaces what older ones say of later steps."""
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import register_writer_factory

    if is_bucket(folder):
        # tensorboardX's own writer fails when the answer to an upload is lost.
        register_writer_factory("gs", ObjectWriters)
    # Not by a SummaryWriter: its thread would fail on a full disk unnoticed, and the run would wait
    # for it forever.
    folder.mkdir(parents=True, exist_ok=True)
    events = EventsWriter(str(folder / "events"), filename_suffix=f".{os.getpid()}")
    log = SessionLog(status=SessionLog.START)
    events.write_event(Event(wall_time=time.time(), step=start_step + 1, session_log=log))
    return events
