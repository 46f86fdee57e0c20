"""Checkpoints of a run, by Orbax: asynchronous, the newest few and the best.

WORKDIR/checkpoints/STEP holds the items `params`, `ema_params` (where the recipe averages),
`optimizer`, `data` (the position of the data iterator and the metrics so far), `meta` (a
`mambaout_jax.weights.store.WeightsInfo`) and, after an evaluation, `metrics`. So each checkpoint
can be loaded as weights by itself.
"""

import contextlib
import functools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tenacity
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from mambaout_jax.bucket import absolute, children, failed
from mambaout_jax.errors import AccessError, StorageError, UserError, first_line
from mambaout_jax.files import write_json
from mambaout_jax.runtime.processes import all_or_none
from mambaout_jax.training.state import TrainState
from mambaout_jax.weights.steps import DAMAGED, mark_copied_steps, set_aside, whole_steps
from mambaout_jax.weights.store import WeightsInfo

logger = logging.getLogger(__name__)

METRIC = "top1"
# Error numbers and words of storage that fails for a while, in messages of the system, of
# TensorStore and of buckets' servers. Whatever else reading a checkpoint fails of is damage.
TRANSIENT = re.compile(
    r"\[Errno (5|11|16|70|103|104|110|111|113|116|121)\]"
    r"|os_error_code='?(5|11|16|70|103|104|110|111|113|116|121)\b"
    r"|UNAVAILABLE|DEADLINE_EXCEEDED|Too Many Requests|Service Unavailable|Connection reset"
)
READ_ATTEMPTS = 4

T = TypeVar("T")


@contextlib.contextmanager
def open_checkpoints(workdir: epath.Path, keep: int) -> Iterator[ocp.CheckpointManager]:
    """Yields the manager of a workdir's checkpoints, which keeps the `keep` newest and the best."""
    folder = absolute(workdir) / "checkpoints"
    with all_or_none():
        if jax.process_index() == 0:
            mark_copied_steps(folder)
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
            with contextlib.suppress(Exception):  # the error that is raised says it already
                manager.close()
        raise
    manager.close()


def has_checkpoint(workdir: epath.Path) -> bool:
    """Returns whether a workdir holds a whole checkpoint."""
    return bool(whole_steps(workdir / "checkpoints"))


@jax.jit
def fingerprint(state: Any) -> jax.Array:
    """Returns a uint32 that changes with any bit of a float32 or int32 leaf.

    Orbax notices files that are cut off, but not a flipped bit in an array. The sum does not depend
    on how the state is split over devices.
    """
    total = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(state):
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
        total = total * jnp.uint32(31) + bits.sum(dtype=jnp.uint32)
    return total


@contextlib.contextmanager
def named_failure(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Reports a failed save as one sentence, also a save that was still running.

    Raises:
        UserError: names the cause and the last good checkpoint.
    """
    try:
        yield
    except Exception as error:
        failure = failed(f"cannot save to {manager.directory}", error)
        if isinstance(failure, StorageError | AccessError):
            raise type(failure)(f"{failure}; the checkpoints before it are good") from error
        manager.reload()
        latest = manager.latest_step()
        good = "there is no checkpoint yet" if latest is None else f"checkpoint {latest} is good"
        raise UserError(f"cannot save to {manager.directory}: {cause(error)}; {good}") from error


def cause(error: BaseException) -> str:
    """Returns what a person needs to know of an error of Orbax or TensorStore."""
    text = str(error)
    if number := re.search(r"\[Errno (\d+)\]|os_error_code='?(\d+)", text):
        return os.strerror(int(number[1] or number[2]))
    return first_line(error)


def save(
    manager: ocp.CheckpointManager,
    state: TrainState,
    data: dict[str, Any],
    meta: dict[str, Any],
    metrics: dict[str, float] | None,
) -> None:
    """Starts to save the state; returns once the arrays are copied from the devices.

    Args:
        manager: of the workdir's checkpoints.
        state: the state after `state.step` steps.
        data: what else a resumed run continues from, as JSON stores it.
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
    """Waits until the last save is written.

    Raises:
        UserError: when it cannot be written.
    """
    with named_failure(manager):
        manager.wait_until_finished()


def amend(
    manager: ocp.CheckpointManager,
    step: int,
    data: dict[str, Any],
    meta: dict[str, Any],
    metrics: dict[str, float],
) -> None:
    """Adds an evaluation to a checkpoint that was saved without it; arguments as in `save`.

    Raises:
        UserError: when it cannot be written.
    """
    folder = epath.Path(manager.directory) / str(step)
    with all_or_none():
        if jax.process_index() == 0:
            old = json.loads((folder / "data" / "metadata").read_text())
            write_json(folder / "metrics" / "metrics", metrics)
            write_json(folder / "meta" / "metadata", meta)
            write_json(folder / "data" / "metadata", old | data)
    manager.reload()


def reading(read: Callable[[], T], what: str) -> T:
    """Returns what `read` returns, after further attempts where storage fails for a while.

    Raises:
        StorageError: when storage still fails at the last attempt.
        AccessError: when storage refuses access.
        Exception: any other error of `read`: damage.
    """

    def report(attempt: tenacity.RetryCallState) -> None:
        error = attempt.outcome and attempt.outcome.exception()
        logger.warning("reading %s failed (%s): trying again", what, error and cause(error))

    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_transient),
        stop=tenacity.stop_after_attempt(READ_ATTEMPTS),
        wait=tenacity.wait_exponential(multiplier=0.5),
        before_sleep=report,
        reraise=True,
    )
    try:
        return attempts(read)
    except Exception as error:
        if is_transient(error):
            raise StorageError(
                f"{what} cannot be read: {cause(error)}; nothing was changed: the same command "
                "continues when the storage can be read again"
            ) from error
        failure = failed(f"{what} cannot be read", error)
        if isinstance(failure, AccessError):
            raise failure from error
        raise


