"""Checkpoints of a run, by Orbax: asynchronous, the newest few and the best.

WORKDIR/checkpoints/STEP holds the items `params`, `ema_params` (where the recipe averages),
`optimizer`, `data` (the position of the data iterator and the metrics so far), `meta` (a
`mambaout_jax.weights.info.WeightsInfo`) and, after an evaluation, `metrics`. So each checkpoint
can be loaded as weights by itself.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import threading
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from mambaout_jax.bucket import absolute, children, failed, is_bucket
from mambaout_jax.errors import AccessError, StorageError, UserError
from mambaout_jax.files import check_files, retrying, write_json, writing
from mambaout_jax.runtime.processes import all_or_none
from mambaout_jax.runtime.storage import is_transient, reading, system_error
from mambaout_jax.training.state import TrainState
from mambaout_jax.weights.info import WeightsInfo, score, with_checksum
from mambaout_jax.weights.integrity import fingerprints
from mambaout_jax.weights.steps import (
    METADATA,
    is_step,
    mark_copied_steps,
    remove_unfinished,
    set_aside,
    whole_steps,
)

logger = logging.getLogger(__name__)

# What reading JSON of another kind raises; RecursionError: of brackets that go too deep.
NOT_AS_SAVED = (ValueError, KeyError, TypeError, OverflowError, RecursionError)
SAVING = "async_save"  # Orbax's name of its threads that write checkpoints


@contextlib.contextmanager
def open_checkpoints(workdir: epath.Path, keep: int) -> Iterator[ocp.CheckpointManager]:
    """Yields the manager of a workdir's checkpoints, which keeps the `keep` newest and the best.

    Raises:
        UserError: when their folder cannot be read or made.
    """
    folder = absolute(workdir) / "checkpoints"
    with all_or_none():
        if jax.process_index() == 0:
            if folder.exists() and not folder.is_dir():
                raise UserError(f"{folder} is a file, not a folder: move it away")
            mark_copied_steps(folder)
            set_aside_unreadable(folder)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(
            [
                policies.LatestN(keep),
                policies.BestN(
                    get_metric_fn=score,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        ),
        best_fn=score,
        step_name_format=ocp.step.standard_name_format(),
        enable_async_checkpointing=True,
        cleanup_tmp_directories=True,
    )
    with writing(folder):
        manager = ocp.CheckpointManager(folder, options=options)
    try:
        yield manager
    except BaseException:
        # Of several processes the others may be gone, and the end of a save would wait for them.
        if jax.process_count() == 1:
            with contextlib.suppress(Exception):  # the error that is raised is the same
                manager.close()
        raise
    manager.close()


def items_of(state: TrainState) -> dict[str, Any]:
    """Returns the items of a checkpoint that hold arrays; `ema_params` may be None."""
    return {
        "params": state.params,
        "ema_params": state.ema_params,
        "optimizer": {"step": state.step, "opt_state": state.opt_state},
    }


@contextlib.contextmanager
def named_failure(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Reports a failed save as one sentence, also a save that was still running.

    Raises:
        StorageError: when storage fails for a while.
        FullError: when it has no space.
        UserError: names the cause and the last good checkpoint.
    """
    try:
        yield
    except Exception as error:
        failure = failed(f"cannot save to {manager.directory}", system_error(error))
        if is_transient(error):
            failure = StorageError(str(failure))
        with contextlib.suppress(Exception):  # what failed first is reported
            clear_failed_save(manager)
        if isinstance(failure, StorageError | AccessError):
            good = "the checkpoints before it are good"
        else:
            latest = manager.latest_step()
            good = (
                "there is no checkpoint yet" if latest is None else f"checkpoint {latest} is good"
            )
        raise type(failure)(f"{failure}; {good}") from error


def clear_failed_save(manager: ocp.CheckpointManager) -> None:
    """Removes what a failed save left on a disk, once its threads are done.

    The save may have become whole in the meantime: Orbax's own record of it is written apart.
    """
    if jax.process_count() == 1 and not is_bucket(manager.directory):
        for thread in threading.enumerate():
            if thread.name == SAVING:
                thread.join()
        with contextlib.suppress(Exception):  # or else the next save raises it again
            manager.check_for_errors()
        remove_unfinished(epath.Path(manager.directory))
    manager.reload()


