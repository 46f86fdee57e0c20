"""Converted weights beside timm's own network, on the same picture."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mambaout_jax.errors import UserError
from mambaout_jax.weights.store import WeightsInfo
from mambaout_jax.weights.torch_file import import_torch

TOLERANCE = 1e-4  # of the largest logit, or of 1 where all are smaller


def largest_difference(
    tensors: Mapping[str, np.ndarray], params: Mapping[str, Any], info: WeightsInfo
) -> tuple[float, float]:
    """Compares the logits of timm's network, loaded with `tensors`, with ours of `params`.

    Args:
        tensors: a torch state dict; timm itself renames the original layout.
        params: what came of it.
        info: what they are.

    Returns:
        The largest difference of two logits, and the largest logit of timm's.

    Raises:
        UserError: when torch or timm is not installed, or timm refuses the tensors.
    """
    torch = import_torch("--verify", extra="verify")
    try:
        from timm.models import create_model
        from timm.models.mambaout import checkpoint_filter_fn
    except ImportError as error:
        raise UserError(
            "--verify takes timm, which is not installed: pip install 'mambaout_jax[verify]'"
        ) from error
    if info.overrides:
        raise UserError(f"--verify knows the variants alone, these weights change {info.overrides}")
    theirs = create_model(info.model, num_classes=info.num_classes).eval()
    state_dict = {name: torch.tensor(np.asarray(x, np.float32)) for name, x in tensors.items()}
    try:
        theirs.load_state_dict(checkpoint_filter_fn(state_dict, theirs), strict=True)
    except RuntimeError as error:
        raise UserError(f"timm refuses the tensors: {str(error).splitlines()[0]}") from error
    images = picture(info.preprocessing.shape)
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
    with jax.default_matmul_precision("highest"):
        got = jax.jit(info.create_model().apply)({"params": params}, images)
    return float(np.abs(got - expected).max()), float(np.abs(expected).max())


def picture(size: tuple[int, int]) -> np.ndarray:
    """Returns a picture of waves, normalised, float32 [1, H, W, 3], the same at every call."""
    y, x = np.meshgrid(*(np.linspace(0, 1, side) for side in size), indexing="ij")
    waves = [np.sin(30 * (x + k * y) ** 2 + k) + np.cos((20 - 5 * k) * y) for k in range(3)]
    return np.stack(waves, axis=-1).astype(np.float32)[None]
