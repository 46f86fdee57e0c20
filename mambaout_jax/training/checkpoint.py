"""Checkpoints of a run, by Orbax: asynchronous, the newest few and the best.

WORKDIR/checkpoints/STEP holds the items `params`, `ema_params` (where the recipe averages),
`optimizer`, `data` (where the data iterator and the recorder stand) and `meta` (which model it is:
`mambaout_jax.weights.store.WeightsInfo`), so that each is loadable as weights by itself.
"""

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from mambaout_jax.errors import UserError
from mambaout_jax.runtime.processes import all_or_none
from mambaout_jax.training.state import TrainState
from mambaout_jax.weights.store import WeightsInfo

logger = logging.getLogger(__name__)

METRIC = "top1"
DAMAGED = ".damaged"


@contextlib.contextmanager
def open_checkpoints(workdir: epath.Path, keep: int) -> Iterator[ocp.CheckpointManager]:
    """Yields the manager of a workdir's checkpoints; `keep` newest ones stay, and the best."""
    folder = workdir.resolve() / "checkpoints"
    with all_or_none():
        if jax.process_index() == 0:
            set_aside_unreadable(folder)
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
        cleanup_tmp_directories=True,
    )
    manager = ocp.CheckpointManager(folder, options=options)
    try:
        yield manager
    except BaseException:
        # Of several processes the others may be gone, and the end of a save would wait for them.
        if jax.process_count() == 1:
            with contextlib.suppress(Exception):  # of a save that failed, as what is raised says
                manager.close()
        raise
    manager.close()


def has_checkpoint(workdir: epath.Path) -> bool:
    """Tells whether a workdir holds a whole checkpoint; unfinished ones have other names."""
    folder = workdir / "checkpoints"
    return folder.exists() and any(path.name.isdigit() for path in folder.iterdir())


@jax.jit
def fingerprint(state: Any) -> jax.Array:
    """Returns a uint32 that any changed bit of a float32 or int32 leaf changes.

    Files that are cut off are found out when they are read; a bit that fell over in a checkpoint's
    arrays is not. The sum does not depend on how the state is split over devices.
    """
    total = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(state):
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
        total = total * jnp.uint32(31) + bits.sum(dtype=jnp.uint32)
    return total


@contextlib.contextmanager
def named_failure(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Turns what a save failed of into a sentence, also a save that was still under way.

    Raises:
        UserError: names the cause and the last good checkpoint.
    """
    try:
        yield
    except Exception as error:
        manager.reload()
        latest = manager.latest_step()
        good = "there is no checkpoint yet" if latest is None else f"checkpoint {latest} is good"
        raise UserError(f"cannot save to {manager.directory}: {cause(error)}; {good}") from error


def cause(error: BaseException) -> str:
    """Returns the part of an error's message that tells a person what happened."""
    text = str(error)
    system = re.search(r"\[Errno \d+\] ([^:\n]+)|([^:\"]+) \[os_error_code=", text)
    if system:
        return (system[1] or system[2]).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200] if text else ''}"


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

    Raises:
        UserError: when this save, or the one before it, cannot be written.
    """
    data = data | {"fingerprint": int(fingerprint(state))}
    items = {
        "params": ocp.args.StandardSave(state.params),
        "optimizer": ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
        "data": ocp.args.JsonSave(data),
        "meta": ocp.args.JsonSave(meta),
    }
    if state.ema_params is not None:
        items["ema_params"] = ocp.args.StandardSave(state.ema_params)
    with named_failure(manager):
        manager.save(int(state.step), args=ocp.args.Composite(**items), metrics=metrics)


def finish(manager: ocp.CheckpointManager) -> None:
    """Waits until what is being saved is saved.

    Raises:
        UserError: when it cannot be written.
    """
    with named_failure(manager):
        manager.wait_until_finished()


def restore(
    manager: ocp.CheckpointManager, step: int, abstract: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state and the data item of a step.

    Args:
        manager: of the workdir's checkpoints.
        step: which checkpoint.
        abstract: shapes and shardings of the state.

    Raises:
        ValueError: when the arrays are not those that were saved; others as Orbax finds damage.
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
    data = dict(found["data"])
    if data.pop("fingerprint", None) not in (None, int(fingerprint(state))):
        raise ValueError("its arrays are not those that were saved")
    return state, data


def check_model(manager: ocp.CheckpointManager, info: WeightsInfo) -> None:
    """Checks that the newest checkpoint that says of which model it is, is of this one.

    Raises:
        UserError: when it is not.
    """
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
            theirs = WeightsInfo.from_json(meta["meta"])
        except Exception:
            continue  # damaged: found out when it is restored
        if (theirs.model, theirs.num_classes) != (info.model, info.num_classes):
            raise UserError(
                f"checkpoint {step} in {manager.directory} is of another run: {theirs.model} of "
                f"{theirs.num_classes} classes, expected {info.model} of {info.num_classes}"
            )
        return


def restore_newest(
    manager: ocp.CheckpointManager, abstract: TrainState
) -> tuple[TrainState, dict[str, Any]] | None:
    """Returns the state and the data item of the newest checkpoint that is whole; None without any.

    Damaged ones that are newer are named in the log, and renamed to STEP.damaged.

    Raises:
        UserError: when there are checkpoints, and none is whole.
    """
    damage: dict[int, str] = {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            with all_or_none(), damage_as_sentence():
                found = restore(manager, step, abstract)
        except UserError as error:
            damage[step] = str(error)
            continue
        with all_or_none():
            for newer, reason in damage.items() if jax.process_index() == 0 else ():
                logger.warning("checkpoint %d is damaged (%s): using %d", newer, reason, step)
                set_aside(epath.Path(manager.directory), newer)
        if damage:
            manager.reload()
        return found
    folder = epath.Path(manager.directory)
    aside = [path.name for path in folder.iterdir() if path.name.endswith(DAMAGED)]
    if damage or aside:
        reasons = "; ".join([f"{step}: {reason}" for step, reason in damage.items()] + aside)
        raise UserError(
            f"no checkpoint in {folder} can be read ({reasons}): mend one, or start anew with "
            "another --workdir"
        )
    return None


@contextlib.contextmanager
def damage_as_sentence() -> Iterator[None]:
    """Turns whatever reading a checkpoint failed of into a UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(cause(error)) from error


def set_aside(folder: epath.Path, step: int) -> None:
    """Renames a damaged checkpoint, so that it is neither used nor lost."""
    (folder / str(step)).rename(folder / f"{step}{DAMAGED}")


def set_aside_unreadable(folder: epath.Path) -> None:
    """Sets checkpoints aside whose metrics, which the manager reads, are damaged."""
    for path in sorted(folder.iterdir()) if folder.exists() else []:
        metrics = path / "metrics" / "metrics"
        if path.name.isdigit() and metrics.exists():
            try:
                json.loads(metrics.read_text())
            except ValueError:
                logger.warning("checkpoint %s is damaged: its metrics cannot be read", path.name)
                set_aside(folder, int(path.name))


def abstract_state(state: Any, shardings: Any) -> Any:
    """Returns shapes with shardings, as Orbax restores them."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )
