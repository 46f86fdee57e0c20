"""Fingerprints notice every change, wherever they are computed; records have a checksum."""

import dataclasses
import json

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_weights

from mambaout_jax.errors import UserError
from mambaout_jax.weights.info import FORMAT, NewerFormatError, WeightsInfo
from mambaout_jax.weights.integrity import check_finite, fingerprints

INFO = dataclasses.replace(small_weights.INFO, fingerprints={"params": "0123456789abcdef"})


def fingerprint(tree):
    return fingerprints(params=tree)["params"]


def tree():
    """Returns arrays of several shapes and types; one is longer than what is hashed at a time."""
    random = np.random.default_rng(0)
    return {
        "kernel": random.standard_normal((7, 7, 8, 16)).astype(np.float32),
        "long": random.standard_normal((150_000,)).astype(np.float32),
        "scalar": np.float32(3).reshape(()),
        "empty": np.zeros((0, 3), np.float32),
        "nested": {"count": np.arange(5, dtype=np.int32), "mask": np.array([True, False])},
        "half": np.asarray(jnp.linspace(0, 1, 9, dtype=jnp.bfloat16)),
    }


def test_numpy_one_device_and_every_sharding_agree():
    arrays = tree()
    expected = fingerprint(arrays)
    assert len(expected) == 16
    assert fingerprint(jax.tree.map(jnp.asarray, arrays)) == expected
    for shape, names in (((8,), ("data",)), ((2, 4), ("data", "fsdp"))):
        mesh = jax.make_mesh(shape, names)
        for axis in range(4):

            def put(x, mesh=mesh, axis=axis, name=names[-1]):
                splits = x.ndim > axis and x.shape[axis] and x.shape[axis] % mesh.shape[name] == 0
                spec = jax.P(*[None] * axis, name) if splits else jax.P()
                return jax.device_put(x, jax.NamedSharding(mesh, spec))

            sharded = jax.tree.map(put, arrays)
            assert fingerprint(sharded) == expected
    assert len(sharded["kernel"].sharding.device_set) == 8


def test_the_fingerprint_of_a_checkpoint_lasts():
    """It is stored in checkpoints: another algorithm would refuse those."""
    assert (
        fingerprint({"a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3)}})
        == "54402427c203168d"
    )


def test_every_bit_of_every_value_counts():
    array = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    expected = fingerprint({"x": array})
    for index in range(array.size):
        for bit in range(32):
            changed = array.copy()
            changed.reshape(-1).view(np.uint32)[index] ^= np.uint32(1 << bit)
            assert fingerprint({"x": changed}) != expected


def test_changes_that_cancel_in_a_sum_are_noticed():
    array = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    expected = fingerprint({"x": array, "y": array + 1})
    signs = array.copy()
    signs[0, :2] *= -1  # the highest bit twice: 2**31 + 2**31 is 0 modulo 2**32
    swapped = array.copy()
    swapped[0, 0], swapped[0, 1] = array[0, 1], array[0, 0]
    for changed in (
        {"x": signs, "y": array + 1},
        {"x": swapped, "y": array + 1},
        {"x": array[::-1], "y": array + 1},
        {"x": array.T, "y": array + 1},
        {"x": array.reshape(2, 8), "y": array + 1},
        {"x": array.view(np.int32), "y": array + 1},
        {"x": array + 1, "y": array},
        {"x": array, "z": array + 1},
        {"x": array},
    ):
        assert fingerprint(changed) != expected


def test_an_item_that_is_none_has_no_fingerprint():
    arrays = tree()
    assert fingerprints(params=arrays, ema_params=None) == {"params": fingerprint(arrays)}


def test_items_do_not_depend_on_each_other():
    arrays = jax.tree.map(jnp.asarray, tree())
    found = fingerprints(params=arrays, optimizer=(arrays["nested"], jnp.zeros(3)))
    assert found["params"] == fingerprint(arrays)
    assert found["optimizer"] != found["params"]


def test_values_that_are_not_finite_are_refused():
    params = golden.params(small_weights.INFO.create_model())
    check_finite(params, "w")
    for value in (np.nan, np.inf, -np.inf):
        params["head"]["fc2"]["bias"][1] = value
        with pytest.raises(UserError, match=r"w holds values that are not finite .*head/fc2/bias"):
            check_finite(params, "w")


def test_a_record_names_its_format_and_comes_back():
    record = json.loads(json.dumps(INFO.to_json()))
    assert record["format"] == FORMAT == 1
    assert WeightsInfo.from_json(record) == INFO


def test_every_flipped_bit_of_a_record_is_noticed():
    text = json.dumps(INFO.to_json()).encode()
    for index in range(8 * len(text)):
        changed = bytearray(text)
        changed[index // 8] ^= 1 << index % 8
        with pytest.raises(ValueError):  # noqa: PT011  JSON's own, or a UserError
            WeightsInfo.from_json(json.loads(changed))


def test_a_record_from_before_formats_is_read():
    record = json.loads(json.dumps(INFO.to_json()))
    del record["format"], record["checksum"], record["fingerprints"]
    assert WeightsInfo.from_json(record) == dataclasses.replace(INFO, fingerprints={})


def test_a_record_of_a_newer_format_is_refused_in_a_sentence():
    record = {**INFO.to_json(), "format": FORMAT + 1, "news": [1, 2]}
    with pytest.raises(NewerFormatError) as error:
        WeightsInfo.from_json(record, "the checkpoint runs/x")
    assert str(error.value) == (
        f"the checkpoint runs/x has checkpoint format {FORMAT + 1}, and this version of "
        f"mambaout_jax reads formats up to {FORMAT}: update mambaout_jax"
    )
