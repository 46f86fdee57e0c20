"""Reads weights from any repository on the hub that holds a MambaOut in timm's layout."""

import json
from pathlib import Path
from typing import Any

from mambaout_jax.errors import UserError, first_line
from mambaout_jax.files import read_bytes
from mambaout_jax.models.pretrained import HUB_FILE
from mambaout_jax.weights import hub
from mambaout_jax.weights.hub_config import CONFIG_FILE, INFO_FILE, from_timm
from mambaout_jax.weights.info import WeightsInfo
from mambaout_jax.weights.integrity import digest
from mambaout_jax.weights.torch_file import read_state_dict
from mambaout_jax.weights.torch_layout import check_shapes, from_torch

PREFIX = "hf-hub:"  # of names; timm's


def split_name(name: str) -> tuple[str, str | None]:
    """Returns the repository and the revision of "hf-hub:OWNER/NAME[@REVISION]".

    Raises:
        UserError: the name has no owner, or more than one slash.
    """
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UserError(f"{name!r} is not a repository: expected {PREFIX}OWNER/NAME[@REVISION]")
    return repository, revision or None


def read_repository(
    name: str, *, allow_non_finite: bool = False
) -> tuple[dict[str, Any], WeightsInfo]:
    """Returns the weights of a repository and their description.

    The description is that of mambaout_jax.json, which `push_to_hub` writes; where there is none,
    that of timm's config.json. The token is huggingface_hub's.

    Args:
        name: "hf-hub:OWNER/NAME[@REVISION]".
        allow_non_finite: whether to accept NaN and infinity.

    Raises:
        UserError: the name is not a repository's, the hub cannot be reached, or the repository
            holds no MambaOut or is damaged.
    """
    repository, revision = split_name(name)
    info = from_timm(read_json(hub.download(repository, CONFIG_FILE, revision=revision)), name)
    ours = hub.download_if_there(repository, INFO_FILE, revision=revision)
    if ours is not None:
        info = WeightsInfo.from_json(read_json(ours), name)
    path = hub.download(repository, HUB_FILE, revision=revision)
    network = info.create_model()
    tensors = read_state_dict(path, lambda shapes: check_shapes(shapes, network, name)).tensors
    params = from_torch(tensors, network, allow_non_finite=allow_non_finite)
    if info.digest and digest(params) != info.digest:
        raise UserError(
            f"{HUB_FILE} of {name} is not what its {INFO_FILE} describes: push both again, or "
            f"remove {INFO_FILE}"
        )
    return params, info


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
        UserError: the file is not JSON.
    """
    try:
        return json.loads(read_bytes(path))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is damaged: {first_line(error)}") from error
