"""Trains a small segmentation head on a network's four feature maps: it finds coins.

    pip install '.[examples]'
    python examples/segmentation.py --weights=runs/quickstart --output=coins.png

The image comes with scikit-image: Greek coins from Pompeii, 303 x 384 grey pixels. The labels are
the circles below. The left part is for training, the right part for evaluation.
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

# Row, column and radius of each coin in pixels, fitted to the coins and checked by eye.
COINS = (
    (54, 44, 21), (56, 100, 19), (51, 155, 23), (51, 215, 23), (52, 276, 20), (44, 335, 29),
    (124, 45, 20), (126, 102, 19), (127, 154, 19), (124, 205, 20), (119, 271, 25), (124, 336, 19),
    (197, 44, 19), (196, 102, 22), (198, 154, 19), (193, 212, 24), (193, 273, 22), (187, 347, 32),
    (260, 46, 28), (265, 114, 21), (261, 172, 27), (263, 244, 24), (263, 301, 25), (268, 358, 22),
)  # fmt: skip
CUT = 240  # first column of the evaluation part; 15 coins and most of one are to the left


class SegmentationHead(nn.Module):
    """Projects all maps to one width, resizes them to the first one's size, adds, classifies."""

    classes: int = 2
    width: int = 32

    @nn.compact
    def __call__(self, maps):
        """[N, H / s, W / s, C] for s of 4, 8, 16, 32 to logits [N, H / 4, W / 4, classes]."""
        shape = (*maps[0].shape[:3], self.width)
        projected = [nn.Dense(self.width)(nn.LayerNorm()(x)) for x in maps]
        x = sum(jax.image.resize(y, shape, "bilinear") for y in projected)
        return nn.Dense(self.classes)(nn.gelu(x))


def coins():
    """Returns the image, uint8 [303, 384, 3], and the mask of the coins, bool [303, 384]."""
    image = np.repeat(data.coins()[..., None], 3, axis=-1)
    rows, columns = np.indices(image.shape[:2])
    inside = [(rows - y) ** 2 + (columns - x) ** 2 <= r**2 for y, x, r in COINS]
    return image, np.any(inside, axis=0)


def train_head(head, maps, labels, steps):
    """Returns the trained parameters of a head: maps [1, h, w, C], labels [1, H, W]."""
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
    """Resizes logits [N, h, w, classes] to [N, H, W, classes], shape = (N, H, W)."""
    return jax.image.resize(logits, (*shape, logits.shape[-1]), "bilinear")


def main(argv=None):
    """Prints the intersection over union on the evaluation part, and returns it."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example:\n  python examples/segmentation.py --weights=runs/quickstart",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--weights", required=True, metavar="NAME_OR_PATH")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", help="write the evaluation part here as an image, coins in red")
    args = parser.parse_args(argv)
    params, info = mambaout_jax.read_weights(args.weights)
    model, preprocessing = info.create_model(), info.preprocessing
    image, mask = coins()

    @jax.jit
    def features(params, image):
        pixels = mambaout_jax.normalize(image[None], preprocessing.mean, preprocessing.std)
        return model.apply({"params": params}, pixels, method="features")

    head = SegmentationHead()
    maps = features(params, image[:, :CUT])
    trained = train_head(head, maps, mask[None, :, :CUT].astype(int), args.steps)
    image, mask = image[:, CUT:], mask[:, CUT:]
    logits = full_size(jax.jit(head.apply)(trained, features(params, image)), (1, *mask.shape))
    found = np.asarray(logits[0].argmax(-1) == 1)
    score = (found & mask).sum() / (found | mask).sum()
    print(f"intersection over union on the evaluation part: {score:.1%}")
    if args.output:
        image[found] = image[found] // 2 + np.array([127, 0, 0], np.uint8)
        Image.fromarray(image).save(args.output)
    return score


if __name__ == "__main__":
    try:
        main()
    except mambaout_jax.UserError as error:
        sys.exit(f"error: {error}")
