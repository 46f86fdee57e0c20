"""Weights in Orbax: what a conversion writes, and what any checkpoint of a run holds as well.

A directory of weights is a composite checkpoint, `params/` (float32 arrays) and `meta/` (the JSON
of a `WeightsInfo`). A step of a run's `checkpoints/` has the same two, beside the optimizer's state
and, where parameters are averaged, `ema_params/`. Directories may be remote (gs://...).
"""

import contextlib
import dataclasses
import hashlib
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict

from mambaout_jax.bucket import absolute, failed, http_status, io_errors, is_bucket
from mambaout_jax.data.preprocess import Preprocessing
from mambaout_jax.errors import UserError
from mambaout_jax.models.mambaout import MambaOut, create_model
from mambaout_jax.weights.shapes import mismatches, param_shapes, tree_shapes
from mambaout_jax.weights.steps import is_whole, whole_steps
from mambaout_jax.weights.torch_file import check_absent, check_space

# What Orbax raises of an unreadable checkpoint.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError)


@dataclasses.dataclass(frozen=True)
class WeightsInfo:
    """What weights are, as it stands beside them in JSON.

    Attributes:
        model: the variant's name.
        num_classes: width of the logits.
        preprocessing: the evaluation preprocessing that belongs to the weights.
        overrides: fields of `MambaOut` in which the network differs from the variant.
        class_names: a name for each logit, in order; None where they are not known.
        source: where the weights come from: a file, a hub name or a run.
        averaged: whether the checkpoint holds `ema_params`, which are then the ones to use.
        metrics: what was measured of them; "top1" (percent) decides which step of a run is best.
        digest: `digest` of the parameters; "" where it was not taken, as in a run's checkpoints.
    """

    model: str
    num_classes: int
    preprocessing: Preprocessing
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    source: str = ""
    averaged: bool = False
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    digest: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns the record in JSON's types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "WeightsInfo":
        """Returns the record that `to_json` wrote.

        Raises:
            UserError: when a field is missing, unknown or of another kind.
        """
        try:
            fields = {key: _tuples(value) for key, value in record.items()}
            fields["preprocessing"] = Preprocessing(**fields["preprocessing"])
            return cls(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"the description of the weights is damaged: {error}") from error

    def create_model(self, **options: Any) -> MambaOut:
        """Returns the module that takes these weights; `options` as in `create_model`."""
        options = {**self.overrides, **options}
        return create_model(self.model, num_classes=self.num_classes, **options)


def _tuples(value: Any) -> Any:
    """Returns `value` with tuples for JSON's lists, at any depth."""
    if isinstance(value, list | tuple):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value


def digest(params: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of all parameters: their paths in order, shapes and float32 values."""
    sha = hashlib.sha256()
    for path, leaf in sorted(flatten_dict(params).items()):
        sha.update(f"{'/'.join(path)}{np.shape(leaf)}".encode())
        sha.update(np.ascontiguousarray(leaf, dtype="<f4").data)
    return sha.hexdigest()


def save_weights(
    directory: epath.PathLike, params: Mapping[str, Any], info: WeightsInfo
) -> WeightsInfo:
    """Writes parameters and their description; the directory appears when it is whole.

    Args:
        directory: where to; must not exist yet.
        params: nested dict of float32 arrays.
        info: what they are.

    Returns:
        `info` with the digest, as it was written.

    Raises:
        UserError: when the directory exists or cannot be written; nothing of it is left then.
    """
    directory = absolute(directory)
    check_absent(directory)
    check_space(directory, jax.tree.leaves(params))
    info = dataclasses.replace(info, digest=digest(params))
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(info.to_json())
    )
    try:
        with _silent_absl(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            checkpointer.save(directory, args=items)
    except io_errors(directory, OSError, ValueError) as error:  # ValueError: TensorStore's
        raise _failed(f"the output {directory} cannot be written", error) from error
    finally:
        if is_bucket(directory):
            _remove_unfinished(directory)
        elif not directory.exists():
            _remove_halves(directory)
    return info


def _remove_unfinished(directory: epath.Path) -> None:
    """Removes what a failed save left in a bucket, if the bucket still can be written."""
    with contextlib.suppress(Exception):
        if not is_whole(directory):
            directory.rmtree(missing_ok=True)


def _remove_halves(directory: epath.Path) -> None:
    """Removes what a failed save left, until its writes under way no longer add to it."""
    unseen = 0
    for _ in range(100):
        halves: list[epath.Path] = []
        with contextlib.suppress(OSError):
            halves += directory.parent.glob(f"{directory.name}.orbax-checkpoint-tmp*")
            for half in halves:
                half.rmtree()
        unseen = 0 if halves else unseen + 1
        if unseen == 3:
            return
        time.sleep(0.1)


def load_weights(directory: epath.PathLike) -> tuple[dict[str, Any], WeightsInfo]:
    """Reads the weights of a conversion, of a step of a run, or of a run's best step.

    Of a run's working directory the step of the highest top-1 is taken, or the newest where none
    was evaluated. Averaged parameters are preferred where there are any.

    Returns:
        The parameters, numpy arrays of float32, and what they are.

    Raises:
        UserError: when there are no weights, or they do not fit what is written of them.
    """
    directory, info = _find(absolute(directory))
    item = "ema_params" if info.averaged else "params"
    with _damage(directory), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        found = checkpointer.metadata(directory / item).item_metadata.tree
        if errors := mismatches(tree_shapes(found), param_shapes(info.create_model())):
            raise UserError(
                f"the weights in {directory} do not fit {info.model}: {'; '.join(errors)}"
            )
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), found)
        args = ocp.args.PyTreeRestore(restore_args=as_numpy)
        params = checkpointer.restore(directory / item, args=args)
    if info.digest and digest(params) != info.digest:
        raise UserError(f"the weights in {directory} are damaged: their digest is another")
    return params, info


def _find(directory: epath.Path) -> tuple[epath.Path, WeightsInfo]:
    """Returns the directory that holds `params`, and its description."""
    if (directory / "meta").exists():
        return directory, _read_info(directory)
    steps = whole_steps(directory / "checkpoints")
    if not steps:
        raise UserError(
            f"no weights in {directory}: expected a converted checkpoint (params/ and meta/), a "
            "step of a run's checkpoints, or a run's working directory"
        )
    infos = {step: (path, _read_info(path)) for step, path in steps.items()}
    best = max(infos, key=lambda step: (infos[step][1].metrics.get("top1", -1.0), step))
    return infos[best]


def _read_info(directory: epath.Path) -> WeightsInfo:
    with _damage(directory), ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        record = checkpointer.restore(directory / "meta", args=ocp.args.JsonRestore())
    return WeightsInfo.from_json(record)


@contextlib.contextmanager
def _damage(directory: epath.Path) -> Iterator[None]:
    """Turns what Orbax raises of an unreadable checkpoint into a UserError."""
    try:
        with _silent_absl():
            yield
    except UserError:
        raise
    except io_errors(directory, *_DAMAGE) as error:
        raise _failed(f"the weights in {directory} cannot be read", error) from error


@contextlib.contextmanager
def _silent_absl() -> Iterator[None]:
    """Keeps Orbax from logging tracebacks of the errors that are reported here."""
    logger = logging.getLogger("absl")
    was, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was


def _failed(what: str, error: BaseException) -> UserError:
    """Returns what to raise, with the error's first line without its middle.

    The ends of Orbax's messages say what and why.
    """
    if http_status(error):
        return failed(what, error)
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    line = line if len(line) <= 300 else f"{line[:150]} ... {line[-150:]}"
    return UserError(f"{what}: {line}")
