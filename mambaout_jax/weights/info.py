"""The description stored with weights: the network, preprocessing, classes and checksums."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mambaout_jax.data.preprocess import Preprocessing
from mambaout_jax.errors import UserError, first_line
from mambaout_jax.models.mambaout import MambaOut, create_model
from mambaout_jax.models.upernet import PREFIX

# Version of a checkpoint's format, in the record's "format" key. A record without the key is older:
# it has no checksum and no fingerprints, and is read as before. Any change that this version cannot
# read, such as a new field, takes the next number.
FORMAT = 1


class NewerFormatError(UserError):
    """A checkpoint that a later version of this package wrote. It is not damaged."""


# The results that decide which checkpoint is best, in percent: an evaluation has one of them.
SCORES = ("top1", "miou")


def score(results: Mapping[str, float]) -> float:
    """Returns the result that decides which checkpoint is best.

    Raises:
        KeyError: there is none.
    """
    found = [results[name] for name in SCORES if name in results]
    if not found:
        raise KeyError(f"none of {', '.join(SCORES)}")
    return found[0]


@dataclasses.dataclass(frozen=True)
class WeightsInfo:
    """The record of weights, stored beside them as JSON.

    Attributes:
        model: the variant's name.
        num_classes: width of the logits.
        preprocessing: the evaluation preprocessing of these weights.
        overrides: fields of `MambaOut` in which the network differs from the variant.
        class_names: a name for each logit, in order; None if unknown.
        source: where the weights come from: a file, a hub name or a run.
        averaged: whether the checkpoint has `ema_params`, which are then the ones to use.
        metrics: results of an evaluation; `score` decides which step of a run is best.
        digest: `integrity.digest` of the parameters; "" in the checkpoints of a run.
        fingerprints: `integrity.fingerprints` of the items of a run's checkpoint.
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
    fingerprints: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns the record in JSON's types, with the format's version and a checksum."""
        record = {"format": FORMAT, **dataclasses.asdict(self)}
        return with_checksum(record)

    @classmethod
    def from_json(cls, record: Mapping[str, Any], name: str = "these weights") -> "WeightsInfo":
        """Returns the record that `to_json` wrote.

        Args:
            record: the JSON.
            name: how an error names the weights.

        Raises:
            NewerFormatError: the format is newer than this package.
            UserError: the record is damaged: a field is missing, unknown or of another type, or
                the checksum does not match.
        """
        try:
            fields = dict(record)
            version = fields.pop("format", 0)
            if version not in range(FORMAT + 1):
                raise NewerFormatError(
                    f"{name} has checkpoint format {version!r}, and this version of mambaout_jax "
                    f"reads formats up to {FORMAT}: update mambaout_jax"
                )
            if version > 0 and fields.pop("checksum") != _checksum(record):
                raise UserError(f"the description of {name} is damaged: its checksum differs")
            fields = {key: _tuples(value) for key, value in fields.items()}
            fields["preprocessing"] = Preprocessing(**fields["preprocessing"])
            return cls(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"the description of {name} is damaged: {first_line(error)}") from error

    @property
    def task(self) -> str:
        """What the network was trained for: "classification" or "segmentation"."""
        return "segmentation" if self.model.startswith(PREFIX) else "classification"

    def check_task(self, task: str, instead: str) -> None:
        """Checks that the weights are of a task.

        Args:
            task: the one that is needed.
            instead: what weights of the other one are for, in an error.

        Raises:
            UserError: they are of another.
        """
        if self.task != task:
            raise UserError(f"{self.model} is a network of {self.task}, not of {task}: {instead}")

    def create_model(self, **options: Any) -> MambaOut:
        """Returns the module that takes these weights; `options` as in `create_model`."""
        options = {"num_classes": self.num_classes, **self.overrides, **options}
        return create_model(self.model, **options)


def with_checksum(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a JSON record with its checksum."""
    return {**record, "checksum": _checksum(record)}


def without_checksum(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a JSON record without its checksum, which older records do not have.

    Raises:
        ValueError: the checksum differs.
    """
    fields = dict(record)
    if fields.pop("checksum", _checksum(record)) != _checksum(record):
        raise ValueError("its checksum differs")
    return fields


def _checksum(record: Mapping[str, Any]) -> str:
    """Returns the checksum of all fields but the checksum itself."""
    fields = {key: value for key, value in record.items() if key != "checksum"}
    text = json.dumps(fields, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _tuples(value: Any) -> Any:
    """Returns `value` with tuples for JSON's lists, at any depth."""
    if isinstance(value, list | tuple):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value
