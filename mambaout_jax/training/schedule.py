"""The learning rate of the reference: timm's cosine with warmup, on timm's clock."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mambaout_jax.config import duration_steps


def cosine_with_warmup(
    time: jax.Array, *, peak: float, duration: float, warmup: float, start: float, end: float
) -> jax.Array:
    """Returns the learning rate at `time`, in the unit that `duration` and `warmup` have.

    The warmup is not a prefix: the cosine's clock runs from 0, so that it is joined after
    `warmup` at the point that it has reached by then. After `duration` the rate stays at `end`.
    """
    time = jnp.asarray(time, jnp.float32)
    rise = start + time * ((peak - start) / max(warmup, 1))
    progress = jnp.minimum(time / duration, 1.0)
    fall = end + 0.5 * (peak - end) * (1 + jnp.cos(jnp.pi * progress))
    return jnp.where(time < warmup, rise, fall)


def schedule_steps(config: ConfigDict, steps_per_epoch: int) -> tuple[int, int, int]:
    """Returns the steps of the cosine, of its warmup, and of the whole run with its cooldown."""
    unit = {"steps_per_epoch": steps_per_epoch, "batch_size": config.batch_size}
    duration = duration_steps(config.schedule.duration, **unit)
    warmup = duration_steps(config.schedule.warmup, **unit)
    return duration, warmup, duration + duration_steps(config.schedule.cooldown, **unit)


def make_schedule(config: ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step."""
    duration, warmup, _ = schedule_steps(config, steps_per_epoch)
    tick = steps_per_epoch if config.schedule.per == "epoch" else 1

    def schedule(step: jax.Array) -> jax.Array:
        return cosine_with_warmup(
            jnp.asarray(step) // tick,
            peak=config.schedule.learning_rate,
            duration=duration / tick,
            warmup=warmup / tick,
            start=config.schedule.warmup_learning_rate,
            end=config.schedule.min_learning_rate,
        )

    return schedule
