"""A small network's weights from numpy, as a checkpoint on disk, and images of noise."""

import dataclasses
from pathlib import Path

import golden
import numpy as np
from PIL import Image

from mambaout_jax.data.preprocess import Preprocessing
from mambaout_jax.weights.info import WeightsInfo
from mambaout_jax.weights.store import save_weights

INFO = WeightsInfo(
    model="test_mambaout",
    num_classes=1000,
    preprocessing=Preprocessing(size=32, crop_pct=0.9),
    overrides={"depths": (1, 1, 1, 1), "widths": (8, 12, 16, 24), "depthwise": "xla"},
)


def write(directory: Path, seed: int = 0, **changes) -> Path:
    """Writes a checkpoint of the small network and returns its directory."""
    info = dataclasses.replace(INFO, **changes)
    save_weights(directory, golden.params(info.create_model(), seed), info)
    return directory


def image(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """Returns an image of noise, of Pillow size (width, height)."""
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


def write_images(folder: Path, count: int) -> list[Path]:
    """Writes images of noise and returns their files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:02d}.png" for number in range(count)]
    for number, file in enumerate(files):
        image(number).save(file)
    return files
