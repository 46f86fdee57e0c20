"""The progress of a run: a bar on a terminal, lines of the log elsewhere."""

import logging
import sys
import time

from tqdm import tqdm

from mambaout_jax.runtime.goodput import DATA, DEVICE, HOST, Goodput

logger = logging.getLogger(__name__)


class Progress:
    """Shows the step, loss, learning rate, images/s, the time left, and what the run waits for."""

    def __init__(
        self,
        total: int,
        start: int,
        batch_size: int,
        clock: Goodput,
        peak_images_per_second: float | None = None,
        enabled: bool = True,
    ):
        """Starts to measure.

        Args:
            total: steps of the run.
            start: steps done before.
            batch_size: examples in a step.
            clock: of the run.
            peak_images_per_second: what the devices' published peak allows; None: unknown.
            enabled: whether this process shows anything.
        """
        self.total, self.batch_size, self.clock = total, batch_size, clock
        self.peak = peak_images_per_second
        self.terminal = enabled and sys.stderr.isatty()
        self.enabled = enabled
        self.bar = tqdm(
            total=total,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            disable=not self.terminal,
        )
        self.restart(start)

    def restart(self, step: int) -> None:
        """Starts a new interval, so that what happened before it is not counted as training."""
        self.marked_step, self.marked_time = step, time.perf_counter()
        self.marked = self.clock.elapsed()

    def advance(self) -> None:
        """Counts a step."""
        self.bar.update()

    def show(self, step: int, loss: float, learning_rate: float) -> dict[str, float]:
        """Shows the interval since the last call, and returns its rates for the recorder."""
        elapsed = max(time.perf_counter() - self.marked_time, 1e-9)
        rate = (step - self.marked_step) * self.batch_size / elapsed
        now = self.clock.elapsed()
        parts = {part: (now[part] - self.marked[part]) / elapsed for part in (DATA, HOST, DEVICE)}
        waits = ", ".join(f"{part} {share:.0%}" for part, share in parts.items())
        text = f"loss {loss:.4f}, lr {learning_rate:.2e}, {rate:,.0f} images/s, {waits}"
        shown = {"images_per_second": rate}
        shown |= {part.replace(" ", "_"): share for part, share in parts.items()}
        if self.peak:
            shown["mfu"] = rate / self.peak
            text += f", MFU {shown['mfu']:.1%}"
        if self.terminal:
            self.bar.set_postfix_str(text)
        elif self.enabled:
            left = tqdm.format_interval((self.total - step) * self.batch_size / max(rate, 1e-9))
            number = f"{step:>{len(str(self.total))}}/{self.total}"
            logger.info("step %s: %s, %s left", number, text, left)
        self.restart(step)
        return shown

    def close(self) -> None:
        """Ends the bar."""
        self.bar.close()
