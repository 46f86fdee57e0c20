"""A trace of a few steps, for TensorBoard's profile page, xprof or Perfetto."""

import contextlib
import logging

import jax
from etils import epath

logger = logging.getLogger(__name__)

WARM_UP = 2  # steps before the first that is traced: they compile and fill the queues


class Profiler:
    """Traces `steps` steps, once the process has done WARM_UP; none where `steps` is 0."""

    def __init__(self, folder: epath.Path, start: int, steps: int):
        self.folder, self.steps = folder, steps
        self.first = start + WARM_UP + 1
        self.running = False

    def step(self, number: int) -> contextlib.AbstractContextManager[None]:
        """Returns the context in which a step is to be run."""
        if self.running and number == self.first + self.steps:
            self.close()
        if self.steps and number == self.first:
            jax.profiler.start_trace(self.folder)
            self.running = True
        if not self.running:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def close(self) -> None:
        """Writes the trace, where one is being taken."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()
            logger.info("the trace is in %s", self.folder / "plugins" / "profile")
