"""Checkpoints of a run, by Orbax: asynchronous, the newest few and the best.

WORKDIR/checkpoints/STEP holds the items `params`, `ema_params` (where the recipe averages),
`optimizer`, `data` (where the data iterator and the recorder stand) and `meta` (which model it is:
`mambaout_jax.weights.store.WeightsInfo`), so that each is loadable as weights by itself.
"""

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from mambaout_jax.training.state import TrainState

METRIC = "top1"


def open_checkpoints(workdir: epath.Path, keep: int) -> ocp.CheckpointManager:
    """Returns the manager of a workdir's checkpoints; `keep` newest ones stay, and the best."""
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(
            [
                policies.LatestN(keep),
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics[METRIC],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        ),
        best_fn=lambda metrics: metrics[METRIC],
        step_name_format=ocp.step.standard_name_format(),
        enable_async_checkpointing=True,
    )
    return ocp.CheckpointManager(workdir.resolve() / "checkpoints", options=options)


def has_checkpoint(workdir: epath.Path) -> bool:
    """Tells whether a workdir holds a whole checkpoint; unfinished ones have other names."""
    folder = workdir / "checkpoints"
    return folder.exists() and any(path.name.isdigit() for path in folder.iterdir())


def save(
    manager: ocp.CheckpointManager,
    state: TrainState,
    data: dict[str, Any],
    meta: dict[str, Any],
    metrics: dict[str, float] | None,
) -> None:
    """Starts to save the state; returns once the device's arrays are copied.

    Args:
        manager: of the workdir's checkpoints.
        state: the state after `state.step` steps.
        data: what else a resumed run continues from, as JSON keeps it.
        meta: the `WeightsInfo` as JSON.
        metrics: of an evaluation at this step, None without one.
    """
    items = {
        "params": ocp.args.StandardSave(state.params),
        "optimizer": ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
        "data": ocp.args.JsonSave(data),
        "meta": ocp.args.JsonSave(meta),
    }
    if state.ema_params is not None:
        items["ema_params"] = ocp.args.StandardSave(state.ema_params)
    manager.save(int(state.step), args=ocp.args.Composite(**items), metrics=metrics)


def restore(
    manager: ocp.CheckpointManager, step: int, abstract: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state and the data item of a step.

    Args:
        manager: of the workdir's checkpoints.
        step: which checkpoint.
        abstract: shapes and shardings of the state.
    """
    optimizer = {"step": abstract.step, "opt_state": abstract.opt_state}
    items = {
        "params": ocp.args.StandardRestore(abstract.params),
        "optimizer": ocp.args.StandardRestore(optimizer),
        "data": ocp.args.JsonRestore(),
    }
    if abstract.ema_params is not None:
        items["ema_params"] = ocp.args.StandardRestore(abstract.ema_params)
    found = manager.restore(step, args=ocp.args.Composite(**items))
    state = TrainState(
        step=found["optimizer"]["step"],
        params=found["params"],
        opt_state=found["optimizer"]["opt_state"],
        ema_params=found["ema_params"] if abstract.ema_params is not None else None,
    )
    return state, found["data"]


def abstract_state(state: Any, shardings: Any) -> Any:
    """Returns shapes with shardings, as Orbax restores them."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )
