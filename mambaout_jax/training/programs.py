"""The compiled programs of a run, made before its first step."""

import concurrent.futures
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mambaout_jax.inference.evaluate import compile_eval_step
from mambaout_jax.ops.gpu_lowering import lower_in_threads
from mambaout_jax.runtime.sharding import BATCH
from mambaout_jax.training.pictures import Pictures, open_pictures
from mambaout_jax.training.run import Run
from mambaout_jax.training.state import TrainState
from mambaout_jax.training.step import compile_train_step
from mambaout_jax.training.teacher import memory_for_teacher


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled steps: of a state and a batch, and of parameters and a batch.

    `initial_state` returns the state of the parameters to start from, None for new ones. `pictures`
    are those that each evaluation predicts, if any.
    """

    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    eval_step: Callable[..., dict[str, jax.Array]]
    initial_state: Callable[[Any], TrainState]
    pictures: Pictures | None


def compile_programs(
    run: Run,
    target: TrainState,
    key: jax.Array,
    init_key: jax.Array,
    resumed: bool,
    meanwhile: Callable[[], None],
) -> Programs:
    """Compiles the training step, and the other programs in another thread meanwhile.

    The evaluation waits until the training step is lowered: its kernels for GPUs, which lowering
    compiles, would delay those of the training step.

    Args:
        run: its model, optimizer, recipe and mesh.
        target: shapes and shardings of the state.
        key: of the training steps.
        init_key: of new parameters.
        resumed: whether the state is read from a checkpoint.
        meanwhile: called before XLA compiles the training step, for which it needs no Python.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
    train_step = compile_train_step(
        run.model, run.optimizer, run.recipe, shardings, run.mesh, run.teacher
    )
    options: dict[str, Any] = {"mean": run.recipe.mean, "std": run.recipe.std}
    options |= {"step": run.task.measures.step, **run.eval_options}
    eval_step = compile_eval_step(run.model, shardings.params, run.mesh, **options)

    on_gpus = run.mesh.devices.flat[0].platform == "gpu"
    lower = lower_in_threads if on_gpus else jax.stages.Traced.lower

    def compile_evaluation() -> Callable[..., dict[str, jax.Array]]:
        if run.task.dense:  # compiled for each size of images as it comes
            return eval_step
        batch = abstract_batch(run.eval_batch_size, run.preprocessing.shape, run.mesh)
        return lower(eval_step.trace(target.eval_params, batch)).compile()

    def compile_initial_state() -> Callable[..., TrainState]:
        function = jax.jit(run.initial_state, out_shardings=shardings)
        if resumed or run.init_from:
            return function
        return function.lower(init_key, None).compile()

    batch = abstract_batch(run.batch_size, run.image_size, run.mesh, run.task.dense)
    del batch["mask"]
    # On each device before the first step, so that no step moves them.
    everywhere = NamedSharding(run.mesh, P())
    rest: tuple[Any, ...] = (jax.device_put(np.asarray(jax.random.key_data(key)), everywhere),)
    if run.teacher:
        with memory_for_teacher(run.teacher.name):
            rest += (jax.block_until_ready(jax.device_put(run.teacher.params, everywhere)),)
    traced = train_step.trace(target, batch, *rest)
    pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="compile")
    initial_state = pool.submit(compile_initial_state)
    lowered = lower(traced)
    evaluation = pool.submit(compile_evaluation)
    pool.shutdown(wait=False)
    meanwhile()
    compiled = lowered.compile()
    return Programs(
        lambda state, batch: compiled(state, batch, *rest),
        lambda *arguments: evaluation.result()(*arguments),
        lambda params: initial_state.result()(init_key, params),
        open_pictures(run, shardings.params),
    )


def abstract_batch(
    batch_size: int, size: tuple[int, int], mesh: Mesh, dense: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes and shardings of a global batch: "image", "label" and "mask".

    `dense` is that of the task.
    """

    def leaf(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, BATCH))

    return {
        "image": leaf((batch_size, *size, 3), np.uint8),
        "label": leaf((batch_size, *size), np.uint8) if dense else leaf((batch_size,), np.int32),
        "mask": leaf((batch_size,), np.bool_),
    }
