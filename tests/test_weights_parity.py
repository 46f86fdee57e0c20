"""Every variant beside timm's own network: random weights, 224 and 288 pixels, batch 1 and 3.

`pytest -n 0 -s -m slow tests/test_weights_parity.py -k logits` prints the table of docs/weights.md:
the largest difference of two logits for each size and batch, and the largest logit.
"""

import itertools

import golden
import jax
import numpy as np
import pytest

import mambaout_jax
from mambaout_jax.models.mambaout import create_model
from mambaout_jax.models.variants import VARIANTS
from mambaout_jax.weights.torch_file import write_state_dict
from mambaout_jax.weights.torch_layout import torch_tensors

torch = pytest.importorskip("torch", reason="torch is not installed")
timm = pytest.importorskip("timm", reason="timm is not installed")
pytestmark = pytest.mark.slow

CASES = [
    (name, layout)
    for name, variant in VARIANTS.items()
    for layout in ("timm", "original")
    if layout == "timm" or not variant.rw
]


def random_tensors(name, layout):
    shapes = torch_tensors(create_model(name), layout)
    # Layer scales are of order 1 by this formula: the initial 1e-5 would hide the branches.
    return golden.weights(sorted((tensor.name, tensor.shape) for tensor in shapes), seed=0)


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_there_and_back_is_bit_identical_and_timm_takes_it(name, layout, tmp_path):
    from safetensors.torch import load_file
    from timm.models.mambaout import checkpoint_filter_fn

    tensors = random_tensors(name, layout)
    theirs = timm.create_model(name)
    for suffix, load in ((".safetensors", load_file), (".pth", torch.load)):
        path = tmp_path / f"w{suffix}"
        back = mambaout_jax.to_torch(mambaout_jax.from_torch(tensors, name), name, layout=layout)
        write_state_dict(path, back)
        loaded = load(path)
        assert loaded.keys() == tensors.keys()
        for key, array in tensors.items():
            assert loaded[key].numpy().tobytes() == array.tobytes()
        if layout == "original":
            loaded = checkpoint_filter_fn(loaded, theirs)
        theirs.load_state_dict(loaded, strict=True)
        path.unlink()


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_logits_are_timms(name, layout):
    from timm.models.mambaout import checkpoint_filter_fn

    tensors = random_tensors(name, layout)
    theirs = timm.create_model(name).eval()
    state_dict = {name: torch.from_numpy(array) for name, array in tensors.items()}
    theirs.load_state_dict(checkpoint_filter_fn(state_dict, theirs), strict=True)
    ours = {"params": mambaout_jax.from_torch(tensors, name)}
    apply = jax.jit(create_model(name).apply)
    row = []
    for size, batch in itertools.product((224, 288), (1, 3)):
        images = golden.images(1, batch, size)
        with torch.inference_mode():
            expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
        with jax.default_matmul_precision("highest"):
            logits = apply(ours, images)
        row.append((np.abs(logits - expected).max(), np.abs(expected).max()))
    differences = " | ".join(f"{difference:.1e}" for difference, _ in row)
    largest = max(largest for _, largest in row)
    print(f"\n| {name} | {layout} | {differences} | {largest:.2f} |")
    assert max(difference for difference, _ in row) < 1e-4
