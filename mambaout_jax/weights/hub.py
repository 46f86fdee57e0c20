"""The published weights on the Hugging Face hub.

Cache, offline mode (HF_HUB_OFFLINE), mirror (HF_ENDPOINT), resumption and tokens (HF_TOKEN) are
huggingface_hub's own.
"""

import hashlib
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from mambaout_jax.errors import UserError
from mambaout_jax.models.pretrained import HUB_FILE, HUB_OWNER, find_pretrained


def fetch(name: str) -> Path:
    """Returns the local file of the hub's weights `name`, downloaded if it is not in the cache.

    Raises:
        UserError: when the name is unknown, the hub cannot be reached or refuses, the file is not
            in the cache and the hub is switched off, or the file is damaged.
    """
    name = name.removeprefix(f"{HUB_OWNER}/")
    find_pretrained(name)
    repository = f"{HUB_OWNER}/{name}"
    try:
        path = Path(huggingface_hub.hf_hub_download(repository, HUB_FILE))
    except (errors.RepositoryNotFoundError, errors.RemoteEntryNotFoundError) as error:
        raise UserError(
            f"{constants.ENDPOINT} has no {repository}/{HUB_FILE}, or shows it with a token alone: "
            "set HF_TOKEN"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(_unreachable(repository, error)) from error
    except Exception as error:  # of the network's libraries, which differ between releases
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"{repository}/{HUB_FILE} cannot be fetched from {constants.ENDPOINT}: {reason}"
        ) from error
    _check(path)
    return path


def _unreachable(repository: str, error: BaseException) -> str:
    """Returns what to tell of a file that is neither in the cache nor to be had."""
    if constants.HF_HUB_OFFLINE:
        return (
            f"{repository} is not in the cache {constants.HF_HUB_CACHE} and HF_HUB_OFFLINE is set: "
            f"unset it, or give the path of the {HUB_FILE} downloaded elsewhere"
        )
    cause = error.__cause__ or error
    reason = (str(cause).strip() or type(cause).__name__).splitlines()[0][:200]
    return (
        f"{repository} is not in the cache {constants.HF_HUB_CACHE} and {constants.ENDPOINT} "
        f"cannot be reached ({reason}): check the network, or give the path of the {HUB_FILE} "
        "downloaded elsewhere"
    )


def _check(path: Path) -> None:
    """Compares a large file with the SHA-256 that the hub named it by in the cache."""
    blob = path.resolve()
    if not re.fullmatch("[0-9a-f]{64}", blob.name):
        return
    with blob.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != blob.name:
        raise UserError(f"{path} is damaged: remove {blob} to have it fetched again")
