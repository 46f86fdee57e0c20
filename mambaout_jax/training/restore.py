"""Reading the checkpoints of a run: the newest undamaged one becomes the state to continue from."""

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from mambaout_jax.bucket import children
from mambaout_jax.errors import AccessError, StorageError, UserError
from mambaout_jax.runtime.memory import is_exhausted
from mambaout_jax.runtime.processes import all_or_none
from mambaout_jax.runtime.storage import cause, reading
from mambaout_jax.training.checkpoint import items_of
from mambaout_jax.training.state import TrainState
from mambaout_jax.weights.info import NewerFormatError, WeightsInfo, without_checksum
from mambaout_jax.weights.integrity import fingerprints
from mambaout_jax.weights.steps import DAMAGED, set_aside

logger = logging.getLogger(__name__)


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


def restore(
    manager: ocp.CheckpointManager, step: int, abstract: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state and the data item of a step.

    Args:
        manager: of the workdir's checkpoints.
        step: number of the checkpoint.
        abstract: shapes and shardings of the state.

    Raises:
        ValueError: when the arrays or the data item are not those that were saved.
        Exception: others, as Orbax finds damage.
    """
    arrays = {name: tree for name, tree in items_of(abstract).items() if tree is not None}
    items = {name: ocp.args.StandardRestore(tree) for name, tree in arrays.items()}
    items |= {"data": ocp.args.JsonRestore(), "meta": ocp.args.JsonRestore()}
    found = manager.restore(step, args=ocp.args.Composite(**items))
    state = TrainState(
        step=found["optimizer"]["step"],
        params=found["params"],
        opt_state=found["optimizer"]["opt_state"],
        ema_params=found["ema_params"] if abstract.ema_params is not None else None,
    )
    data, info = without_checksum(found["data"]), WeightsInfo.from_json(found["meta"])
    if "batches" not in data:
        raise ValueError("its data item is incomplete")
    older = data.pop("fingerprint", None)
    if info.fingerprints not in ({}, fingerprints(**items_of(state))):
        raise ValueError("its arrays are not those that were saved")
    if older not in (None, int(state_fingerprint(state))):
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
        except NewerFormatError:
            raise
        except Exception:  # damaged: `restore_newest` reports it
            continue
        if (theirs.model, theirs.num_classes) != (info.model, info.num_classes):
            raise UserError(
                f"checkpoint {step} in {manager.directory} is of another run: {theirs.model} of "
                f"{theirs.num_classes} classes, expected {info.model} of {info.num_classes}"
            )
        return


@contextlib.contextmanager
def damage_as_sentence() -> Iterator[None]:
    """Turns the error of reading a damaged checkpoint into a UserError."""
    try:
        yield
    except (StorageError, AccessError):
        raise
    except Exception as error:
        if is_exhausted(error):  # the checkpoint may be whole
            raise
        raise UserError(cause(error)) from error


@jax.jit
def state_fingerprint(state: Any) -> jax.Array:
    """Returns the uint32 that checkpoints from before format 1 store to verify their arrays."""
    total = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(state):
        bits = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
        total = total * jnp.uint32(31) + bits.sum(dtype=jnp.uint32)
    return total


def abstract_state(state: Any, shardings: Any) -> Any:
    """Returns shapes with shardings, as Orbax restores them."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )
