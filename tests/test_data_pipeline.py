"""Order, resume and evaluation of the batches, bit for bit."""

import numpy as np
import pytest

from configs import default
from mambaout_jax.data.pipeline import EvalBatches, TrainBatches
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
    batches = TrainBatches(digits_config())
    assert (batches.num_examples, batches.steps_per_epoch) == (1437, 11)
    batch = next(batches)
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        "image": ((120, 24, 24, 3), np.uint8),
        "label": ((120,), np.int32),
        "replaced": ((120,), np.bool_),
    }


def test_restored_goes_on_as_straight():
    straight = take(TrainBatches(digits_config()), 14)
    batches = TrainBatches(digits_config())
    take(batches, 3)
    state = batches.state()
    take(batches, 4)
    batches.restore(state)
    assert_same(take(batches, 11), straight[3:])
    assert_same(take(TrainBatches(digits_config(), start_step=12), 2), straight[12:])


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_global_batch(process_count):
    whole = take(TrainBatches(digits_config()), 3)
    parts = [
        take(TrainBatches(digits_config(), process_index=p, process_count=process_count), 3)
        for p in range(process_count)
    ]
    joined = [
        {key: np.concatenate([part[step][key] for part in parts]) for key in whole[0]}
        for step in range(3)
    ]
    assert_same(joined, whole)


def test_another_order_is_not_resumed():
    state = TrainBatches(digits_config()).state()
    config = digits_config()
    config.seed = 1
    with pytest.raises(UserError, match="seed = 0, this run 1"):
        TrainBatches(config).restore(state)


@pytest.mark.parametrize("process_count", [1, 2])
def test_evaluation_sees_each_picture_once(process_count):
    sets = [
        EvalBatches(digits_config(), process_index=p, process_count=process_count)
        for p in range(process_count)
    ]
    for _ in range(2):
        lists = [list(batches) for batches in sets]
        assert {len(batches) for batches in lists} == {4}
        batches = [batch for several in lists for batch in several]
        assert {batch["image"].shape[0] for batch in batches} == {100 // process_count}
        labels = np.concatenate([batch["label"][batch["mask"]] for batch in batches])
        np.testing.assert_array_equal(np.bincount(labels), [36] * 10)
