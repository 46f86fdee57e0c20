"""Runs an exported network with jax alone.

python -m mambaout_jax export network.zip --weights=mambaout_tiny
python examples/run_exported.py network.zip

`jax.export.deserialize` would read network.jax in one line, but needs flatbuffers. Instead, jax
exports an empty function of the same signature, whose StableHLO is replaced by the network's.
"""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import export


def load(path):
    """Returns a function from uint8 images [N, H, W, 3] to logits, and the labels."""
    file = np.load(path)
    about, labels = json.loads(file["network.json"]), file["labels.txt"].decode().splitlines()
    weights = [file[name] for name in file if name.startswith("weights/")]
    images = jax.ShapeDtypeStruct((*export.symbolic_shape("batch"), *about["shape"]), np.uint8)
    empty = jax.jit(lambda _, images: jnp.zeros((images.shape[0], len(labels))), keep_unused=True)
    exported = export.export(empty, platforms=about["platforms"])(weights, images)
    program = file["network.jax"][slice(*about["stablehlo"])]
    fields = {"mlir_module_serialized": program, "calling_convention_version": about["version"]}
    network = jax.jit(dataclasses.replace(exported, **fields).call)
    return functools.partial(network, jax.device_put(weights)), labels


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    network, labels = load(sys.argv[1])
    print(np.load(sys.argv[1])["preprocessing.json"].decode())
    print(f"{len(labels)} classes: {labels[0]}, {labels[1]}, …")
