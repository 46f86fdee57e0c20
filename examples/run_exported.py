"""Runs an exported network with jax alone.

python -m mambaout_jax export network.zip --model=mambaout_tiny.in1k
python examples/run_exported.py network.zip

`jax.export.deserialize` would read network.jax in one line, but needs flatbuffers. Without it, jax
exports an empty frame of the same signature, and the network's StableHLO is put in.
"""

import dataclasses
import functools
import io
import json
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
from jax import export


def load(path):
    """Returns a function from uint8 pictures [N, H, W, 3] to logits, and the labels."""
    with zipfile.ZipFile(path) as archive:
        about = json.loads(archive.read("network.json"))
        program = archive.read("network.jax")[slice(*about["stablehlo"])]
        labels = archive.read("labels.txt").decode().splitlines()
        arrays = np.load(io.BytesIO(archive.read("weights.npz")))
    weights = [arrays[name] for name in arrays]
    images = jax.ShapeDtypeStruct((*export.symbolic_shape("batch"), *about["shape"]), np.uint8)
    frame = jax.jit(lambda _, images: jnp.zeros((images.shape[0], len(labels))), keep_unused=True)
    exported = export.export(frame, platforms=about["platforms"])(weights, images)
    fields = {"mlir_module_serialized": program, "calling_convention_version": about["version"]}
    network = jax.jit(dataclasses.replace(exported, **fields).call)
    return functools.partial(network, jax.device_put(weights)), labels


if __name__ == "__main__":
    network, labels = load(sys.argv[1])
    with zipfile.ZipFile(sys.argv[1]) as archive:
        print(archive.read("preprocessing.json").decode())
    print(f"{len(labels)} classes: {labels[0]}, {labels[1]}, …")
