"""Learning rates: timm's cosine with warmup, on timm's clock, and mmsegmentation's polynomial."""

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


@dataclasses.dataclass(frozen=True)
class PolynomialSchedule:
    """The learning rate as a function of the step: a linear warmup, then a polynomial decay.

    The rate is at its peak at the end of the warmup. After `duration` it stays at `end`. Source:
    mmsegmentation's LinearLR and PolyLR one after the other, each step.

    Attributes:
        peak: the rate at the end of the warmup.
        start: the rate at the first step of the warmup.
        end: the rate at the end of the decay and after it.
        duration: in steps, warmup included.
        warmup: in steps.
        power: of the decay; 1: linear.
    """

    peak: float
    start: float
    end: float
    duration: int
    warmup: int
    power: float = 1.0

    def __call__(self, step: jax.Array | int, xp: Any = jnp) -> Any:
        """Returns the rate of a step; the arguments are those of `CosineSchedule`."""
        time = xp.asarray(step, xp.float32)
        rise = self.start + time * ((self.peak - self.start) / max(self.warmup, 1))
        progress = xp.clip((time - self.warmup) / (self.duration - self.warmup), 0.0, 1.0)
        fall = self.end + (self.peak - self.end) * (1 - progress) ** self.power
        return xp.where(time < self.warmup, rise, fall)


Schedule = CosineSchedule | PolynomialSchedule
