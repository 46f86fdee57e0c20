"""Fine-tuning from Python, in this process: configs/finetune.py without a command line."""

import os
import sys
from typing import Any

from etils import epath

from mambaout_jax.build import build_run
from mambaout_jax.cli.train import resolve_config, shipped_folder
from mambaout_jax.config import load_config
from mambaout_jax.runtime.preemption import StopRequest
from mambaout_jax.training.loop import train
from mambaout_jax.weights.load import read_weights


def finetune(
    directory: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    weights: str,
    **keys: Any,
) -> None:
    """Fine-tunes weights on a folder of images; a second call resumes the run.

    Args:
        directory: the folder; configs/finetune.py says what is in it.
        workdir: where the run and its checkpoints are written.
        weights: to start from, as `read_weights` takes them.
        **keys: of the config, such as `**{"schedule.duration": "5 epochs"}`.

    Raises:
        UserError: something is wrong with the images, the weights or a key.
        PreemptedError: the run was interrupted; it is saved.
    """
    _, info = read_weights(weights)
    folder = str(shipped_folder())
    if folder not in sys.path:
        sys.path.insert(0, folder)  # for `from configs import default`
    config = load_config(resolve_config("finetune"))
    start: dict[str, Any] = {
        "init_from": weights,
        "model.name": info.model,
        "data.dir": os.fspath(directory),
        "data.image_size": info.preprocessing.shape[0],
    }
    config.update_from_flattened_dict(start | keys)
    with StopRequest() as stop:
        train(build_run(config), epath.Path(workdir), stop)
