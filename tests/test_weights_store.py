"""Weights in Orbax: round trips, the best step of a run, and everything that is refused."""

import dataclasses
import errno
import shutil
import time

import golden
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tenacity

import mambaout_jax
from mambaout_jax.data.preprocess import Preprocessing
from mambaout_jax.errors import StorageError, UserError
from mambaout_jax.weights.info import NewerFormatError, WeightsInfo
from mambaout_jax.weights.integrity import fingerprints
from mambaout_jax.weights.store import load_weights, save_weights

SMALL = {"depths": (1, 1, 2, 1), "widths": (8, 12, 16, 24)}
INFO = WeightsInfo(
    model="test_mambaout",
    num_classes=3,
    preprocessing=Preprocessing(size=(160, 96), crop_pct=0.9, crop_mode="squash"),
    overrides=SMALL,
    class_names=("ant", "bee", "cat"),
    source="here",
    metrics={"top1": 12.5},
)


def small_params(seed=0):
    return golden.params(INFO.create_model(), seed)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def save_step(workdir, step, info, **items):
    """Writes a checkpoint as a run does."""
    if not info.fingerprints:
        info = dataclasses.replace(info, fingerprints=fingerprints(**items))
    args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        args["meta"] = ocp.args.JsonSave(info.to_json())
        manager.save(step, args=ocp.args.Composite(**args))


def test_round_trip(tmp_path):
    params = small_params()
    written = save_weights(tmp_path / "w", params, INFO)
    restored, info = load_weights(tmp_path / "w")
    assert_equal(restored, params)
    assert info == written == dataclasses.replace(INFO, digest=written.digest)
    assert len(info.digest) == 64
    assert {leaf.dtype for leaf in jax.tree.leaves(restored)} == {np.dtype("float32")}
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_the_steps_of_a_run_are_weights_too(tmp_path):
    unmeasured = dataclasses.replace(INFO, metrics={})
    optimizer = {"count": np.array(3, np.int32)}
    for step, seed in ((1, 10), (2, 20)):
        save_step(tmp_path, step, unmeasured, params=small_params(seed), optimizer=optimizer)
    assert_equal(load_weights(tmp_path)[0], small_params(20))
    assert_equal(load_weights(tmp_path / "checkpoints" / "1")[0], small_params(10))
    for step, top1 in ((3, 70.0), (4, 60.0)):
        info = dataclasses.replace(INFO, metrics={"top1": top1})
        save_step(tmp_path, step, info, params=small_params(10 * step))
    params, info = load_weights(tmp_path)
    assert_equal(params, small_params(30))
    assert info.metrics == {"top1": 70.0}


def test_sharded_steps_and_averages_come_back_whole(tmp_path):
    mesh = jax.make_mesh((8,), ("data",))
    split = jax.NamedSharding(mesh, jax.P("data"))
    averages = small_params(1)
    put = {"params": small_params(0), "ema_params": averages}
    put = jax.tree.map(lambda x: jax.device_put(x, split) if x.shape[0] % 8 == 0 else x, put)
    save_step(tmp_path, 7, dataclasses.replace(INFO, averaged=True), **put)
    params, info = load_weights(tmp_path)
    assert_equal(params, averages)
    save_weights(tmp_path / "w", params, info)
    assert_equal(load_weights(tmp_path / "w")[0], averages)


def test_an_existing_output_is_refused_and_kept(tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "mine").write_text("keep")
    with pytest.raises(UserError, match="exists"):
        save_weights(tmp_path / "w", small_params(), INFO)
    assert (tmp_path / "w" / "mine").read_text() == "keep"


def test_a_target_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        save_weights(tmp_path / "file" / "w", small_params(), INFO)


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    params = small_params()
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=needed - 1))
    with pytest.raises(UserError, match=r"cannot write .*: it needs .* MB, and .* MB are free"):
        save_weights(tmp_path / "deep" / "w", params, INFO)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=needed))
    save_weights(tmp_path / "deep" / "w", params, INFO)


def test_a_write_that_fails_midway_leaves_nothing(tmp_path, monkeypatch):
    def fail(self, *args, **kwargs):
        deadline = time.monotonic() + 60  # Orbax makes its directories in the background
        while not list(tmp_path.iterdir()):
            assert time.monotonic() < deadline, "nothing was begun"
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "async_save", fail)
    monkeypatch.setattr(ocp.JsonCheckpointHandler, "save", fail)
    with pytest.raises(UserError, match="No space left on device"):
        save_weights(tmp_path / "w", small_params(), INFO)
    assert not list(tmp_path.iterdir())


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no weights in .*expected a converted checkpoint"):
        load_weights(tmp_path)
    with pytest.raises(UserError, match="no weights in"):
        load_weights(tmp_path / "absent")


