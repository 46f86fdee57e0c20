"""One step of training, one of evaluation, and their compilation over a mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mambaout_jax.models.mambaout import MambaOut, on_device
from mambaout_jax.runtime.compilation import compiler_options
from mambaout_jax.runtime.sharding import BATCH, over_mesh
from mambaout_jax.training.mixing import Mixing, augment_batch
from mambaout_jax.training.state import TrainState

Batch = dict[str, jax.Array]


def bce(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns the binary cross entropy of each example, the mean over classes.

    Source: timm's `BinaryCrossEntropy` without a threshold.

    Args:
        logits: float32 [N, classes].
        targets: [N, classes], from 0 to 1.
    """
    return optax.sigmoid_binary_cross_entropy(logits, targets).mean(axis=-1)


# Functions of logits and targets [N, classes] to losses [N].
LOSSES: dict[str, Callable[[Any, Any], jax.Array]] = {
    "softmax": optax.softmax_cross_entropy,
    "bce": bce,
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a step does besides the model and the optimizer; the names are the configuration's."""

    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    label_smoothing: float = 0.0
    loss: str = "softmax"  # one of LOSSES
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_off_step: int = 0  # the first step without mixing; 0: never
    mixup_group: int = 0  # images that are mixed by one draw; 0: the whole batch
    repeats: int = 1  # copies of an image in a row
    accumulate_steps: int = 1
    ema_decay: float = 0.0


def augment(key: jax.Array, step: jax.Array, batch: Batch, recipe: Recipe) -> Batch:
    """Turns uint8 images and labels into mixed float32 images and targets [N, classes]."""
    mixing = Mixing(
        num_classes=recipe.num_classes,
        smoothing=recipe.label_smoothing,
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        prob=recipe.mixup_prob,
        switch_prob=recipe.mixup_switch_prob,
        group=recipe.mixup_group,
        repeats=recipe.repeats,
    )
    images, targets = augment_batch(
        key,
        batch["image"],
        batch["label"],
        mixing,
        mean=recipe.mean,
        std=recipe.std,
        erasing=recipe.random_erasing,
        enabled=step < recipe.mixup_off_step if recipe.mixup_off_step else True,
    )
    return {"image": images, "target": targets}


def mean_gradient(
    loss_fn: Callable[[Any, Batch, jax.Array], jax.Array],
    params: Any,
    batch: Batch,
    key: jax.Array,
    parts: int,
) -> tuple[jax.Array, Any]:
    """Returns the loss of a batch and its gradient, from `parts` parts one after the other."""
    if parts == 1:
        return jax.value_and_grad(loss_fn)(params, batch, key)

    # Each part takes every parts-th example, so that no example leaves its device.
    def split(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array.reshape(-1, parts, *array.shape[1:]), 1, 0)

    def accumulate(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        part_batch, index = part
        value = jax.value_and_grad(loss_fn)(params, part_batch, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, value), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(accumulate, zero, (jax.tree.map(split, batch), jnp.arange(parts)))
    return jax.tree.map(lambda leaf: leaf / parts, total)


def update_step(
    state: TrainState,
    inputs: Batch,
    key: jax.Array,
    *,
    model: MambaOut,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Updates the state by a prepared batch: "image" float32 [N, H, W, 3], "target" [N, classes].

    A step whose loss or gradient is not finite counts, and changes nothing else.

    Returns:
        The state after the step, and the scalars "loss", NaN where the gradient is not finite,
        and "grad_norm" (before clipping).
    """

    def loss_fn(params: Any, part: Batch, key: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, part["image"], True, rngs={"dropout": key})
        return LOSSES[recipe.loss](logits, part["target"]).mean()

    loss, grads = mean_gradient(loss_fn, state.params, inputs, key, recipe.accumulate_steps)
    grad_norm = optax.tree.norm(grads)
    loss = jnp.where(jnp.isfinite(grad_norm), loss, jnp.nan)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema_params = state.ema_params
    if recipe.ema_decay:
        ema_params = optax.incremental_update(params, ema_params, 1 - recipe.ema_decay)
    # optax.apply_if_finite would look at the updates alone and change the checkpoints' layout.
    new, old = (params, opt_state, ema_params), (state.params, state.opt_state, state.ema_params)
    finite = jnp.isfinite(loss)
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    return TrainState(state.step + 1, *kept), {"loss": loss, "grad_norm": grad_norm}


def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    model: MambaOut,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Augments a batch and updates the state by it.

    Args:
        state: the state before the step.
        batch: "image" uint8 [N, H, W, 3] and "label" int32 [N].
        key: the run's training key; the step's number is folded into it here.
        model: the network.
        optimizer: what turns gradients into updates.
        recipe: the rest of the recipe.

    Returns:
        As `update_step`.
    """
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
    inputs = augment(augment_key, state.step, batch, recipe)
    parts = {"model": model, "optimizer": optimizer, "recipe": recipe}
    return update_step(state, inputs, dropout_key, **parts)


def compile_train_step(
    model: MambaOut,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    shardings: Any,
    mesh: Mesh,
) -> Any:
    """Returns the jitted `train_step` over the mesh; it donates the state and nothing else.

    It takes the data of the key, uint32 [2]. jax dispatches calls with key arrays in Python, which
    takes several times as long.
    """
    replicated = NamedSharding(mesh, P())
    device = mesh.devices.flat[0]
    model = on_device(model, device)

    @functools.wraps(train_step)  # the planner finds the loop over parts by the program's name
    def step(state: TrainState, batch: Batch, key_data: jax.Array) -> Any:
        key = jax.random.wrap_key_data(key_data)
        return train_step(state, batch, key, model=model, optimizer=optimizer, recipe=recipe)

    return jax.jit(
        over_mesh(step, mesh),
        in_shardings=(shardings, NamedSharding(mesh, BATCH), replicated),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
        compiler_options=compiler_options(device.platform),
    )
