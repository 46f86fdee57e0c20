"""Synthetic images: random, made once, the same at each start, and never copied."""

import io

import numpy as np
import pytest
from batches import eval_batches, train_batches
from PIL import Image

from configs import default
from mambaout_jax.data.sources import Dataset, open_source
from mambaout_jax.errors import UserError


def config(**data):
    config = default.get_config()
    config.data.update(source="synthetic", num_classes=7, image_size=8, eval_split="50", **data)
    config.batch_size, config.eval.batch_size = 12, 16
    return config


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        for key in a.keys() | b.keys():
            np.testing.assert_array_equal(a[key], b[key])


def test_training_batches_are_random_and_differ():
    batches = train_batches(config())
    assert (batches.num_examples, batches.num_classes) == (1_281_167, 7)
    assert batches.steps_per_epoch == 1_281_167 // 12
    assert batches.made_by == "random images in memory"
    first, second = take(batches, 2)
    assert {key: (value.shape, value.dtype) for key, value in first.items()} == {
        "image": ((12, 8, 8, 3), np.uint8),
        "label": ((12,), np.int32),
        "replaced": ((12,), np.bool_),
    }
    assert not np.array_equal(first["image"], second["image"])
    assert not first["replaced"].any()
    images = np.concatenate([batch["image"] for batch in take(batches, 30)])
    assert abs(images.mean() - 127.5) < 1
    labels = np.concatenate([batch["label"] for batch in take(batches, 30)])
    assert set(labels) == set(range(7))


def test_batches_follow_the_seed_and_the_step():
    straight = take(train_batches(config()), 6)
    assert_same(straight, take(train_batches(config()), 6))
    batches = train_batches(config())
    take(batches, 2)
    state = batches.state()
    take(batches, 3)
    batches.restore(state)
    assert_same(straight[2:], take(batches, 4))
    other = config()
    other.seed = 1
    assert not np.array_equal(next(train_batches(other))["image"], straight[0]["image"])
    parts = [next(train_batches(config(), process_index=p, process_count=2)) for p in range(2)]
    assert parts[0]["image"].shape == (6, 8, 8, 3)
    assert not np.array_equal(parts[0]["image"], parts[1]["image"])


def test_batches_are_views_of_the_same_memory():
    first, second = take(train_batches(config()), 2)
    assert np.shares_memory(first["image"], second["image"])


@pytest.mark.parametrize("process_count", [1, 2])
def test_evaluation_sees_each_image_once(process_count):
    sets = [
        eval_batches(config(), process_index=p, process_count=process_count)
        for p in range(process_count)
    ]
    for _ in range(2):
        lists = [list(batches) for batches in sets]
        assert {len(batches) for batches in lists} == {4}
        assert sum(batch["mask"].sum() for batches in lists for batch in batches) == 50
    assert_same(lists[0], list(sets[0]))


def test_it_is_a_source_of_encoded_images_as_well():
    source = open_source(Dataset("synthetic", "", "", "train", "validation", None), "validation")
    assert (len(source), source.num_classes, source.name) == (50_000, 1000, "synthetic/validation")
    records = [source[3], source[4], source[3]]
    assert Image.open(io.BytesIO(records[0]["image"])).size == (64, 64)
    assert records[0] == records[2] != records[1]


@pytest.mark.parametrize("split", ["test", "0", "-5", "1e3", ""])
def test_an_unknown_split_is_named(split):
    with pytest.raises(UserError, match=f"no split '{split}': expected train, validation or a"):
        train_batches(config(train_split=split))
