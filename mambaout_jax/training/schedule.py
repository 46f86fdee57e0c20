"""The learning rate of the reference: timm's cosine with warmup, on timm's clock."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class CosineSchedule:
    """The learning rate as a function of the step: an `optax.Schedule`.

    The warmup is not a prefix: the cosine starts at step 0, so that after the warmup the rate
    continues where the cosine is by then. After `duration` the rate stays at `end`. Source: timm's
    CosineLRScheduler, as the reference uses it.

    Attributes:
        peak: of the cosine.
        start: the rate at the first step of the warmup.
        end: the rate at the end of the cosine and after it.
        duration: of the cosine in steps, warmup included.
        warmup: in steps.
        tick: steps between two changes of the rate: the steps of an epoch, or 1.
    """

    peak: float
    start: float
    end: float
    duration: int
    warmup: int
    tick: int = 1

    def __call__(self, step: jax.Array | int, xp: Any = jnp) -> Any:
        """Returns the rate of a step, counted from 0, as a float32 jax array.

        Args:
            step: number of the step.
            xp: the array library: `numpy` computes on the host, for logs.
        """
        time = xp.asarray(xp.asarray(step) // self.tick, xp.float32)
        duration, warmup = self.duration / self.tick, self.warmup / self.tick
        rise = self.start + time * ((self.peak - self.start) / max(warmup, 1))
        progress = xp.minimum(time / duration, 1.0)
        fall = self.end + 0.5 * (self.peak - self.end) * (1 + xp.cos(xp.pi * progress))
        return xp.where(time < warmup, rise, fall)
