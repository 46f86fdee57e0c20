"""The keys of the configuration that act on the device reach the step."""

import functools

import jax
import numpy as np
import pytest

from configs import default
from mambaout_jax.build import build_recipe
from mambaout_jax.training.step import augment


def recipe(**changes):
    config = default.get_config()
    config.data.num_classes = 5
    config.augment.update(changes)
    return build_recipe(config, steps_per_epoch=10)


@pytest.mark.parametrize(
    "key", ["random_erasing", "mixup", "cutmix", "mixup_prob", "mixup_switch_prob"]
)
def test_keys_of_the_device_reach_the_step(key):
    assert getattr(recipe(**{key: 0.125}), key) == 0.125


def test_mixing_ends_when_it_is_told_to():
    options = recipe(mixup=1.0, cutmix=0.0, random_erasing=0.0, mixup_off="2 epochs")
    step = jax.jit(functools.partial(augment, recipe=options))
    batch = {
        "image": np.random.RandomState(0).randint(0, 256, (4, 8, 8, 3), np.uint8),
        "label": np.arange(4),
    }
    last, first = (step(jax.random.key(0), number, batch) for number in (19, 20))
    smoothed = np.eye(5)[batch["label"]] * 0.9 + 0.02
    np.testing.assert_allclose(first["target"], smoothed, atol=1e-6)
    assert np.abs(last["target"] - smoothed).max() > 0.01
    assert not np.array_equal(last["image"], first["image"])
