"""Trains a linear classifier on a network's features: is an image a face?

    pip install '.[examples]'
    python examples/linear_probe.py --weights=runs/quickstart

The images come with scikit-image: 100 faces and 100 pieces of background from the photographs of
Labeled Faces in the Wild, 25 x 25 grey pixels each. Three quarters are for training, the others for
evaluation.
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


def faces(shape, seed=0):
    """Returns images, uint8 [200, *shape, 3], and whether each is a face, in random order."""
    grey = (255 * data.lfw_subset()).astype(np.uint8)
    size = shape[::-1]  # Pillow's is (width, height)
    images = [Image.fromarray(image).convert("RGB").resize(size) for image in grey]
    order = np.random.default_rng(seed).permutation(len(grey))
    return np.stack(images)[order], (np.arange(len(grey)) < 100).astype(int)[order]


def features(params, info, images):
    """Returns the means of the four maps over positions, [N, channels of all maps]."""
    model, preprocessing = info.create_model(), info.preprocessing

    @jax.jit
    def extract(params, images):
        pixels = mambaout_jax.normalize(images, preprocessing.mean, preprocessing.std)
        maps = model.apply({"params": params}, pixels, method="features")
        return jnp.concatenate([level.mean((1, 2)) for level in maps], axis=-1)

    return jnp.concatenate([extract(params, batch) for batch in np.split(images, 4)])


def train_probe(x, y, classes=2, steps=300, decay=1e-2):
    """Returns a linear classifier, trained by AdamW on all of x [N, channels] in each step."""
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
    """Prints the accuracies; returns that on the evaluation images."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example:\n  python examples/linear_probe.py --weights=runs/quickstart",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--weights", required=True, metavar="NAME_OR_PATH")
    args = parser.parse_args(argv)
    params, info = mambaout_jax.read_weights(args.weights)
    images, y = faces(info.preprocessing.shape)
    x = features(params, info, images)
    cut = 3 * len(y) // 4
    classify = train_probe(x[:cut], y[:cut])
    correct = np.asarray(classify(x) == y)
    training, evaluation = correct[:cut].mean(), correct[cut:].mean()
    print(f"{x.shape[1]} features; accuracy on the {cut} training images: {training:.1%}")
    print(f"on the {len(y) - cut} evaluation images: {evaluation:.1%}")
    return evaluation


if __name__ == "__main__":
    try:
        main()
    except mambaout_jax.UserError as error:
        sys.exit(f"error: {error}")
