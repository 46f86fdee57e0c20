"""Mixing, normalising and erasing against their formulas, in numpy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mambaout_jax.data.preprocess import normalize
from mambaout_jax.training.mixing import augment_batch, mixup_cutmix, random_erasing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPTIONS = {
    "num_classes": 10,
    "smoothing": 0.1,
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0,
    "prob": 1.0,
    "switch_prob": 0.5,
}
IMAGES = np.random.RandomState(0).randint(0, 256, (6, 20, 30, 3), np.uint8)
LABELS = np.arange(6)
KEYS = jax.random.split(jax.random.key(0), 400)


def mix(keys=KEYS, images=IMAGES, enabled=True, **options):
    """Mixed pictures and targets for each of many keys, as numpy."""

    def one(key):
        return mixup_cutmix(key, images, LABELS, enabled=enabled, **(OPTIONS | options))

    return [np.asarray(part) for part in jax.jit(jax.vmap(one))(keys)]


def first_weights(targets):
    """The weight of the first picture in its target; its partner is the last one."""
    return (targets[:, 0, 0] - 0.01) / 0.9


def test_normalize_gives_the_networks_input():
    expected = (IMAGES / 255 - np.array(MEAN)) / np.array(STD)
    np.testing.assert_allclose(normalize(IMAGES, MEAN, STD), expected, atol=1e-5)


def test_mixup_is_a_rounded_weighted_mean_and_its_weight_is_beta():
    mixed, targets = mix(cutmix_alpha=0.0)
    weights = first_weights(targets).astype(float)
    one_hot = np.eye(10)[LABELS] * 0.9 + 0.01
    for image, target, lam in list(zip(mixed, targets, weights, strict=True))[:20]:
        np.testing.assert_allclose(target, one_hot * lam + one_hot[::-1] * (1 - lam), atol=1e-5)
        exact = IMAGES * np.float64(lam) + IMAGES[::-1] * (1 - np.float64(lam))
        assert np.abs(image - exact).max() < 0.51
    assert weights.mean() == pytest.approx(0.5, abs=3.5 * weights.std() / 20)
    variance = 1 / (4 * (2 * 0.8 + 1))  # of Beta(0.8, 0.8)
    assert weights.var() == pytest.approx(variance, rel=0.2)


def test_cutmix_pastes_one_box_and_weighs_it_by_its_clipped_area():
    mixed, targets = mix(mixup_alpha=0.0)
    lams = first_weights(targets)
    for image, lam in zip(mixed, lams, strict=True):
        pasted = (image == IMAGES[::-1]).all((0, 3)) & ~(IMAGES[::-1] == IMAGES).all((0, 3))
        assert ((image == IMAGES).all((0, 3)) | pasted).all()
        rows, columns = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
        assert pasted.sum() == len(rows) * len(columns)
        assert lam == pytest.approx(1 - pasted.mean(), abs=1e-5)
    # Unclipped, the weight is uniform; the border clips boxes, so that their mean shrinks.
    rng = np.random.default_rng(0)
    sides = np.sqrt(1 - rng.random((40_000, 1)))
    cut = (sides * [20, 30]).astype(int)
    middle = rng.integers(0, [20, 30], (40_000, 2))
    spans = np.clip(middle + (cut + 1) // 2, 0, [20, 30]) - np.clip(middle - cut // 2, 0, None)
    expected = 1 - spans.prod(1) / 600
    assert lams.mean() == pytest.approx(expected.mean(), abs=3.5 * expected.std() / 20)


def test_the_odds_of_mixing_and_of_cutmix():
    images, targets = mix(prob=0.6, switch_prob=0.25, mixup_alpha=1.0)
    mixed = first_weights(targets) < 0.9999
    assert mixed.mean() == pytest.approx(0.6, abs=3.5 * math.sqrt(0.24 / 400) + 0.01)
    np.testing.assert_array_equal(images[~mixed], np.stack([IMAGES] * (~mixed).sum()))
    pasted = ((images == IMAGES) | (images == IMAGES[::-1])).all((1, 2, 3, 4))
    assert pasted[mixed].mean() == pytest.approx(0.25, abs=3.5 * math.sqrt(0.19 / 240))


@pytest.mark.parametrize(
    "off",
    [{"enabled": False, "mixup_alpha": 1.0}, {"prob": 0.0}, {"mixup_alpha": 0, "cutmix_alpha": 0}],
)
def test_switched_off_only_smooths_the_labels(off):
    mixed, targets = mix(KEYS[:3], **off)
    np.testing.assert_array_equal(mixed, np.stack([IMAGES] * 3))
    np.testing.assert_allclose(targets[0], np.eye(10)[LABELS] * 0.9 + 0.01, atol=1e-6)
    np.testing.assert_allclose(mix(KEYS[:1], smoothing=0.0, **off)[1][0], np.eye(10)[LABELS])


def test_float_pictures_are_mixed_without_rounding():
    images = normalize(IMAGES, MEAN, STD)
    mixed, targets = mix(KEYS[:1], images=images, mixup_alpha=1.0, cutmix_alpha=0.0)
    lam = first_weights(targets)[0]
    np.testing.assert_allclose(mixed[0], images * lam + images[::-1] * (1 - lam), atol=1e-5)


def test_erased_boxes_have_their_area_aspect_place_and_noise():
    count, height, width = 1600, 60, 72
    erase = jax.jit(functools.partial(random_erasing, probability=0.25))
    erased = np.asarray(erase(jax.random.key(1), jnp.full((count, height, width, 1), 9.0)))[..., 0]
    inside = erased != 9.0
    hit = inside.any((1, 2))
    assert hit.mean() == pytest.approx(0.25, abs=3.5 * math.sqrt(0.25 * 0.75 / count))
    rows, columns = inside.any(2)[hit].sum(1), inside.any(1)[hit].sum(1)
    np.testing.assert_array_equal(rows * columns, inside[hit].sum((1, 2)))
    area = rows * columns / (height * width)
    assert (area.min(), area.max()) == pytest.approx((0.02, 1 / 3), abs=0.01)
    logs = np.log(rows / columns)
    assert np.abs(logs).max() < math.log(1 / 0.3) + 0.1
    deviation = 3.5 / math.sqrt(hit.sum())
    assert area.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=deviation * area.std() + 0.01)
    assert logs.mean() == pytest.approx(0, abs=deviation * logs.std() + 0.06)
    noise = erased[inside]
    assert (noise.mean(), noise.std()) == pytest.approx((0, 1), abs=0.01)


def test_no_probability_erases_nothing():
    images = jnp.ones((2, 8, 8, 3))
    assert random_erasing(jax.random.key(0), images, 0.0) is images


def test_the_whole_does_not_depend_on_the_number_of_devices():
    @jax.jit
    def whole(key, images, labels):
        options = OPTIONS | {"mixup_alpha": 1.0}
        return augment_batch(key, images, labels, mean=MEAN, std=STD, erasing=0.5, **options)

    images, labels = np.concatenate([IMAGES, IMAGES[:2]]), np.arange(8)
    alone = whole(jax.random.key(3), images, labels)
    mesh = jax.sharding.Mesh(jax.devices(), "data")
    assert mesh.size == 8
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    shared = whole(jax.random.key(3), *jax.device_put((images, labels), sharding))
    for one, many in zip(alone, shared, strict=True):
        np.testing.assert_allclose(one, many, atol=1e-6)
