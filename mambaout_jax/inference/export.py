"""Exports a trained network as one zip file that runs with jax alone; numpy.load opens it.

The file holds
    network.jax         the program, serialized by jax.export: (weights, uint8 [N, H, W, 3]) to
                        float32 logits [N, classes], for any N and several platforms; it includes
                        the normalisation
    network.json        what a reader without flatbuffers needs: the range of the StableHLO in
                        network.jax, the platforms, the calling convention's version, the image
                        shape
    weights/*.npy       the weights, in the order of the program's list
    labels.txt          a name for each logit, one a line
    preprocessing.json  how an image becomes the program's input
The zip format has a checksum of each member. examples/run_exported.py reads the file.
"""

import dataclasses
import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from mambaout_jax.errors import UserError
from mambaout_jax.files import replacing
from mambaout_jax.inference.predictor import forward
from mambaout_jax.labels import class_names
from mambaout_jax.models.mambaout import MambaOut
from mambaout_jax.weights.info import WeightsInfo
from mambaout_jax.weights.output import check_absent

PLATFORMS = ("cpu", "cuda", "tpu")


def export_model(
    path: str | os.PathLike[str],
    model: MambaOut,
    params: Mapping[str, Any],
    info: WeightsInfo,
    *,
    platforms: Sequence[str] = PLATFORMS,
) -> None:
    """Writes the file, which appears when it is complete.

    Args:
        path: of the file; must not exist yet.
        model: the network.
        params: its weights.
        info: the description of the weights.
        platforms: to lower the program for: of "cpu", "cuda", "rocm" and "tpu".

    Raises:
        UserError: the file exists or cannot be written, flatbuffers is not installed, or the
            network is one of segmentation.
    """
    check_absent(path)
    info.check_task("classification", "predict --masks=DIR writes its masks")
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
    with replacing(path) as part, zipfile.ZipFile(part, "w") as archive:
        for index, leaf in enumerate(jax.tree.leaves(params)):
            with archive.open(f"weights/{index:04}.npy", "w") as file:
                np.save(file, np.asarray(leaf))
        for name, content in members.items():
            archive.writestr(name, content)


def export_program(
    model: MambaOut, params: Mapping[str, Any], info: WeightsInfo, *, platforms: Sequence[str]
) -> jax_export.Exported:
    """Returns the program: (list of weights, uint8 images) -> logits, for any batch size."""
    leaves, structure = jax.tree.flatten(params)

    def with_depthwise(implementation: str) -> Callable[[list[jax.Array], jax.Array], jax.Array]:
        # A ViT has no depthwise convolution.
        has = hasattr(model, "depthwise")
        network = model.clone(depthwise=implementation) if has else model

        def logits(weights: list[jax.Array], images: jax.Array) -> jax.Array:
            tree = jax.tree.unflatten(structure, weights)
            return forward(tree, images, model=network, preprocessing=info.preprocessing)

        return logits

    # Kernels support neither a symbolic batch nor several platforms in one program, and jax
    # guarantees compatibility for plain StableHLO only.
    def network(weights: list[jax.Array], images: jax.Array) -> jax.Array:
        on_cpu, elsewhere = with_depthwise("shifted"), with_depthwise("xla")
        return jax.lax.platform_dependent(weights, images, cpu=on_cpu, default=elsewhere)

    (batch,) = jax_export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *info.preprocessing.shape, 3), jnp.uint8)
    weights = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    jitted = jax.jit(network, keep_unused=True)  # all weights stay arguments of the program
    return jax_export.export(jitted, platforms=tuple(platforms))(weights, images)


def serialize(exported: jax_export.Exported) -> bytes:
    """Returns the bytes that jax.export.deserialize reads.

    Raises:
        UserError: flatbuffers is not installed.
    """
    try:
        return bytes(exported.serialize())
    except ImportError as error:
        raise UserError(
            "jax.export writes its files with flatbuffers, which is not installed: "
            "pip install 'mambaout_jax[export]'"
        ) from error
