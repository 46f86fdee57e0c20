"""Every key of the config that acts on the device changes what its words say, in the jitted step.

Each test goes from the config through `build_recipe` into the compiled augmentation of a step, with
an image of constant colour for each label, so that the mixing can be read off the pixels.
"""

import functools

import jax
import numpy as np
import pytest

from configs import default
from mambaout_jax.build import build_recipe
from mambaout_jax.training.step import augment

COUNT, SIZE, STEPS = 8, 16, 12
QUIET = {"mixup": 0.0, "cutmix": 0.0, "random_erasing": 0.0, "mixup_group": 0}


def augmented(label_smoothing=0.0, first_step=0, **changes):
    """Returns images [steps, N, H, W] (of one channel, 0 to 1 unmixed) and targets, per step."""
    config = default.get_config()
    config.data.num_classes = COUNT
    config.label_smoothing = label_smoothing
    config.augment.update(QUIET | changes)
    recipe = build_recipe(config, steps_per_epoch=10)
    step = jax.jit(functools.partial(augment, recipe=recipe))
    colours = np.arange(COUNT, dtype=np.uint8) * 30
    batch = {
        "image": np.broadcast_to(colours[:, None, None, None], (COUNT, SIZE, SIZE, 3)),
        "label": np.arange(COUNT),
    }
    results = []
    for number in range(first_step, first_step + STEPS):
        key = jax.random.fold_in(jax.random.key(0), number)
        results.append(step(key, number, batch))
    images = np.stack([result["image"] for result in results])
    pixels = images * np.array(recipe.std) + np.array(recipe.mean)
    return pixels[..., 0] * 255 / 30, np.stack([result["target"] for result in results])


def is_constant(images):
    return images.max(axis=(2, 3)) - images.min(axis=(2, 3)) < 1e-3


def is_mixed(targets):
    return (targets < 0.999).all(axis=2).any(axis=1)


def test_without_augmentation_the_images_stay():
    images, targets = augmented()
    np.testing.assert_allclose(images[:, :, 0, 0], np.tile(np.arange(COUNT), (STEPS, 1)), atol=1e-3)
    np.testing.assert_array_equal(targets, np.tile(np.eye(COUNT), (STEPS, 1, 1)))


def test_label_smoothing_is_spread_over_the_classes():
    _, targets = augmented(label_smoothing=0.1)
    np.testing.assert_allclose(targets[0], np.eye(COUNT) * 0.9 + 0.1 / COUNT, atol=1e-6)


def test_mixup_blends_whole_images_by_the_weight_of_their_targets():
    images, targets = augmented(mixup=1.0)
    assert is_constant(images).all()
    assert is_mixed(targets).all()
    np.testing.assert_allclose(images[..., 0, 0], targets @ np.arange(COUNT), atol=0.02)


def test_cutmix_pastes_a_box_of_the_area_that_the_targets_give_away():
    images, targets = augmented(cutmix=1.0)
    own = np.abs(images - np.arange(COUNT)[:, None, None]) < 1e-3
    partner = np.abs(images - np.arange(COUNT)[::-1][:, None, None]) < 1e-3
    assert (own | partner).all()
    share = own.mean(axis=(2, 3))
    np.testing.assert_allclose(share, targets[:, np.arange(COUNT), np.arange(COUNT)], atol=1e-6)
    assert len(np.unique(share[:, 0])) > 3


def test_the_alpha_of_mixup_widens_the_weights():
    weights = []
    for alpha in (0.05, 50.0):
        _, targets = augmented(mixup=alpha)
        weights.append(targets[:, 0, 0])
    assert np.abs(weights[0] - 0.5).mean() > 0.35
    assert np.abs(weights[1] - 0.5).mean() < 0.15


def test_the_alpha_of_cutmix_widens_the_boxes():
    areas = []
    for alpha in (0.05, 50.0):
        _, targets = augmented(cutmix=alpha)
        areas.append(targets[:, 0, 0])
    assert np.median(np.abs(areas[0] - 0.5)) > np.median(np.abs(areas[1] - 0.5))


@pytest.mark.parametrize(("switch_prob", "cutmix"), [(0.0, False), (1.0, True)])
def test_the_switch_chooses_cutmix(switch_prob, cutmix):
    images, targets = augmented(mixup=1.0, cutmix=1.0, mixup_switch_prob=switch_prob)
    assert is_mixed(targets).any()
    assert is_constant(images).all() != cutmix


def test_the_switch_draws_both_kinds():
    images, _ = augmented(mixup=1.0, cutmix=1.0, mixup_switch_prob=0.5)
    constant = is_constant(images).all(axis=1)
    assert 0 < constant.sum() < STEPS


@pytest.mark.parametrize(("prob", "fewest", "most"), [(0.0, 0, 0), (0.5, 2, 10), (1.0, 12, 12)])
def test_the_probability_of_mixing(prob, fewest, most):
    _, targets = augmented(mixup=1.0, mixup_prob=prob)
    assert fewest <= is_mixed(targets).sum() <= most


def test_each_group_is_mixed_by_itself():
    _, targets = augmented(mixup=1.0, mixup_group=4)
    weights = targets[:, np.arange(COUNT), np.arange(COUNT)]
    assert (np.abs(weights[:, 0] - weights[:, 4]) > 1e-3).any()
    np.testing.assert_allclose(weights[:, :4], np.tile(weights[:, :1], 4), atol=1e-6)
    assert not targets[:, :4, 4:].any()


def test_mixing_ends_after_its_duration():
    _, targets = augmented(mixup=1.0, mixup_off="2 epochs", first_step=14)
    np.testing.assert_array_equal(is_mixed(targets), np.arange(14, 14 + STEPS) < 20)


@pytest.mark.parametrize(("probability", "fewest", "most"), [(0.5, 30, 66), (1.0, 96, 96)])
def test_erasing_fills_a_box_with_noise(probability, fewest, most):
    images, targets = augmented(random_erasing=probability)
    np.testing.assert_array_equal(targets, np.tile(np.eye(COUNT), (STEPS, 1, 1)))
    erased = ~is_constant(images)
    assert fewest <= erased.sum() <= most
    untouched = np.abs(images - np.arange(COUNT)[:, None, None]) < 1e-3
    assert 0.6 < untouched[erased].mean() < 1
