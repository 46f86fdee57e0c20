"""Runs an exported network; needs jax, and flatbuffers, which jax reads its exports with.

python -m mambaout_jax export network.zip --model=mambaout_tiny.in1k
python examples/run_exported.py network.zip
"""

import sys
import zipfile

import jax
import numpy as np
from jax import export


def load(path):
    """Returns a function from uint8 pictures [N, H, W, 3] to logits, and the labels."""
    with zipfile.ZipFile(path) as archive:
        exported = export.deserialize(bytearray(archive.read("network.jax")))
        labels = archive.read("labels.txt").decode().splitlines()
        with archive.open("weights.npz") as file, np.load(file) as arrays:
            weights = jax.device_put([arrays[f"arr_{i}"] for i in range(len(arrays.files))])
    call = jax.jit(exported.call)
    return lambda images: call(weights, images), labels


if __name__ == "__main__":
    network, labels = load(sys.argv[1])
    with zipfile.ZipFile(sys.argv[1]) as archive:
        print(archive.read("preprocessing.json").decode())
    print(f"{len(labels)} classes: {labels[0]}, {labels[1]}, …")
