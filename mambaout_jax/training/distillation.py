"""Distillation: the losses that let a network learn from a teacher's logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax


def soft(logits: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
    """Returns each example's divergence of the softened predictions, times temperature squared.

    KL(softmax(teacher / T) || softmax(logits / T)) T^2; with the factor, gradients keep their size
    at any temperature. Source: Hinton et al., "Distilling the knowledge in a neural network".

    Args:
        logits: float32 [N, classes].
        teacher: float32 [N, classes].
        temperature: T.

    Returns:
        float32 [N].
    """
    ours, theirs = (jax.nn.log_softmax(x / temperature) for x in (logits, teacher))
    return optax.losses.kl_divergence_with_log_targets(ours, theirs) * temperature**2


def hard(logits: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
    """Returns each example's cross entropy with the teacher's best class, float32 [N].

    The arguments are those of `soft`; the temperature changes nothing. Source: Touvron et al.,
    "Training data-efficient image transformers" (DeiT), here without a distillation token.
    """
    del temperature
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.argmax(teacher, axis=-1))


KINDS: dict[str, Callable[[jax.Array, jax.Array, float], jax.Array]] = {"soft": soft, "hard": hard}
