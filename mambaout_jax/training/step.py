"""One step of training, one of evaluation, and their compilation over a mesh."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mambaout_jax.models.mambaout import MambaOut, on_device
from mambaout_jax.models.upernet import BATCH_STATS, running_statistics
from mambaout_jax.runtime.compilation import compiler_options
from mambaout_jax.runtime.sharding import BATCH, over_mesh
from mambaout_jax.training.recipe import Batch, Recipe
from mambaout_jax.training.state import TrainState
from mambaout_jax.training.task import TASKS
from mambaout_jax.training.teacher import Teacher

Logits = Callable[[jax.Array], jax.Array]  # a teacher's, of a batch's inputs


def augment(key: jax.Array, step: jax.Array, batch: Batch, recipe: Recipe) -> Batch:
    """Turns a batch of the loader into the inputs of the task's loss."""
    return TASKS[recipe.task].augment(key, step, batch, recipe)


def mean_gradient(
    loss_fn: Callable[[Any, Batch, jax.Array], tuple[jax.Array, Any]],
    params: Any,
    batch: Batch,
    key: jax.Array,
    parts: int,
) -> tuple[tuple[jax.Array, Any], Any]:
    """Returns the loss of a batch and the network's new statistics, and the loss's gradient.

    They are the means over `parts` parts, one after the other.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if parts == 1:
        return value_and_grad(params, batch, key)

    # Each part takes every parts-th example, so that no example leaves its device.
    def split(array: jax.Array) -> jax.Array:
        return jnp.moveaxis(array.reshape(-1, parts, *array.shape[1:]), 1, 0)

    def accumulate(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
        part_batch, index = part
        value = value_and_grad(params, part_batch, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, value), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    zero = ((jnp.zeros(()), running_statistics(zeros)), zeros)
    total, _ = jax.lax.scan(accumulate, zero, (jax.tree.map(split, batch), jnp.arange(parts)))
    return jax.tree.map(lambda leaf: leaf / parts, total)


def forward(
    model: MambaOut, params: Any, images: jax.Array, key: jax.Array
) -> tuple[Any, dict[str, Any]]:
    """Returns a network's outputs in training, and new running statistics if it has any."""
    variables, rngs = {"params": params}, {"dropout": key}
    if not running_statistics(params):
        return model.apply(variables, images, True, rngs=rngs), {}
    outputs, new = model.apply(variables, images, True, rngs=rngs, mutable=[BATCH_STATS])
    return outputs, new[BATCH_STATS]


def update_step(
    state: TrainState,
    inputs: Batch,
    key: jax.Array,
    *,
    model: MambaOut,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    teacher: Logits | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Updates the state by a prepared batch, as the task's `augment` returns it.

    A step whose loss or gradient is not finite counts, and changes nothing else. A teacher's logits
    are computed part by part, as the network's.

    Returns:
        The state after the step, and the scalars "loss", NaN where the gradient is not finite,
        and "grad_norm" (before clipping).
    """

    def loss_fn(params: Any, part: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
        outputs, statistics = forward(model, params, part["image"], key)
        if teacher:
            part = {**part, "teacher": jax.lax.stop_gradient(teacher(part["image"]))}
        return TASKS[recipe.task].loss(outputs, part, recipe), statistics

    parts = recipe.accumulate_steps
    (loss, statistics), grads = mean_gradient(loss_fn, state.params, inputs, key, parts)
    grad_norm = optax.tree.norm(grads)
    loss = jnp.where(jnp.isfinite(grad_norm), loss, jnp.nan)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    if statistics:
        params = unflatten_dict({**flatten_dict(params), **flatten_dict(statistics)})
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
    teacher: Logits | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Augments a batch and updates the state by it.

    Args:
        state: the state before the step.
        batch: "image" uint8 [N, H, W, 3] and "label" of the loader.
        key: the run's training key; the step's number is folded into it here.
        model: the network.
        optimizer: what turns gradients into updates.
        recipe: the rest of the recipe.
        teacher: of a distillation: the inputs' images to logits.

    Returns:
        As `update_step`.
    """
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(key, state.step))
    inputs = augment(augment_key, state.step, batch, recipe)
    parts = {"model": model, "optimizer": optimizer, "recipe": recipe}
    return update_step(state, inputs, dropout_key, teacher=teacher, **parts)


def compile_train_step(
    model: MambaOut,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    shardings: Any,
    mesh: Mesh,
    teacher: Teacher | None = None,
) -> Any:
    """Returns the jitted `train_step` over the mesh; it donates the state and nothing else.

    It takes the data of the key, uint32 [2], and with a teacher the teacher's parameters. jax
    dispatches calls with key arrays in Python, which takes several times as long.
    """
    replicated = NamedSharding(mesh, P())
    device = mesh.devices.flat[0]
    model = on_device(model, device)

    @functools.wraps(train_step)  # the planner finds the loop over parts by the program's name
    def step(state: TrainState, batch: Batch, key_data: jax.Array, *taught_by: Any) -> Any:
        key = jax.random.wrap_key_data(key_data)
        parts = {"model": model, "optimizer": optimizer, "recipe": recipe}
        logits = functools.partial(teacher.logits, *taught_by) if teacher else None
        return train_step(state, batch, key, teacher=logits, **parts)

    teachers = (replicated,) if teacher else ()
    return jax.jit(
        over_mesh(step, mesh),
        in_shardings=(shardings, NamedSharding(mesh, BATCH), replicated, *teachers),
        out_shardings=(shardings, replicated),
        donate_argnums=0,
        compiler_options=compiler_options(device.platform),
    )
