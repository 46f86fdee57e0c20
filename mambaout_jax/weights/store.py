"""Weights as Orbax checkpoints: written by the converter, read from there and from any run.

A converted checkpoint is a directory with the items `params` (float32 arrays) and `meta` (the JSON
of a `WeightsInfo`). Each step in a run's `checkpoints/` has the same two, and `ema_params` if the
recipe averages parameters. Directories may be in a bucket (gs://...).
"""

import contextlib
import dataclasses
import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mambaout_jax.bucket import absolute, failed, http_status, io_errors, is_bucket
from mambaout_jax.errors import UserError, first_line
from mambaout_jax.files import check_files
from mambaout_jax.runtime.event_loops import hide_later_errors
from mambaout_jax.runtime.storage import reading
from mambaout_jax.weights.info import WeightsInfo, score
from mambaout_jax.weights.integrity import digest, fingerprints
from mambaout_jax.weights.output import check_absent, check_space
from mambaout_jax.weights.shapes import mismatches, param_shapes, tree_shapes
from mambaout_jax.weights.steps import is_whole, remove_unfinished, whole_steps

logger = logging.getLogger(__name__)

T = TypeVar("T")


def save_weights(
    directory: epath.PathLike, params: Mapping[str, Any], info: WeightsInfo
) -> WeightsInfo:
    """Writes parameters and their description; the directory appears when it is complete.

    Args:
        directory: the output; must not exist yet.
        params: nested dict of float32 arrays.
        info: what they are.

    Returns:
        `info` as it was written, with the digest.

    Raises:
        UserError: the directory exists or cannot be written. Nothing of it is left.
    """
    directory = absolute(directory)
    check_absent(directory)
    check_space(directory, jax.tree.leaves(params))
    info = dataclasses.replace(info, averaged=False, digest=digest(params), fingerprints={})
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(info.to_json())
    )
    try:
        with _silent_absl(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(directory, args=items)
    except io_errors(directory, OSError, ValueError) as error:  # ValueError: TensorStore's
        raise _failed(f"cannot write {directory}", error) from error
    finally:
        if is_bucket(directory) or not directory.exists():
            _remove_unfinished(directory)
    return info


def load_weights(directory: epath.PathLike) -> tuple[dict[str, Any], WeightsInfo]:
    """Reads a converted checkpoint, one step of a run, or the best step of a run.

    Of a run's working directory the step with the best result is read, or the newest if none was
    evaluated; of a step with averaged parameters, these. The arrays are compared with the digest or
    the fingerprint in the description. Checkpoints of runs from before format 1 have neither.

    Returns:
        The parameters, numpy arrays of float32, and what they are.

    Raises:
        UserError: there are no weights, they are damaged, or they do not fit their description.
    """
    directory, info = _find(absolute(directory))
    item = "ema_params" if info.averaged else "params"
    params = _reading(directory, functools.partial(_restore, directory, item, info))
    if info.digest and digest(params) != info.digest:
        raise UserError(f"the weights in {directory} are damaged: their digest differs")
    if info.fingerprints.get(item) not in (None, fingerprints(params=params)["params"]):
        raise UserError(
            f"the weights in {directory} are damaged: the fingerprint of {item} differs"
        )
    return params, info


def _restore(directory: epath.Path, item: str, info: WeightsInfo) -> dict[str, Any]:
    """Reads the arrays of an item whose names and shapes are those of its description."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        metadata = checkpointer.metadata(directory / item).item_metadata
        if metadata is None:  # Orbax hides the error of reading it; this raises it
            with warnings.catch_warnings(action="ignore"):
                checkpointer.restore(directory / item)
            raise UserError(f"the weights in {directory} cannot be read: {item} has no metadata")
        if errors := mismatches(tree_shapes(metadata.tree), param_shapes(info.create_model())):
            raise UserError(
                f"the weights in {directory} do not fit {info.model}: {'; '.join(errors)}"
            )
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree)
        args = ocp.args.PyTreeRestore(restore_args=as_numpy)
        return checkpointer.restore(directory / item, args=args)


def _find(directory: epath.Path) -> tuple[epath.Path, WeightsInfo]:
    """Returns the directory of the items, and its description."""
    if (directory / "meta").exists():
        return directory, _read_info(directory)
    infos = {}
    for step, path in whole_steps(directory / "checkpoints").items():
        if (path / "meta").exists():
            infos[step] = path, _read_info(path)
        else:
            logger.warning("%s is no complete checkpoint: not considered", path)
    if not infos:
        raise UserError(
            f"no weights in {directory}: expected a converted checkpoint (params/ and meta/), a "
            "step of a run's checkpoints, or a run's working directory"
        )

    def rank(step: int) -> tuple[float, int]:
        metrics = infos[step][1].metrics
        return score(metrics) if metrics else -1.0, step

    return infos[max(infos, key=rank)]


def _read_info(directory: epath.Path) -> WeightsInfo:
    check_files(directory)

    def read() -> dict[str, Any]:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            return checkpointer.restore(directory / "meta", args=ocp.args.JsonRestore())

    record = _reading(directory, read)
    return WeightsInfo.from_json(record, f"the checkpoint {directory}")


def _remove_unfinished(directory: epath.Path) -> None:
    """Removes what a failed save left."""
    if is_bucket(directory):
        with contextlib.suppress(Exception):  # the bucket may refuse this too
            if not is_whole(directory):
                directory.rmtree(missing_ok=True)
        return
    remove_unfinished(directory.parent, directory.name)


def _reading(directory: epath.Path, read: Callable[[], T]) -> T:
    """Returns what `read` returns, after further attempts if storage fails for a while.

    Raises:
        StorageError: storage still fails.
        UserError: any other error, such as damage.
    """
    hide_later_errors()
    try:
        with _silent_absl():
            return reading(read, f"the checkpoint {directory}")
    except UserError:
        raise
    except Exception as error:  # damaged bytes make Orbax and TensorStore raise errors of any type
        raise _failed(f"the weights in {directory} cannot be read", error) from error


@contextlib.contextmanager
def _silent_absl() -> Iterator[None]:
    """Stops Orbax from logging tracebacks of the errors that are reported here."""
    absl_logger = logging.getLogger("absl")
    was, absl_logger.disabled = absl_logger.disabled, True
    try:
        yield
    finally:
        absl_logger.disabled = was


def _failed(what: str, error: BaseException) -> UserError:
    """Returns what to raise: a bucket's error, or a line without its middle.

    The ends of Orbax's messages say what failed and why.
    """
    if http_status(error):
        return failed(what, error)
    line = first_line(error, limit=10_000)
    return UserError(f"{what}: {line if len(line) <= 300 else f'{line[:150]} ... {line[-150:]}'}")
