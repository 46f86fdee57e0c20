"""Every variant beside timm's own network: random weights, 224 and 288 pixels, batch 1 and 3."""

import golden
import jax
import numpy as np
import pytest

import mambaout_jax
from mambaout_jax.models.mambaout import VARIANTS, create_model
from mambaout_jax.weights.torch_layout import torch_tensors

torch = pytest.importorskip("torch", reason="torch is not installed")
timm = pytest.importorskip("timm", reason="timm is not installed")

CASES = [
    (name, layout)
    for name, variant in VARIANTS.items()
    for layout in ("timm", "original")
    if layout == "timm" or not variant.rw
]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_logits_are_timms(name, layout):
    from timm.models.mambaout import checkpoint_filter_fn

    shapes = torch_tensors(create_model(name), layout)
    # Layer scales are of order 1 by this formula: the initial 1e-5 would hide the branches.
    tensors = golden.weights(sorted((tensor.name, tensor.shape) for tensor in shapes), seed=0)
    theirs = timm.create_model(name).eval()
    state_dict = {name: torch.from_numpy(array) for name, array in tensors.items()}
    theirs.load_state_dict(checkpoint_filter_fn(state_dict, theirs), strict=True)
    ours = {"params": mambaout_jax.from_torch(tensors, name)}
    apply = jax.jit(create_model(name).apply)
    for size, batch in ((224, 3), (288, 1)):
        images = golden.images(1, batch, size)
        with torch.inference_mode():
            expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
        with jax.default_matmul_precision("highest"):
            logits = apply(ours, images)
        difference = np.abs(logits - expected).max()
        print(f"{name} {layout} {size} {batch}: {difference:.2e} of {np.abs(expected).max():.2f}")
        assert difference < 1e-4
