"""The progress of a run: a bar on a terminal, plain lines in a log file."""

import os
import sys
import time

from tqdm import tqdm

from mambaout_jax.runtime.goodput import WAIT, Goodput


class Progress:
    """Shows the step, loss, learning rate, images/s, the time left and the wait for data.

    On a terminal it is a bar. Elsewhere, every `every` steps, it is a line of the same content.
    """

    def __init__(
        self,
        total: int,
        start: int,
        batch_size: int,
        every: int,
        clock: Goodput,
        enabled: bool = True,
    ):
        self.file = sys.stderr if enabled else open(os.devnull, "w")  # noqa: SIM115
        self.terminal = self.file.isatty()
        self.total, self.batch_size, self.every, self.clock = total, batch_size, every, clock
        self.bar = tqdm(
            total=total,
            initial=start,
            file=self.file,
            unit="step",
            dynamic_ncols=True,
            disable=not self.terminal,
        )
        self.restart(start)

    def restart(self, step: int) -> None:
        """Starts the clock anew, after something that is not training."""
        self.marked_step, self.marked_time = step, time.perf_counter()
        self.marked_wait = self.clock.seconds[WAIT]

    def update(self, step: int, loss: float, learning_rate: float) -> dict[str, float] | None:
        """Counts a step; every `every` steps shows where the run is and returns the rates."""
        self.bar.update()
        if step % self.every:
            return None
        elapsed = max(time.perf_counter() - self.marked_time, 1e-9)
        rate = (step - self.marked_step) * self.batch_size / elapsed
        wait = (self.clock.seconds[WAIT] - self.marked_wait) / elapsed
        text = (
            f"loss {loss:.4f}, lr {learning_rate:.2e}, {rate:,.0f} images/s, data wait {wait:.0%}"
        )
        if self.terminal:
            self.bar.set_postfix_str(text)
        else:
            left = tqdm.format_interval((self.total - step) * self.batch_size / max(rate, 1e-9))
            self.line(f"step {step:>{len(str(self.total))}}/{self.total}: {text}, {left} left")
        self.restart(step)
        return {"images_per_second": rate, "data_wait": wait}

    def line(self, text: str) -> None:
        """Writes a line, above the bar where there is one."""
        tqdm.write(text, file=self.file)
        self.file.flush()

    def close(self) -> None:
        """Ends the bar."""
        self.bar.close()