def is_transient(error: BaseException) -> bool:
    """Returns whether an error is of storage that fails for a while."""
    return bool(TRANSIENT.search(str(error))) or isinstance(failed("", error), StorageError)


def restore(
    manager: ocp.CheckpointManager, step: int, abstract: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state and the data item of a step.

    Args:
        manager: of the workdir's checkpoints.
        step: number of the checkpoint.
        abstract: shapes and shardings of the state.

    Raises:
        ValueError: when the arrays are not those that were saved.
        Exception: others, as Orbax finds damage.
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
    if int(state.step) != step:
        raise ValueError(f"it holds step {int(state.step)}")
    return state, data


def check_model(manager: ocp.CheckpointManager, info: WeightsInfo) -> None:
    """Checks that the newest checkpoint with a readable description is of this model.

    Raises:
        UserError: when it is not.
    """
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
            theirs = WeightsInfo.from_json(meta["meta"])
        except Exception:  # damaged: `restore_newest` reports it
            continue
        if (theirs.model, theirs.num_classes) != (info.model, info.num_classes):
            raise UserError(
                f"checkpoint {step} in {manager.directory} is of another run: {theirs.model} of "
                f"{theirs.num_classes} classes, expected {info.model} of {info.num_classes}"
            )
        return


def restore_newest(
    manager: ocp.CheckpointManager, abstract: TrainState
) -> tuple[TrainState, dict[str, Any]] | None:
    """Returns the state and the data item of the newest undamaged checkpoint; None without any.

    Damaged ones that are newer are named in the log, and renamed to STEP.damaged.

    Raises:
        StorageError: when storage fails; it proves no damage.
        AccessError: when storage refuses access.
        UserError: when there are checkpoints, and all are damaged.
    """
    damage: dict[int, str] = {}
    for step in sorted(manager.all_steps(), reverse=True):
        what = f"checkpoint {step} in {manager.directory}"
        try:
            with all_or_none(), damage_as_sentence():
                found = reading(functools.partial(restore, manager, step, abstract), what)
        except (StorageError, AccessError):
            raise
        except UserError as error:
            damage[step] = str(error)
            continue
        with all_or_none():
            for newer, reason in damage.items() if jax.process_index() == 0 else ():
                logger.warning("checkpoint %d is damaged (%s): using %d", newer, reason, step)
                set_aside(epath.Path(manager.directory) / str(newer))
        if damage:
            manager.reload()
        return found
    folder = epath.Path(manager.directory)
    aside = [path.name for path in children(folder) if path.name.endswith(DAMAGED)]
    if damage or aside:
        reasons = "; ".join([f"{step}: {reason}" for step, reason in damage.items()] + aside)
        raise UserError(
            f"no checkpoint in {folder} can be read ({reasons}): repair one, or start again with "
            "another --workdir"
        )
    return None


@contextlib.contextmanager
def damage_as_sentence() -> Iterator[None]:
    """Turns the error of reading a damaged checkpoint into a UserError."""
    try:
        yield
    except (StorageError, AccessError):
        raise
    except Exception as error:
        raise UserError(cause(error)) from error


def set_aside_unreadable(folder: epath.Path) -> None:
    """Sets checkpoints aside whose metrics, which the manager reads, are damaged."""
    for path in whole_steps(folder).values():
        metrics = path / "metrics" / "metrics"
        if metrics.exists():
            try:
                json.loads(reading(metrics.read_text, os.fspath(metrics)))
            except (StorageError, AccessError):
                raise
            except ValueError:
                logger.warning("checkpoint %s is damaged: its metrics cannot be read", path.name)
                set_aside(path)


def abstract_state(state: Any, shardings: Any) -> Any:
    """Returns shapes with shardings, as Orbax restores them."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )
