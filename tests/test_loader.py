"""Order, resume and evaluation of the batches, bit for bit."""

import time

import numpy as np
import pytest
from batches import eval_batches, train_batches

from configs import default
from mambaout_jax.data.buffers import Layout
from mambaout_jax.data.order import Generators
from mambaout_jax.data.parallel import Parallel
from mambaout_jax.data.prefetch import BatchesAhead
from mambaout_jax.errors import UserError


def digits_config(**data):
    config = default.get_config()
    config.data.update(name="digits", num_classes=10, image_size=24, threads=2, **data)
    config.batch_size = 120
    config.eval.batch_size = 100
    return config


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_a_training_batch_has_the_promised_shapes():
    batches = train_batches(digits_config())
    assert (batches.num_examples, batches.steps_per_epoch) == (1437, 11)
    batch = next(batches)
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "image": ((120, 24, 24, 3), np.uint8),
        "label": ((120,), np.int32),
        "replaced": ((120,), np.bool_),
    }


def test_restored_goes_on_as_straight():
    straight = take(train_batches(digits_config()), 14)
    batches = train_batches(digits_config())
    take(batches, 3)
    state = batches.state()
    take(batches, 4)
    batches.restore(state)
    assert_same(take(batches, 11), straight[3:])
    assert_same(take(train_batches(digits_config(), start_step=12), 2), straight[12:])


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_global_batch(process_count):
    whole = take(train_batches(digits_config()), 3)
    parts = [
        take(train_batches(digits_config(), process_index=p, process_count=process_count), 3)
        for p in range(process_count)
    ]
    joined = [
        {key: np.concatenate([part[step][key] for part in parts]) for key in whole[0]}
        for step in range(3)
    ]
    assert_same(joined, whole)


def test_another_order_is_not_resumed():
    state = train_batches(digits_config()).state()
    config = digits_config()
    config.seed = 1
    with pytest.raises(UserError, match="seed = 0, this run 1"):
        train_batches(config).restore(state)


@pytest.mark.parametrize("process_count", [1, 2])
def test_evaluation_sees_each_image_once(process_count):
    sets = [
        eval_batches(digits_config(), process_index=p, process_count=process_count)
        for p in range(process_count)
    ]
    for _ in range(2):
        lists = [list(batches) for batches in sets]
        assert {len(batches) for batches in lists} == {4}
        batches = [batch for several in lists for batch in several]
        assert {batch["image"].shape[0] for batch in batches} == {100 // process_count}
        labels = np.concatenate([batch["label"][batch["mask"]] for batch in batches])
        np.testing.assert_array_equal(np.bincount(labels), [36] * 10)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_worker_processes_change_nothing(workers):
    batches, held_out = train_batches(digits_config(workers=workers)), eval_batches(digits_config())
    taken = take(batches, 2)
    batches.restore(batches.state())
    assert_same(taken + take(batches, 1), take(train_batches(digits_config()), 3))
    batches.close()
    if workers == 2:
        assert_same(list(eval_batches(digits_config(workers=2))), list(held_out))


def identity_batches(**options):
    """Batches of distinct images: only the order is random."""
    config = digits_config()
    config.augment.update(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), hflip=0.0, policy="")
    config.augment.update(interpolation="bicubic", **options)
    config.data.train_split = "train[:48]"
    config.batch_size = 48 * config.augment.repeats
    return train_batches(config)


@pytest.mark.parametrize("repeats", [1, 3])
def test_an_epoch_is_a_fresh_shuffle_with_repeats_in_a_row(repeats):
    batches = identity_batches(repeats=repeats)
    assert batches.steps_per_epoch == 1
    epochs = [[image.tobytes() for image in next(batches)["image"]] for _ in range(3)]
    for epoch in epochs:
        assert len(set(epoch)) == 48
        assert all(len(set(epoch[i : i + repeats])) == 1 for i in range(0, len(epoch), repeats))
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_epochs_and_repeats_draw_new_augmentations():
    batches = identity_batches(repeats=2, crop_scale=(0.2, 0.9))
    images = np.concatenate([next(batches)["image"] for _ in range(2)])
    assert len({image.tobytes() for image in images}) > 150  # of 192; small crops may agree


def test_the_seed_fixes_everything():
    configs = [digits_config() for _ in range(3)]
    configs[2].seed = 1
    first, same, other = (next(train_batches(config)) for config in configs)
    assert_same([first], [same])
    assert not np.array_equal(first["label"], other["label"])


def test_a_batch_must_fit_into_an_epoch():
    config = digits_config()
    config.batch_size = 2000
    with pytest.raises(UserError, match=r"batch_size is 2000, but .* only 1437 images"):
        train_batches(config)


def test_batches_must_divide_over_processes():
    with pytest.raises(
        UserError, match=r"^batch_size is 120: expected a multiple of the 7 processes"
    ):
        train_batches(digits_config(), process_count=7)
    with pytest.raises(UserError, match=r"^eval.batch_size is 100: expected a multiple of the 7"):
        eval_batches(digits_config(), process_count=7)


def test_kept_batches_stay_as_they_are():
    batches = train_batches(digits_config())
    kept = take(batches, 12)  # more than there are buffers
    assert_same(kept, take(train_batches(digits_config()), 12))


def test_the_memory_of_a_deleted_batch_is_used_again():
    batches = train_batches(digits_config())
    places = {next(batches)["image"].ctypes.data for _ in range(20)}
    assert len(places) < 10
    view = next(batches)["image"][3:]  # keeps the memory of its batch
    copy = view.copy()
    take(batches, 20)
    np.testing.assert_array_equal(view, copy)


def test_random_numbers_are_those_that_grain_gave():
    """Recorded with Grain 0.2.18: MapDataset.range(n).seed(3).random_map(lambda i, rng: ...)."""
    generators = Generators(3)
    drawn = [
        (generator.random(), int(generator.integers(1000)))
        for generator in map(generators.at, (0, 7, 2**40))
    ]
    assert drawn == [
        (0.9406123220427709, 279),
        (0.5467759007702437, 777),
        (0.633799906795458, 88),
    ]


class SlowMaker:
    """Reads or makes slowly."""

    layout = Layout(20, (("label", (), "int32"),))

    def __init__(self, slow):
        self._slow = slow

    def __call__(self, step, start, out, permit):
        if self._slow == "reading":
            time.sleep(0.05)
        with permit:
            if self._slow == "making":
                time.sleep(0.05)
        return []


@pytest.mark.parametrize("slow", ["reading", "making"])
def test_the_time_of_reading_is_told_apart_from_that_of_making(slow):
    ahead = BatchesAhead(SlowMaker(slow), Parallel(workers=0, threads=3, cores=1), 0, 3)
    assert len(list(ahead)) == 3
    slower, faster = ahead.reading, ahead.making
    if slow == "making":
        slower, faster = faster, slower
    assert slower >= 6 * 0.05  # chunks
    assert faster < slower


def test_the_share_of_reading_is_that_since_the_last_call():
    batches = train_batches(digits_config())
    assert batches.reading_share() == 0
    take(batches, 3)
    assert 0 < batches.reading_share() < 1
    assert batches.reading_share() == 0
