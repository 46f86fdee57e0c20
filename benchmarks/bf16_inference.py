"""Compares bfloat16 inference with float32: the error of the logits, and changes of the top-1.

A network trained by configs/quickstart.py on the digits held out from its training, and variants
with random weights on crops of the two photographs that scikit-learn ships:

  python benchmarks/bf16_inference.py --weights runs/quickstart --random mambaout_femto

The logits of a random network lie closer together than those of a trained one, so its agreement
is the harder test. float32 runs at the highest matmul precision.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import quickstart
from mambaout_jax.build_data import build_dataset
from mambaout_jax.data.preprocess import preprocess_image
from mambaout_jax.data.sources import open_source
from mambaout_jax.inference.predictor import forward
from mambaout_jax.models.mambaout import MambaOut, create_model
from mambaout_jax.models.pretrained import preprocessing
from mambaout_jax.weights.load import read_weights
from mambaout_jax.weights.shapes import param_shapes
from mambaout_jax.weights.store import WeightsInfo

_BATCH = 40


def random_params(model: MambaOut) -> dict[str, Any]:
    """Returns normal weights of variance 1 / fan-in, scales about 1 and biases about 0."""
    random = np.random.default_rng(0)
    flat = {}
    for path, shape in param_shapes(model).items():
        normal = random.standard_normal(shape, np.float32)
        if path[-1] == "kernel":
            flat[path] = normal / np.sqrt(np.prod(shape[:-1]), dtype=np.float32)
        else:
            flat[path] = np.float32(0.1) * normal + np.float32(path[-1] != "bias")
    return unflatten_dict(flat)


def digits(info: WeightsInfo) -> np.ndarray:
    """Returns the held-out digits, uint8 [360, H, W, 3]."""
    dataset = build_dataset(quickstart.get_config())
    source = open_source(dataset, dataset.eval_split)
    return np.stack(
        [preprocess_image(source[i]["image"], info.preprocessing) for i in range(len(source))]
    )


def crops(info: WeightsInfo, count: int) -> np.ndarray:
    """Returns random crops of scikit-learn's photographs, uint8 [count, H, W, 3]."""
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    random = np.random.default_rng(1)
    height, width = info.preprocessing.shape
    images = []
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        y = random.integers(photograph.shape[0] - height + 1)
        x = random.integers(photograph.shape[1] - width + 1)
        images.append(photograph[y : y + height, x : x + width])
    return np.stack(images)


def logits_of(info: WeightsInfo, params: Any, images: np.ndarray, dtype: Any) -> np.ndarray:
    """Returns the logits of all images, float32 [N, classes]."""
    model = info.create_model(dtype=dtype)
    apply = jax.jit(lambda p, x: forward(p, x, model=model, preprocessing=info.preprocessing))
    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
        batches = [images[i : i + _BATCH] for i in range(0, len(images), _BATCH)]
        return np.concatenate([np.asarray(apply(params, batch)) for batch in batches])


def cases(args: argparse.Namespace) -> Iterator[tuple[str, WeightsInfo, Any, np.ndarray]]:
    """Yields a title, the weights and the images of each comparison."""
    for path in args.weights:
        params, info = read_weights(path)
        yield f"{path} ({info.model})", info, params, digits(info)
    for name in args.random:
        info = WeightsInfo(name, 1000, preprocessing(name))
        yield f"{name}, random", info, random_params(create_model(name)), crops(info, args.crops)


def main() -> None:
    """Prints a row of a table for each network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", nargs="*", default=[], help="runs on the digits")
    parser.add_argument("--random", nargs="*", default=[], help="variants")
    parser.add_argument("--crops", type=int, default=_BATCH, help="images for --random")
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    print("| network | images | logits' deviation | error, rms | error, largest | top-1 agrees |")
    for title, info, params, images in cases(args):
        exact = logits_of(info, params, images, jnp.float32)
        error = logits_of(info, params, images, jnp.bfloat16) - exact
        agree = np.mean(np.argmax(exact + error, -1) == np.argmax(exact, -1))
        rms, largest = np.sqrt(np.mean(error**2)), np.abs(error).max()
        figures = f"{exact.std():.3f} | {rms:.4f} | {largest:.3f} | {agree:.2%}"
        print(f"| {title} | {len(images)} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
