"""The training loss as the host sees it: one step late, so that the device never waits."""

import math
from typing import Any

import jax

from mambaout_jax.errors import UserError


class NonFiniteLossError(UserError):
    """The loss of a step, or its gradient, is not finite: the state after it is worth nothing."""

    def __init__(self, step: int, loss: float):
        super().__init__(f"the loss of step {step} is {loss}")
        self.step = step


class Losses:
    """Sums the losses of steps since the last `mean`; a run continues from its `state`."""

    def __init__(self, total: float = 0.0, count: int = 0, last: float = math.nan):
        self.total, self.count, self.last = total, count, last
        self._pending: tuple[int, jax.Array] | None = None

    def push(self, step: int, loss: jax.Array) -> None:
        """Takes the loss of a step, and reads that of the step before.

        Raises:
            NonFiniteLossError: when the loss of the step before is not finite.
        """
        self.flush()
        self._pending = (step, loss)

    def flush(self) -> None:
        """Reads the loss that is still on the device.

        Raises:
            NonFiniteLossError: when it is not finite.
        """
        if self._pending is None:
            return
        step, loss = self._pending
        self._pending, self.last = None, float(loss)
        if not math.isfinite(self.last):
            raise NonFiniteLossError(step, self.last)
        self.total, self.count = self.total + self.last, self.count + 1

    def mean(self) -> float:
        """Returns the mean since the last call, and starts anew."""
        self.flush()
        mean = self.total / max(self.count, 1)
        self.total, self.count = 0.0, 0
        return mean

    def state(self) -> dict[str, Any]:
        """Returns what a resumed run gives to the constructor, as JSON keeps it."""
        self.flush()
        return {"total": self.total, "count": self.count, "last": self.last}
