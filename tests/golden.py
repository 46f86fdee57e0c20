"""Outputs recorded from the reference implementations, and the formula of weights and images.

The references are the paper's PyTorch code and timm, in float64 on a CPU.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from mambaout_jax.models.mambaout import MambaOut
from mambaout_jax.weights.torch_layout import from_torch, torch_tensors

DIR = Path(__file__).parent / "goldens"
CASES = (
    "mambaout_femto-original-224",
    "mambaout_femto-timm-224",
    "mambaout_kobe-original-192",
    "test_mambaout-timm-160",
)
# timm's test_mambaout with other block options: conv_ratio, expansion, activation; one not square.
OPTION_CASES = ("conv125-gelu", "conv125-gelu-narrow", "conv150-silu")


def load(case: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns a case's inputs and its recorded outputs."""
    meta = json.loads((DIR / f"{case}.json").read_text())
    with np.load(DIR / f"{case}.npz") as answers:
        return meta, dict(answers)


def weights(state_dict: list[tuple[str, list[int]]], seed: int) -> dict[str, np.ndarray]:
    """Returns weights for names and shapes, from numpy's legacy generator."""
    tensors = {}
    for i, (name, shape) in enumerate(state_dict):
        z = np.random.RandomState(seed + i).standard_normal(shape).astype(np.float32)
        if name.endswith("bias"):
            z *= np.float32(0.1)
        elif len(shape) == 1:
            z = 1 + np.float32(0.1) * z
        else:
            z /= np.sqrt(np.float32(np.prod(shape[1:])))
        tensors[name] = z
    return tensors


def images(seed: int, batch: int, size: int | list[int]) -> np.ndarray:
    """Returns normalised images, float32 [batch, height, width, 3]; one size is both."""
    random = np.random.RandomState(seed)
    height, width = [size, size] if isinstance(size, int) else size
    return random.standard_normal((batch, height, width, 3)).astype(np.float32)


def params(model: MambaOut, seed: int = 0) -> dict[str, Any]:
    """Returns parameters of any model, by the same formula."""
    shapes = sorted((tensor.name, list(tensor.shape)) for tensor in torch_tensors(model, "timm"))
    return from_torch(weights(shapes, seed), model)
