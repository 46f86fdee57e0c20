"""Trains a linear classifier on a network's features: is a picture a face?

    pip install mambaout_jax[examples]
    python examples/linear_probe.py --weights=runs/quickstart

The pictures come with scikit-image: 100 faces and 100 pieces of background out of photographs of
Labeled Faces in the Wild, 25 x 25 grey pixels each. Three quarters of them train, the rest measure.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image
from skimage import data

import mambaout_jax
from mambaout_jax.data.preprocess import normalize
from mambaout_jax.errors import UserError


def faces(shape, seed=0):
    """Returns pictures, uint8 [200, *shape, 3], and whether each is a face, in random order."""
    grey = (255 * data.lfw_subset()).astype(np.uint8)
    size = shape[::-1]  # Pillow's is (width, height)
    pictures = [Image.fromarray(picture).convert("RGB").resize(size) for picture in grey]
    order = np.random.default_rng(seed).permutation(len(grey))
    return np.stack(pictures)[order], (np.arange(len(grey)) < 100).astype(int)[order]


def features(params, info, pictures):
    """Returns the means of the four levels over positions, [N, channels of all levels]."""
    model, preprocessing = info.create_model(), info.preprocessing

    @jax.jit
    def extract(params, pictures):
        pixels = normalize(pictures, preprocessing.mean, preprocessing.std)
        maps = model.apply({"params": params}, pixels, method="features")
        return jnp.concatenate([level.mean((1, 2)) for level in maps], axis=-1)

    return jnp.concatenate([extract(params, batch) for batch in np.split(pictures, 4)])


def train_probe(x, y, classes=2, steps=300, decay=1e-2):
    """Returns a linear classifier, trained by AdamW on all of x [N, channels] at once."""
    mean, std = x.mean(0, keepdims=True), x.std(0, keepdims=True) + 1e-6
    optimizer = optax.adamw(1e-2, weight_decay=decay)
    probe = {"kernel": jnp.zeros((x.shape[1], classes)), "bias": jnp.zeros((1, classes))}

    def logits(probe, x):
        return (x - mean) / std @ probe["kernel"] + probe["bias"]

    def loss(probe):
        return optax.softmax_cross_entropy_with_integer_labels(logits(probe, x), y).mean()

    def step(_, carry):
        probe, state = carry
        updates, state = optimizer.update(jax.grad(loss)(probe), state, probe)
        return optax.apply_updates(probe, updates), state

    train = jax.jit(lambda carry: jax.lax.fori_loop(0, steps, step, carry))
    probe, _ = train((probe, optimizer.init(probe)))
    return lambda x: logits(probe, x).argmax(-1)


def main(argv=None):
    """Prints the accuracies; returns that on the held-out pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True, metavar="NAME_OR_PATH")
    args = parser.parse_args(argv)
    params, info = mambaout_jax.read_weights(args.weights)
    pictures, y = faces(info.preprocessing.shape)
    x = features(params, info, pictures)
    cut = 3 * len(y) // 4
    classify = train_probe(x[:cut], y[:cut])
    right = np.asarray(classify(x) == y)
    print(f"{x.shape[1]} features; right of the {cut} that trained it: {right[:cut].mean():.1%}")
    print(f"of the {len(y) - cut} held out: {right[cut:].mean():.1%}")
    return right[cut:].mean()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
