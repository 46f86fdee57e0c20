"""Trains a small segmentation head on a network's four feature maps: where are the coins?

    pip install mambaout_jax[examples]
    python examples/segmentation.py --weights=runs/quickstart --output=coins.png

The picture comes with scikit-image: Greek coins from Pompeii, 303 x 384 grey pixels. The labels are
the circles below. The left part trains, the right one, which the head never sees, measures.
"""

import argparse
import sys

import flax.linen as nn
import jax
import numpy as np
import optax
from PIL import Image
from skimage import data

import mambaout_jax
from mambaout_jax.data.preprocess import normalize
from mambaout_jax.errors import UserError

# Row, column and radius of each coin, in pixels: fitted to the coins' areas, checked by eye.
COINS = (
    (54, 44, 21), (56, 100, 19), (51, 155, 23), (51, 215, 23), (52, 276, 20), (44, 335, 29),
    (124, 45, 20), (126, 102, 19), (127, 154, 19), (124, 205, 20), (119, 271, 25), (124, 336, 19),
    (197, 44, 19), (196, 102, 22), (198, 154, 19), (193, 212, 24), (193, 273, 22), (187, 347, 32),
    (260, 46, 28), (265, 114, 21), (261, 172, 27), (263, 244, 24), (263, 301, 25), (268, 358, 22),
)  # fmt: skip
CUT = 240  # column between the part that trains, with 15 coins and most of one, and the held-out


class SegmentationHead(nn.Module):
    """Brings all levels to one width and to the first one's size, adds them, and classifies."""

    classes: int = 2
    width: int = 32

    @nn.compact
    def __call__(self, maps):
        """[N, H / s, W / s, C] for s of 4, 8, 16, 32 to logits [N, H / 4, W / 4, classes]."""
        shape = (*maps[0].shape[:3], self.width)
        levels = [nn.Dense(self.width)(nn.LayerNorm()(level)) for level in maps]
        x = sum(jax.image.resize(level, shape, "bilinear") for level in levels)
        return nn.Dense(self.classes)(nn.gelu(x))


def coins():
    """Returns the picture, uint8 [303, 384, 3], and where coins are, bool [303, 384]."""
    picture = np.repeat(data.coins()[..., None], 3, axis=-1)
    rows, columns = np.indices(picture.shape[:2])
    inside = [(rows - y) ** 2 + (columns - x) ** 2 <= r**2 for y, x, r in COINS]
    return picture, np.any(inside, axis=0)


def train_head(head, maps, labels, steps):
    """Returns a trained head's parameters: maps of one picture [1, ...], labels [1, H, W]."""
    params = jax.jit(head.init)(jax.random.key(0), maps)
    optimizer = optax.adamw(3e-3)

    def loss(params):
        logits = full_size(head.apply(params, maps), labels.shape)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


def full_size(logits, shape):
    """Enlarges logits [N, h, w, classes] to [N, H, W, classes], shape = (N, H, W)."""
    return jax.image.resize(logits, (*shape, logits.shape[-1]), "bilinear")


def main(argv=None):
    """Prints the intersection over union on the held-out part, and returns it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True, metavar="NAME_OR_PATH")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", help="a picture of the held-out part, found coins in red")
    args = parser.parse_args(argv)
    params, info = mambaout_jax.read_weights(args.weights)
    model, preprocessing = info.create_model(), info.preprocessing
    picture, mask = coins()

    @jax.jit
    def features(params, picture):
        pixels = normalize(picture[None], preprocessing.mean, preprocessing.std)
        return model.apply({"params": params}, pixels, method="features")

    head = SegmentationHead()
    maps = features(params, picture[:, :CUT])
    trained = train_head(head, maps, mask[None, :, :CUT].astype(int), args.steps)
    picture, mask = picture[:, CUT:], mask[:, CUT:]
    logits = full_size(jax.jit(head.apply)(trained, features(params, picture)), (1, *mask.shape))
    found = np.asarray(logits[0].argmax(-1) == 1)
    score = (found & mask).sum() / (found | mask).sum()
    print(f"intersection over union on the held-out part: {score:.1%}")
    if args.output:
        picture[found] = picture[found] // 2 + np.array([127, 0, 0], np.uint8)
        Image.fromarray(picture).save(args.output)
    return score


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