@pytest.mark.parametrize("item", ["params", "meta"])
def test_damaged_checkpoints_are_refused(tmp_path, item):
    save_weights(tmp_path / "w", small_params(), INFO)
    files = [path for path in (tmp_path / "w" / item).rglob("*") if path.is_file()]
    for path in files:
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot be read|no valid metadata"):
        load_weights(tmp_path / "w")


def test_values_that_changed_are_refused(tmp_path):
    wrong = dataclasses.replace(INFO, digest="0" * 64)
    save_step(tmp_path / "a", 1, wrong, params=small_params())
    with pytest.raises(UserError, match="are damaged: their digest differs"):
        load_weights(tmp_path / "a")
    wrong = dataclasses.replace(INFO, fingerprints=fingerprints(params=small_params(1)))
    save_step(tmp_path / "b", 1, wrong, params=small_params())
    with pytest.raises(UserError, match="are damaged: the fingerprint of params differs"):
        load_weights(tmp_path / "b")


def test_a_newer_format_is_refused_and_not_called_damaged(tmp_path):
    save_step(tmp_path, 1, INFO, params=small_params())
    meta = tmp_path / "checkpoints" / "1" / "meta" / "metadata"
    meta.write_text(meta.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(NewerFormatError, match="reads formats up to 1: update mambaout_jax"):
        load_weights(tmp_path)


def test_a_stray_or_half_copied_step_is_not_considered(tmp_path, caplog):
    save_step(tmp_path, 3, INFO, params=small_params())
    (tmp_path / "checkpoints" / "99").mkdir()
    shutil.copytree(tmp_path / "checkpoints" / "3" / "params", tmp_path / "checkpoints/98/params")
    assert_equal(load_weights(tmp_path)[0], small_params())
    assert caplog.text.count("is no complete checkpoint: not considered") == 2


def failing(restore, count):
    """Returns a function that raises EIO `count` times before it works."""
    left = [count]

    def attempt(*args, **options):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return restore(*args, **options)

    return attempt


def test_a_read_error_of_a_while_is_retried_and_is_no_damage(tmp_path, monkeypatch, caplog):
    save_weights(tmp_path / "w", small_params(), INFO)
    monkeypatch.setattr(tenacity.nap.time, "sleep", lambda seconds: None)
    restore = ocp.Checkpointer.restore
    monkeypatch.setattr(ocp.Checkpointer, "restore", failing(restore, 2))
    assert_equal(load_weights(tmp_path / "w")[0], small_params())
    assert caplog.text.count("Input/output error): trying again") == 2
    monkeypatch.setattr(ocp.Checkpointer, "restore", failing(restore, 100))
    with pytest.raises(StorageError, match=r"w cannot be read: Input/output error"):
        load_weights(tmp_path / "w")


def test_weights_that_are_not_finite_are_refused_unless_asked_for(tmp_path):
    params = small_params()
    params["stem"]["conv1"]["bias"][2] = np.nan
    save_step(tmp_path, 1, INFO, params=params)
    with pytest.raises(UserError, match=r"holds values that are not finite .* stem/conv1/bias"):
        mambaout_jax.load_pretrained(tmp_path)
    assert_equal(mambaout_jax.load_pretrained(tmp_path, allow_non_finite=True)[1], params)


def test_weights_that_do_not_fit_their_description_are_refused(tmp_path):
    params = small_params()
    del params["stem"]["conv1"]["bias"]
    params["head"]["fc2"]["bias"] = np.zeros(4, np.float32)
    params["more"] = np.zeros(1, np.float32)
    save_weights(tmp_path / "w", params, INFO)
    with pytest.raises(UserError) as error:
        load_weights(tmp_path / "w")
    for part in ("head/fc2/bias is (4,), expected (3,)", "more is unexp", "stem/conv1/bias is mis"):
        assert part in str(error.value)


def test_a_damaged_description_is_refused():
    record = INFO.to_json()
    for damaged in ({}, {**record, "more": 1}, {**record, "preprocessing": None}):
        with pytest.raises(UserError, match="damaged"):
            WeightsInfo.from_json(damaged)