def save(
    manager: ocp.CheckpointManager,
    state: TrainState,
    data: dict[str, Any],
    info: WeightsInfo,
    metrics: dict[str, float] | None,
    *,
    wait: bool = False,
) -> None:
    """Starts to save the state; returns once the arrays are copied from the devices.

    On a disk that fails or is full for a while further attempts are made; so they are if the save
    before it turns out to have failed, and this one takes its place.

    Args:
        manager: of the workdir's checkpoints.
        state: the state after `state.step` steps.
        data: what else a resumed run continues from, as JSON stores it.
        info: what the weights are.
        metrics: of an evaluation at this step, None without one.
        wait: whether to return only when all is written, as the last save of a process must.

    Raises:
        UserError: when this save, or the one before it, cannot be written.
    """
    arrays = {name: tree for name, tree in items_of(state).items() if tree is not None}
    info = dataclasses.replace(info, fingerprints=fingerprints(**arrays))
    items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
    data = with_checksum(data)
    items |= {"data": ocp.args.JsonSave(data), "meta": ocp.args.JsonSave(info.to_json())}
    args = ocp.args.Composite(**items)

    def attempt(wait: bool) -> None:
        with named_failure(manager):
            manager.save(int(state.step), args=args, metrics=metrics)
            if wait:
                manager.wait_until_finished()

    # The processes of a run would have to agree on an attempt; the clients of a bucket make theirs.
    if jax.process_count() > 1 or is_bucket(manager.directory):
        attempt(wait)
        return
    for trial in retrying():
        with trial:
            attempt(wait or trial.retry_state.attempt_number > 1)


def amend(
    manager: ocp.CheckpointManager,
    step: int,
    data: dict[str, Any],
    info: WeightsInfo,
    metrics: dict[str, float],
) -> None:
    """Adds an evaluation to a checkpoint that was saved without it; arguments as in `save`.

    Raises:
        UserError: when it cannot be written.
    """
    folder = epath.Path(manager.directory) / str(step)
    with all_or_none():
        if jax.process_index() == 0:
            saved = WeightsInfo.from_json(json.loads((folder / "meta" / "metadata").read_text()))
            info = dataclasses.replace(info, fingerprints=saved.fingerprints)
            write_json(folder / "metrics" / "metrics", metrics)
            write_json(folder / "meta" / "metadata", info.to_json())
            write_json(folder / "data" / "metadata", with_checksum(data))
    manager.reload()


def set_aside_unreadable(folder: epath.Path) -> None:
    """Sets checkpoints aside of which the manager could not read the time or the metrics.

    So are files in the place of a step, where a later save would fail.
    """
    for path in [] if is_bucket(folder) else children(folder):
        if is_step(path) and not path.is_dir():
            logger.warning("%s is a file, not a checkpoint: renaming it", path)
            set_aside(path)
    for step, path in whole_steps(folder).items():
        try:
            check_files(path)
            if not has_readable_time(step, path):
                raise UserError(f"{METADATA} cannot be read")
            if not has_readable_metrics(path):
                raise UserError("its metrics cannot be read")
        except (StorageError, AccessError):
            raise
        except UserError as error:
            logger.warning("checkpoint %d is damaged: %s", step, error)
            set_aside(path)


def has_readable_time(step: int, path: epath.Path) -> bool:
    """Returns whether Orbax can read when a checkpoint was saved.

    It takes the time of the folder where METADATA is missing or no JSON.
    """
    found = ocp.step.Metadata(step, path)
    try:
        return bool(reading(lambda: found.commit_timestamp, f"{path / METADATA}"))
    except NOT_AS_SAVED:
        return False


def has_readable_metrics(step: epath.Path) -> bool:
    """Returns whether a checkpoint has no metrics, or those that its description has.

    A damaged description is found when the checkpoint is restored.
    """
    metrics, meta = step / "metrics" / "metrics", step / "meta" / "metadata"
    if not metrics.exists():
        return True
    try:
        found = float(score(json.loads(reading(metrics.read_text, os.fspath(metrics)))))
    except (StorageError, AccessError):
        raise
    except NOT_AS_SAVED:
        return False
    try:
        described = score(json.loads(reading(meta.read_text, os.fspath(meta)))["metrics"])
    except (StorageError, AccessError):
        raise
    except (*NOT_AS_SAVED, OSError):
        return True
    return found == described or math.isnan(found)
