"""Compares converted weights with timm's own network on one image."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mambaout_jax.errors import UserError, first_line
from mambaout_jax.models.vit import VITS
from mambaout_jax.weights.info import WeightsInfo
from mambaout_jax.weights.pickle_file import import_torch

TOLERANCE = 1e-4  # relative to the largest logit, or absolute if all are below 1


def largest_difference(
    tensors: Mapping[str, np.ndarray], params: Mapping[str, Any], info: WeightsInfo
) -> tuple[float, float]:
    """Compares the logits of timm's network, loaded with `tensors`, with ours of `params`.

    Args:
        tensors: a torch state dict; timm itself renames the original layout.
        params: converted from `tensors`.
        info: their description.

    Returns:
        The largest absolute difference of two logits, and timm's largest absolute logit.

    Raises:
        UserError: torch or timm is not installed, or timm refuses the tensors.
    """
    torch = import_torch("--verify", extra="verify")
    try:
        from timm.models import create_model
        from timm.models.mambaout import checkpoint_filter_fn
    except ImportError as error:
        raise UserError(
            "--verify needs timm, which is not installed: pip install 'mambaout_jax[verify]'"
        ) from error
    if info.overrides:
        raise UserError(f"--verify supports plain variants, these weights change {info.overrides}")
    theirs = create_model(info.model, num_classes=info.num_classes).eval()
    state_dict = {name: torch.tensor(np.asarray(x, np.float32)) for name, x in tensors.items()}
    try:
        if info.model not in VITS:
            state_dict = checkpoint_filter_fn(state_dict, theirs)
        theirs.load_state_dict(state_dict, strict=True)
    except RuntimeError as error:
        raise UserError(f"timm refuses the tensors: {first_line(error)}") from error
    images = test_image(info.preprocessing.shape)
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    with jax.default_matmul_precision("highest"):
        got = jax.jit(info.create_model().apply)({"params": params}, images)
    return float(np.abs(got - expected).max()), float(np.abs(expected).max())


def test_image(size: tuple[int, int]) -> np.ndarray:
    """Returns a fixed image of waves, normalised, float32 [1, H, W, 3]."""
    y, x = np.meshgrid(*(np.linspace(0, 1, side) for side in size), indexing="ij")
    waves = [np.sin(30 * (x + k * y) ** 2 + k) + np.cos((20 - 5 * k) * y) for k in range(3)]
    return np.stack(waves, axis=-1).astype(np.float32)[None]
