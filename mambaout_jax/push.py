"""Uploads weights to the Hugging Face hub, as a repository that timm and this package load."""

import dataclasses
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from etils import epath
from huggingface_hub import CommitOperationAdd, HfApi, constants, errors

from mambaout_jax.errors import UserError, first_line
from mambaout_jax.files import read_bytes
from mambaout_jax.model_card import CURVES, METRICS, RUN_CONFIG, model_card, run_command
from mambaout_jax.models.mambaout import create_model
from mambaout_jax.models.pretrained import HUB_FILE, variant_preprocessing
from mambaout_jax.models.variants import VARIANTS
from mambaout_jax.weights import hub
from mambaout_jax.weights.hub_config import CONFIG_FILE, INFO_FILE, to_timm
from mambaout_jax.weights.hub_repository import read_json
from mambaout_jax.weights.info import WeightsInfo
from mambaout_jax.weights.integrity import digest
from mambaout_jax.weights.load import read_weights
from mambaout_jax.weights.shapes import param_shapes, tree_shapes
from mambaout_jax.weights.torch_file import write_state_dict
from mambaout_jax.weights.torch_layout import to_torch

logger = logging.getLogger(__name__)


def push_to_hub(
    weights: epath.PathLike | Mapping[str, Any],
    repository: str,
    *,
    info: WeightsInfo | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Uploads weights as one commit: model.safetensors in timm's layout, config.json, a model card.

    `timm.create_model("hf-hub:OWNER/NAME", pretrained=True)` and
    `load_pretrained("hf-hub:OWNER/NAME")` load them. A run's working directory adds its curves, its
    metrics and the command that trains it again. After an upload that broke off, the same call
    continues: files that the hub has are not sent again.

    Args:
        weights: what `read_weights` takes, such as a run's working directory; or parameters.
        repository: "OWNER/NAME"; is made if it does not exist.
        info: what parameters are, as `read_weights` returns it; found by their shapes if None.
        private: whether a new repository is private; None is the owner's default.
        token: of the hub, with the right to write; None is huggingface_hub's, such as HF_TOKEN.
        revision: a branch; is made if it does not exist. None is "main".

    Returns:
        The address of the repository.

    Raises:
        UserError: there is no token, the weights cannot be read, the repository holds something
            else or may not be written, or the hub cannot be reached. Nothing is committed then.
    """
    name = repository.removeprefix("hf-hub:")
    if name.count("/") != 1 or "@" in name:
        raise UserError(f"{repository!r} is not a repository name: expected OWNER/NAME")
    token = token or huggingface_hub.get_token()
    if not token:
        raise UserError(
            f"no token to push to {name}: set HF_TOKEN, or run `hf auth login`, with a token that "
            "may write"
        )
    with tempfile.TemporaryDirectory() as folder:
        files = _write_files(Path(folder), weights, info, name)
        try:
            with hub.silent_retries():
                _commit(HfApi(token=token), name, files, private, revision)
        except UserError:
            raise
        except Exception as error:  # the network libraries' own, which differ between releases
            raise UserError(_explain(error, name)) from None
    return f"{constants.ENDPOINT}/{name}"


def describe(params: Mapping[str, Any]) -> WeightsInfo:
    """Returns the description of parameters of unknown origin.

    Raises:
        UserError: they fit no variant.
    """
    shapes = tree_shapes(params)
    classes = shapes.get(("head", "fc2", "bias"), (0,))[0]
    stages = sorted({path[0] for path in shapes if path[0].startswith("stages_")})
    blocks = {path[:2] for path in shapes if len(path) > 1 and path[1].startswith("blocks_")}
    depths = tuple(sum(block[0] == stage for block in blocks) for stage in stages)
    for name, variant in VARIANTS.items():
        if variant.depths != depths:  # its shapes need not be traced
            continue
        if shapes == dict(param_shapes(create_model(name, num_classes=classes))):
            return WeightsInfo(name, classes, variant_preprocessing(name))
    raise UserError("these parameters fit no variant: expected info=, as read_weights returns it")


def _write_files(
    folder: Path, weights: Any, info: WeightsInfo | None, name: str
) -> dict[str, Path]:
    """Writes the files of the repository and returns them by their names."""
    run = None
    if isinstance(weights, Mapping):
        params, info = weights, info or describe(weights)
    else:
        params, info = read_weights(weights)
        run = epath.Path(weights)
    info.check_task("classification", "push uploads timm's layout, which has no such network")
    info = dataclasses.replace(info, averaged=False, digest=digest(params), fingerprints={})
    config = to_timm(info)  # refuses what timm does not have, before anything is written
    network = info.create_model()
    write_state_dict(folder / HUB_FILE, to_torch(params, network, layout="timm"))
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    (folder / INFO_FILE).write_text(json.dumps(info.to_json(), indent=2) + "\n")
    command, curves = "", False
    if run is not None and (run / "checkpoints").is_dir():
        for theirs, ours in ((CONFIG_FILE, RUN_CONFIG), (METRICS, METRICS), (CURVES, CURVES)):
            if (run / theirs).exists():
                (folder / ours).write_bytes(read_bytes(run / theirs))
        curves = (folder / CURVES).exists()
        if (folder / RUN_CONFIG).exists():
            command = run_command(read_json(folder / RUN_CONFIG))
    card = model_card(name, info, tree_shapes(params), command=command, curves=curves)
    (folder / "README.md").write_text(card)
    return {path.name: path for path in sorted(folder.iterdir())}


def _commit(
    api: HfApi, name: str, files: dict[str, Path], private: bool | None, revision: str | None
) -> None:
    """Makes the repository and the branch where they are missing, and one commit of all files."""
    try:
        found = api.model_info(name)
    except errors.RepositoryNotFoundError:
        found = None
    if found is not None:
        _check_repository(api, name, found, read_json(files[CONFIG_FILE]), private, revision)
    else:
        api.create_repo(name, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(name, branch=revision, exist_ok=True)
    operations = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=file)
                  for path, file in files.items()]  # fmt: skip
    message = f"{read_json(files[CONFIG_FILE])['architecture']}, by mambaout_jax"
    api.create_commit(name, operations, commit_message=message, revision=revision)


def _check_repository(
    api: HfApi,
    name: str,
    found: Any,
    config: Mapping[str, Any],
    private: bool | None,
    revision: str | None,
) -> None:
    """Refuses a repository that holds something else.

    Raises:
        UserError: it does.
    """
    if private is not None and private != found.private:
        there = "private" if found.private else "public"
        raise UserError(
            f"{name} exists and is {there}: change that in its settings on {constants.ENDPOINT}, "
            "or choose another name"
        )
    names = {file.rfilename for file in found.siblings or ()} - {".gitattributes", "README.md"}
    if not names:
        return
    token = api.token if isinstance(api.token, str) else None
    architecture = None
    if CONFIG_FILE in names:
        branch = _branch(api, name, revision)
        theirs = hub.download_if_there(name, CONFIG_FILE, revision=branch, token=token)
        if theirs is None:
            raise UserError(f"cannot read {CONFIG_FILE} of {name}, which exists: try again")
        architecture = dict(read_json(theirs)).get("architecture")
    if architecture != config["architecture"]:
        what = f"the architecture {architecture!r}" if architecture else "no MambaOut"
        raise UserError(
            f"{name} exists and holds {what}, not {config['architecture']!r}: choose another name"
        )


def _branch(api: HfApi, name: str, revision: str | None) -> str | None:
    """Returns the branch if it exists, None for "main" where a new branch starts."""
    if revision is None:
        return None
    branches = {reference.name for reference in api.list_repo_refs(name).branches}
    return revision if revision in branches else None


def _explain(error: Exception, name: str) -> str:
    """Returns the message for an upload that failed."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    where = constants.ENDPOINT
    if status == 401:
        return f"{where} does not know this token: set HF_TOKEN to a token that may write {name}"
    if status == 403:
        return (
            f"this token may not write {name} on {where}: expected a token with the right to "
            "write, and a name of your own or of your organization"
        )
    if isinstance(error, errors.HFValidationError):
        return f"{name!r} is not a repository name: expected OWNER/NAME ({first_line(error)})"
    reason = first_line(error.__cause__ or error)
    return (
        f"cannot push to {name} on {where} ({reason}): nothing is committed; the same command "
        "continues, and sends only what is missing"
    )
