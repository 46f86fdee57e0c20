"""Mixing, normalising and erasing against their formulas, in numpy."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from configs import default
from mambaout_jax import config as configuration
from mambaout_jax.build import build_model, build_optimizer, build_recipe, build_schedule
from mambaout_jax.data.preprocess import normalize
from mambaout_jax.errors import UserError
from mambaout_jax.runtime.sharding import BATCH, make_mesh, over_mesh, state_shardings
from mambaout_jax.training.erasing import random_erasing
from mambaout_jax.training.mixing import (
    Mixing,
    _symmetric_beta,
    augment_batch,
    check_group,
    mixup_cutmix,
    partners,
)
from mambaout_jax.training.state import init_params, init_state
from mambaout_jax.training.step import compile_train_step

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MIXING = Mixing(
    num_classes=10,
    smoothing=0.1,
    mixup_alpha=0.8,
    cutmix_alpha=1.0,
    prob=1.0,
    switch_prob=0.5,
    group=0,
    repeats=1,
)
IMAGES = np.random.RandomState(0).randint(0, 256, (6, 20, 30, 3), np.uint8)
LABELS = np.arange(6)
KEYS = jax.random.split(jax.random.key(0), 400)


def mix(keys=KEYS, images=IMAGES, enabled=True, **options):
    """Mixed images and targets for each of many keys, as numpy."""
    mixing = dataclasses.replace(MIXING, **options)

    def one(key):
        return mixup_cutmix(key, jnp.asarray(images), LABELS, mixing, enabled=enabled)

    return [np.asarray(part) for part in jax.jit(jax.vmap(one))(keys)]


def first_weights(targets):
    """The weight of the first image in its target; its partner is the last one."""
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


def test_float_images_are_mixed_without_rounding():
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
    images, labels = np.concatenate([IMAGES] * 4)[:16], np.arange(16) % 10
    mesh = make_mesh()
    assert mesh.size == 8
    for group in (0, 2, 4, 8):
        mixing = dataclasses.replace(MIXING, mixup_alpha=1.0, group=group)
        whole = jax.jit(augmentation(mixing))
        alone = whole(jax.random.key(3), images, labels)
        sharding = jax.sharding.NamedSharding(mesh, BATCH)
        shared = whole(jax.random.key(3), *jax.device_put((images, labels), sharding))
        for one, many in zip(alone, shared, strict=True):
            np.testing.assert_allclose(one, many, atol=1e-6)


def augmentation(mixing):
    return functools.partial(augment_batch, mixing=mixing, mean=MEAN, std=STD, erasing=0.5)


def grouped(count, group, size=(4, 6), **options):
    """A batch of random images, mixed in groups: (images, labels, mixed images, targets)."""
    rng = np.random.RandomState(1)
    images = rng.randint(0, 256, (count, *size, 3), np.uint8)
    labels = rng.randint(0, 10, count)
    mixing = dataclasses.replace(MIXING, group=group, **options)
    mix = jax.jit(functools.partial(mixup_cutmix, mixing=mixing))
    mixed, targets = mix(jax.random.key(5), images, labels)
    return images, labels, np.asarray(mixed), np.asarray(targets)


def test_each_group_has_its_own_draw_and_pairs_within_itself():
    images, labels, mixed, targets = grouped(64 * 8, 8)
    smoothed = np.eye(10)[labels] * 0.9 + 0.01
    neighbours = np.arange(512) ^ 1
    kinds, weights = [], []
    for start in range(0, 512, 8):
        own = np.arange(start, start + 8)
        other = neighbours[own]
        assert set(other) == set(own)
        different = smoothed[own] - smoothed[other]
        lam = ((targets[own] - smoothed[other]) * different).sum() / (different**2).sum()
        expected = smoothed[own] * lam + smoothed[other] * (1 - lam)
        np.testing.assert_allclose(targets[own], expected, atol=1e-5)
        pasted = mixed[own] == images[other]
        kept = mixed[own] == images[own]
        if (pasted | kept).all() and not pasted.all():  # one box, the same for all
            inside = (pasted & ~kept).any((0, 3))
            assert kept[:, ~inside].all()
            assert pasted[:, inside].all()
            assert lam == pytest.approx(1 - inside.mean(), abs=1e-5)
        else:
            exact = images[own] * lam + images[other] * (1 - lam)
            assert np.abs(mixed[own] - exact).max() < 0.51
        kinds.append((pasted | kept).all())
        weights.append(lam)
    assert 16 < sum(kinds) < 48
    assert len({round(float(lam), 4) for lam in np.array(weights)[~np.array(kinds)]}) > 16


def test_a_groups_draw_depends_on_its_number_in_the_batch_alone():
    key, images, labels = jax.random.key(9), np.zeros((32, 4, 6, 3), np.uint8), np.arange(32) % 10
    images[1::2] = 255
    mixing = dataclasses.replace(MIXING, group=8)
    short = mixup_cutmix(key, images[:16], labels[:16], mixing)
    long = mixup_cutmix(key, images, labels, mixing)
    for few, many in zip(short, long, strict=True):
        np.testing.assert_array_equal(few, many[:16])
        assert not np.array_equal(many[:16], many[16:])


@pytest.mark.parametrize("repeats", [2, 3, 4, 5])
def test_copies_of_an_image_are_not_mixed_with_each_other(repeats):
    images = np.arange(64 * repeats) // repeats
    mixing = dataclasses.replace(MIXING, group=16, repeats=repeats)
    others = np.asarray(partners(jnp.asarray(images), mixing))
    assert (others != images).all()
    places = np.asarray(partners(jnp.arange(64 * repeats), mixing))
    np.testing.assert_array_equal(places[places], np.arange(64 * repeats))
    np.testing.assert_array_equal(places // 16, np.arange(64 * repeats) // 16)


def observed(images, targets):
    """What was done to pairs of a black and a white image [N, 2, H, W, C] of classes 0 and 1.

    Returns:
        Whether each was cut, the first one's weight in its target, and the boxes' areas.
    """
    images, targets = np.asarray(images), np.asarray(targets)
    first = images[:, 0].reshape(len(images), -1)
    white, weight = (first == 255).mean(1), ((targets[:, 0, 0] - 0.01) / 0.9).round(5)
    # Mixup with a weight near 0 or 1 leaves black or white too, but not of the weight's area.
    cut = ((first == 0) | (first == 255)).all(1) & (np.abs(1 - white - weight) < 1e-5)
    cut &= weight < 1 - 1e-5
    return cut, weight, white[cut]


def distance(one, two):
    """The Kolmogorov-Smirnov distance of two samples, in units of its standard deviation."""
    points = np.sort(np.concatenate([one, two]))
    gap = np.searchsorted(np.sort(one), points, "right") / len(one)
    gap -= np.searchsorted(np.sort(two), points, "right") / len(two)
    return np.abs(gap).max() * math.sqrt(len(one) * len(two) / (len(one) + len(two)))


@pytest.mark.parametrize(
    "options",
    [{}, {"prob": 0.7, "switch_prob": 0.2}, {"mixup_alpha": 0.0}, {"cutmix_alpha": 0.0}],
    ids=["both", "odds", "cutmix", "mixup"],
)
def test_groups_are_mixed_as_timm_mixes_its_loaders_batches(options):
    mixup = pytest.importorskip("timm.data.mixup")
    count, size = 4000, (16, 24)
    pair = np.stack([np.zeros((3, *size), np.uint8), np.full((3, *size), 255, np.uint8)])
    mixing = dataclasses.replace(MIXING, group=2, **options)
    reference = mixup.FastCollateMixup(
        mixup_alpha=mixing.mixup_alpha,
        cutmix_alpha=mixing.cutmix_alpha,
        prob=mixing.prob,
        switch_prob=mixing.switch_prob,
        label_smoothing=mixing.smoothing,
        num_classes=mixing.num_classes,
        mode="batch",
    )
    np.random.seed(0)  # noqa: NPY002 (timm draws from it)
    batches = [reference([(pair[0], 0), (pair[1], 1)]) for _ in range(count)]
    theirs = observed(
        np.stack([images.numpy().transpose(0, 2, 3, 1) for images, _ in batches]),
        np.stack([targets.numpy() for _, targets in batches]),
    )
    batch = np.tile(pair.transpose(0, 2, 3, 1), (count, 1, 1, 1))
    images, targets = mixup_cutmix(jax.random.key(2), batch, np.arange(2 * count) % 2, mixing)
    ours = observed(images.reshape(count, 2, *size, 3), targets.reshape(count, 2, 10))
    odds = theirs[0].mean()
    deviation = math.sqrt(2 * odds * (1 - odds) / count)
    assert ours[0].mean() == pytest.approx(odds, abs=3.5 * deviation + 1e-9)
    assert distance(ours[1], theirs[1]) < 1.95  # exceeded by chance once in a thousand
    for kind in (True, False):
        weights = [part[1][part[0] == kind] for part in (ours, theirs)]
        if min(map(len, weights)) > 100:
            assert distance(*weights) < 1.95
    if mixing.cutmix_alpha:
        assert distance(ours[2], theirs[2]) < 1.95
    # The second image is the first one's mirror: what the one has, the other lacks.
    np.testing.assert_allclose(targets[::2, :2], targets[1::2, 1::-1], atol=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 2.0, 8.0])
def test_the_weight_is_beta_distributed(alpha):
    keys = jax.random.split(jax.random.key(1), 20_000)
    drawn = np.asarray(jax.vmap(lambda key: _symmetric_beta(key, alpha))(keys))
    low = drawn[drawn < 0.5]  # float32 rounds numbers near 1 to 1
    assert len(low) == pytest.approx(10_000, abs=4 * math.sqrt(5_000))
    assert stats.kstest(2 * stats.beta(alpha, alpha).cdf(low), "uniform").pvalue > 1e-3


@pytest.mark.parametrize(
    ("group", "repeats", "batch", "message"),
    [
        (128, 1, 192, "batch_size 192 does not divide into groups .* such as 128"),
        (96, 1, 4096, "batch_size 4096 does not divide into groups"),
        (3, 1, 96, "mixup_group is 3: expected a multiple of 2, or 0"),
        (4, 3, 96, "mixup_group is 4: expected a multiple of 8 with config.augment.repeats 3"),
        (-2, 1, 96, "mixup_group is -2"),
    ],
)
def test_a_batch_that_the_group_does_not_divide_is_refused(group, repeats, batch, message):
    with pytest.raises(UserError, match=message):
        check_group(group, repeats, batch)
    config = default.get_config()
    config.batch_size, config.augment.repeats, config.augment.mixup_group = batch, repeats, group
    with pytest.raises(UserError, match=message):
        configuration.check(config)


@pytest.mark.parametrize("batch", [4096, 128, 64, 25])
def test_the_default_takes_groups_of_128_and_smaller_batches(batch):
    config = default.get_config()
    config.batch_size = batch
    configuration.check(config)
    assert build_recipe(config, steps_per_epoch=10).mixup_group == 128


def test_a_batch_smaller_than_the_group_is_one_group():
    whole, group = (
        mixup_cutmix(KEYS[0], IMAGES, LABELS, dataclasses.replace(MIXING, group=size))
        for size in (0, 128)
    )
    for one, other in zip(whole, group, strict=True):
        np.testing.assert_array_equal(one, other)


def exchanged(compiled):
    """The collectives of a compiled program, with the elements of their largest array."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    found = re.findall(rf" = (.*?) ({kinds})(?:-start)?\((.*)", compiled.as_text())
    sizes = [
        (kind, math.prod(int(size) for size in shape.split(",") if size))
        for result, kind, operands in found
        for shape in re.findall(r"\w\[([\d,]*)\]", result + operands)
    ]
    return {kind: max(size for other, size in sizes if other == kind) for kind, _ in sizes}


@pytest.mark.parametrize(
    ("share", "group", "repeats"), [(16, 8, 1), (8, 8, 1), (8, 32, 1), (2, 16, 1), (8, 16, 3)]
)
def test_nothing_is_sent_between_devices(share, group, repeats):
    mesh = make_mesh()
    assert mesh.size == 8
    images = jax.ShapeDtypeStruct((8 * share, 16, 16, 3), jnp.uint8)
    labels = jax.ShapeDtypeStruct((8 * share,), jnp.int32)
    batch = jax.sharding.NamedSharding(mesh, BATCH)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def collectives(group):
        mixing = dataclasses.replace(MIXING, group=group, repeats=repeats)
        whole = jax.jit(
            over_mesh(augmentation(mixing), mesh),
            in_shardings=(replicated, batch, batch),
            out_shardings=batch,
        )
        key = jax.eval_shape(lambda: jax.random.key(0))
        return exchanged(whole.lower(key, images, labels).compile())

    assert max(collectives(0).values()) >= 16 * 16 * 3, "the whole batch, reversed, is sent"
    assert collectives(group) == {}


def test_the_compiled_step_sends_gradients_alone():
    mesh, config = make_mesh(), default.get_config()
    config.model.name, config.data.image_size, config.batch_size = "test_mambaout", 32, 512
    config.model.dtype, config.model.drop_path_rate = "float32", 0.0
    model, optimizer = build_model(config), build_optimizer(config, build_schedule(config, 10))
    state = jax.eval_shape(
        lambda key: init_state(init_params(key, model, (32, 32)), optimizer, ema=False),
        jax.random.key(0),
    )
    batch = {
        "image": jax.ShapeDtypeStruct((512, 32, 32, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((512,), jnp.int32),
    }
    recipe, key = build_recipe(config, 10), jax.ShapeDtypeStruct((2,), jnp.uint32)
    assert (512 // mesh.size, recipe.mixup_group) == (64, 128)
    step = compile_train_step(model, optimizer, recipe, state_shardings(state, mesh), mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = step.trace(state, batch, key)
    for platform in ("cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "stablehlo.while" not in text, "the host of a GPU would wait in each iteration"
        for call in ("infeed", "outfeed", "callback", "send", "recv"):
            assert not re.search(rf"stablehlo\.{call}\b|custom_call @\S*{call}", text), call
    compiled = traced.lower().compile()
    assert set(exchanged(compiled)) == {"all-reduce"}
    reduced = re.findall(r" all-reduce(?:-start)?\(.*op_name=\"([^\"]*)", compiled.as_text())
    assert [name for name in reduced if "transpose" in name]
    assert not [name for name in reduced if "while" in name], "sent in each iteration of a loop"
