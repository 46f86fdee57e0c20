"""Reads a file of `export_model`."""

import dataclasses
import json
import os
import zipfile

import jax.export
import numpy as np

from mambaout_jax.errors import UserError, first_line


@dataclasses.dataclass(frozen=True)
class ExportedNetwork:
    """An exported network.

    Attributes:
        program: (weights, uint8 [N, H, W, 3]) to float32 logits [N, classes], for any N.
        weights: the program's first argument.
        labels: a name for each logit.
        shape: of an image, (H, W, 3).
    """

    program: jax.export.Exported
    weights: list[np.ndarray]
    labels: tuple[str, ...]
    shape: tuple[int, int, int]


def read_exported(path: str | os.PathLike[str]) -> ExportedNetwork:
    """Reads the file.

    Raises:
        UserError: it cannot be read or is damaged, or flatbuffers is not installed.
    """
    try:
        with zipfile.ZipFile(os.path.expanduser(path)) as archive:
            names = sorted(name for name in archive.namelist() if name.startswith("weights/"))
            weights = []
            for name in names:
                with archive.open(name) as file:
                    weights.append(np.lib.format.read_array(file))
            about = json.loads(archive.read("network.json"))
            labels = archive.read("labels.txt").decode().splitlines()
            program = jax.export.deserialize(bytearray(archive.read("network.jax")))
        return ExportedNetwork(program, weights, tuple(labels), tuple(about["shape"]))
    except ImportError:
        raise UserError(
            f"reading {path} needs flatbuffers, which is not installed: "
            "pip install 'mambaout_jax[export]'"
        ) from None
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
        raise UserError(
            f"{path} cannot be read as an exported network: {first_line(error)}"
        ) from None
