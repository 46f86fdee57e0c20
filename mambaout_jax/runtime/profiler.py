"""A trace of a few steps, for TensorBoard's profile page, xprof or Perfetto."""

import contextlib
import logging
import tempfile
from pathlib import Path

import jax
from etils import epath

from mambaout_jax.bucket import is_bucket, upload
from mambaout_jax.files import writing

logger = logging.getLogger(__name__)

WARM_UP = 2  # steps before the first that is traced: they compile and fill the queues


class Profiler:
    """Traces `steps` steps, once the process has done WARM_UP; none where `steps` is 0."""

    def __init__(self, folder: epath.Path, start: int, steps: int):
        self.folder, self.steps = folder, steps
        self.first = start + WARM_UP + 1
        self.running = False
        self.local: tempfile.TemporaryDirectory[str] | None = None

    def step(self, number: int) -> contextlib.AbstractContextManager[None]:
        """Returns the context in which a step is to be run."""
        if self.running and number == self.first + self.steps:
            self.close()
        if self.steps and number == self.first:
            # jax writes to disks only.
            self.local = tempfile.TemporaryDirectory() if is_bucket(self.folder) else None
            jax.profiler.start_trace(self.local.name if self.local else self.folder)
            self.running = True
        if not self.running:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def close(self) -> None:
        """Writes the trace, where one is being taken."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()
            if self.local:
                with self.local as folder, writing(self.folder):
                    upload(Path(folder), self.folder)
            logger.info("the trace is in %s", self.folder / "plugins" / "profile")
