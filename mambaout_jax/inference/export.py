"""Hands a trained network on: one zip file that jax alone can run, and numpy.load opens.

The file holds
    network.jax       the program, as jax.export serialises it: (weights, uint8 [N, H, W, 3]) ->
                      float32 logits [N, classes], for any N and several platforms; normalising
                      included
    network.json      what reading it without flatbuffers takes: where its StableHLO begins and
                      ends, the platforms, the version of jax.export's calls, the pictures' shape
    weights/*.npy     the weights, in the order of the program's list
    labels.txt        a name for each logit, one a line
    preprocessing.json  how a picture becomes the program's input
examples/run_exported.py reads it.
"""

import contextlib
import dataclasses
import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from mambaout_jax.errors import UserError
from mambaout_jax.inference.predictor import forward
from mambaout_jax.labels import class_names
from mambaout_jax.models.mambaout import MambaOut
from mambaout_jax.weights.store import WeightsInfo

PLATFORMS = ("cpu", "cuda", "tpu")


def export_model(
    path: str | os.PathLike[str],
    model: MambaOut,
    params: Mapping[str, Any],
    info: WeightsInfo,
    *,
    platforms: Sequence[str] = PLATFORMS,
) -> None:
    """Writes the file described above; it appears when it is whole.

    Args:
        path: of the file; must not exist yet.
        model: the network.
        params: its weights.
        info: what they are.
        platforms: that the program is lowered for: of "cpu", "cuda", "rocm" and "tpu".

    Raises:
        UserError: when the file exists or cannot be written, or flatbuffers is not installed.
    """
    path = Path(path)
    if path.exists():
        raise UserError(f"the output {path} exists: name another file or remove it")
    exported = export_program(model, params, info, platforms=platforms)
    program, stablehlo = serialize(exported), exported.mlir_module_serialized
    start = program.index(stablehlo)
    network = {
        "stablehlo": [start, start + len(stablehlo)],
        "platforms": exported.platforms,
        "version": exported.calling_convention_version,
        "shape": [*info.preprocessing.shape, 3],
    }
    members: dict[str, str | bytes] = {
        "network.jax": program,
        "network.json": json.dumps(network, indent=2) + "\n",
        "labels.txt": "\n".join(class_names(info.class_names, info.num_classes)) + "\n",
        "preprocessing.json": json.dumps(dataclasses.asdict(info.preprocessing), indent=2) + "\n",
    }
    part = path.with_name(f"{path.name}.part")
    try:
        with zipfile.ZipFile(part, "w") as archive:
            for index, leaf in enumerate(jax.tree.leaves(params)):
                with archive.open(f"weights/{index:04}.npy", "w") as file:
                    np.save(file, np.asarray(leaf))
            for name, content in members.items():
                archive.writestr(name, content)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(f"the output {path} cannot be written: {error.strerror}") from error


def export_program(
    model: MambaOut, params: Mapping[str, Any], info: WeightsInfo, *, platforms: Sequence[str]
) -> jax_export.Exported:
    """Returns the program: (list of weights, uint8 images) -> logits, for any batch size."""
    leaves, structure = jax.tree.flatten(params)

    def with_depthwise(implementation: str) -> Callable[[list[jax.Array], jax.Array], jax.Array]:
        network = model.clone(depthwise=implementation)

        def answer(weights: list[jax.Array], images: jax.Array) -> jax.Array:
            tree = jax.tree.unflatten(structure, weights)
            return forward(tree, images, model=network, preprocessing=info.preprocessing)

        return answer

    # Pallas kernels take no symbolic batch and are not lowered for several platforms at once; plain
    # StableHLO is, and jax keeps its promise of compatibility for it alone.
    def network(weights: list[jax.Array], images: jax.Array) -> jax.Array:
        on_cpu, elsewhere = with_depthwise("shifted"), with_depthwise("xla")
        return jax.lax.platform_dependent(weights, images, cpu=on_cpu, default=elsewhere)

    (batch,) = jax_export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *info.preprocessing.shape, 3), jnp.uint8)
    weights = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    jitted = jax.jit(network, keep_unused=True)  # so that its arguments are those that it is given
    return jax_export.export(jitted, platforms=tuple(platforms))(weights, images)


def serialize(exported: jax_export.Exported) -> bytes:
    """Returns what jax.export.deserialize reads.

    Raises:
        UserError: when flatbuffers is not installed.
    """
    try:
        return bytes(exported.serialize())
    except ImportError as error:
        raise UserError(
            "jax.export writes its files with flatbuffers, which is not installed: "
            "pip install mambaout_jax[export]"
        ) from error
