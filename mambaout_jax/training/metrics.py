"""The training loss on the host, read in groups so that the device never waits for the host."""

import logging
import math
from typing import Any

import jax

from mambaout_jax.errors import UserError

logger = logging.getLogger(__name__)

MAX_PENDING = 1000  # steps whose losses may wait on the device


class LossMeter:
    """Collects the losses of steps, and counts the steps that were skipped.

    A step is skipped where its loss or gradient is not finite: `update_step` then leaves the state
    as it was. The losses stay on the device until `read`.
    """

    def __init__(
        self,
        max_bad_steps: int,
        *,
        total: float = 0.0,
        count: int = 0,
        last: float = math.nan,
        bad: int = 0,
        bad_in_a_row: int = 0,
    ):
        """Starts empty, or from a `state`.

        Args:
            max_bad_steps: skipped steps in a row that do not stop the run.
            total: sum of the losses since the last `mean`.
            count: number of these losses.
            last: newest loss that was read.
            bad: skipped steps since the run began.
            bad_in_a_row: the last of them without a good step between.
        """
        self.max_bad_steps = max_bad_steps
        self.total, self.count, self.last = total, count, last
        self.bad, self.bad_in_a_row = bad, bad_in_a_row
        self._pending: list[tuple[int, jax.Array]] = []

    def push(self, step: int, loss: jax.Array) -> None:
        """Takes the loss of a step, and waits for no later step than the one two before it."""
        self._pending.append((step, loss))
        if len(self._pending) > 2:
            # Without a bound the host would queue steps, and their batches, until memory ends.
            self._pending[-3][1].block_until_ready()
        if len(self._pending) > MAX_PENDING:
            self.read()

    def read(self) -> None:
        """Reads the losses that are still on the device.

        Raises:
            UserError: when more than `max_bad_steps` in a row were skipped.
        """
        pending, self._pending = self._pending, []
        values = jax.device_get([loss for _, loss in pending])
        for (step, _), value in zip(pending, values, strict=True):
            loss = float(value)
            if math.isfinite(loss):
                self.last, self.bad_in_a_row = loss, 0
                self.total, self.count = self.total + loss, self.count + 1
                continue
            self.bad, self.bad_in_a_row = self.bad + 1, self.bad_in_a_row + 1
            logger.warning("the loss or gradient of step %d is not finite: step skipped", step)
            if self.bad_in_a_row > self.max_bad_steps:
                raise UserError(
                    f"the loss or gradient was not finite in {self.bad_in_a_row} steps in a row, "
                    f"the last of them step {step} (config.max_bad_steps is {self.max_bad_steps}); "
                    "try a lower config.schedule.learning_rate or config.optimizer.clip_norm=1.0"
                )

    def mean(self) -> float:
        """Returns the mean loss of the good steps since the last call, and resets it."""
        self.read()
        mean = self.total / self.count if self.count else math.nan
        self.total, self.count = 0.0, 0
        return mean

    def state(self) -> dict[str, Any]:
        """Returns what a resumed run gives to the constructor, as JSON stores it."""
        self.read()
        return {
            "total": self.total,
            "count": self.count,
            "last": self.last,
            "bad": self.bad,
            "bad_in_a_row": self.bad_in_a_row,
        }
