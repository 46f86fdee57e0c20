"""Downloads weights from the Hugging Face hub.

The cache, offline mode (HF_HUB_OFFLINE), mirrors (HF_ENDPOINT), resumed downloads and tokens
(HF_TOKEN) are huggingface_hub's own.
"""

import contextlib
import hashlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants, errors, hf_hub_download

from mambaout_jax.errors import UserError, first_line
from mambaout_jax.models.pretrained import EMBEDDED, HUB_FILE, HUB_OWNER, find_pretrained


def fetch(name: str) -> Path:
    """Returns the local file of the weights `name` on the hub, downloaded if it is not cached.

    Raises:
        UserError: the name is unknown, the hub cannot be reached or refuses, the file is not cached
            in offline mode, or it is damaged.
    """
    name = name.removeprefix(f"{HUB_OWNER}/")
    find_pretrained(name)
    return download(f"{HUB_OWNER}/{name}", HUB_FILE)


def download(repository: str, file: str, *, revision: str | None = None) -> Path:
    """Returns the local copy of a repository's file, downloaded if it is not cached.

    Args:
        repository: "owner/name".
        file: its name.
        revision: a branch, tag or commit; None is "main".

    Raises:
        UserError: the hub cannot be reached or refuses, or the file is missing or damaged.
    """
    path, error = _try(repository, file, revision)
    if path is None:
        # The traceback of the network libraries would hide the message.
        raise UserError(_explain(error, repository, file, revision))
    return path


def download_if_there(
    repository: str, file: str, *, revision: str | None = None, token: str | None = None
) -> Path | None:
    """Returns what `download` returns; None if the repository has no such file.

    Without a network, None if the file is not in the cache, which does not list what is missing.

    Raises:
        UserError: the hub refuses, or the file is damaged.
    """
    path, error = _try(repository, file, revision, token)
    if path is None and not isinstance(error, errors.EntryNotFoundError):
        raise UserError(_explain(error, repository, file, revision))
    return path


def _try(
    repository: str, file: str, revision: str | None, token: str | None = None
) -> tuple[Path | None, Exception]:
    """Returns the local copy of a file, or None and the error."""
    try:
        with silent_retries():
            path = Path(hf_hub_download(repository, file, revision=revision, token=token))
    except Exception as error:  # the network libraries' own, which differ between releases
        return None, error
    _check(path)
    return path, Exception()


@contextlib.contextmanager
def silent_retries() -> Iterator[None]:
    """Hides huggingface_hub's log lines of failed attempts; its progress bars stay."""
    logger = logging.getLogger("huggingface_hub")
    was = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(was)


def _explain(error: Exception, repository: str, file: str, revision: str | None) -> str:
    """Returns the message for a download that failed."""
    if isinstance(error, errors.LocalEntryNotFoundError):
        remedy = (
            f"give the path of a {HUB_FILE} that was downloaded elsewhere ({EMBEDDED}, on "
            "handwritten digits, ships with this package and needs no network)"
        )
        missing = f"{repository} is not in the cache {constants.HF_HUB_CACHE}"
        if constants.HF_HUB_OFFLINE:
            return f"{missing} and HF_HUB_OFFLINE is set: unset it, or {remedy}"
        reason = first_line(error.__cause__ or error)
        return (
            f"{missing} and {constants.ENDPOINT} cannot be reached ({reason}): check the network, "
            f"or {remedy}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"{constants.ENDPOINT}/{repository} has no revision {revision!r}: expected a branch, "
            "a tag or a commit"
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.EntryNotFoundError):
        return (
            f"{constants.ENDPOINT} has no {repository}/{file}, or needs a token to show it: "
            "set HF_TOKEN"
        )
    if isinstance(error, errors.HFValidationError):
        return f"{repository!r} is not a repository name: expected hf-hub:OWNER/NAME[@REVISION]"
    return f"cannot download {repository}/{file} from {constants.ENDPOINT}: {first_line(error)}"


def _check(path: Path) -> None:
    """Compares a file with its SHA-256, which is its name in the cache."""
    blob = path.resolve()
    if not re.fullmatch("[0-9a-f]{64}", blob.name):
        return
    with blob.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != blob.name:
        raise UserError(f"{path} is damaged: remove {blob} to download it again")
