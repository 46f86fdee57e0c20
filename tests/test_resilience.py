"""Runs under signals, damaged checkpoints, full disks, a second command and NaN losses."""

import dataclasses
import errno
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from etils import epath
from small_run import ROOT, small_config, train

from mambaout_jax import files
from mambaout_jax.errors import PreemptedError, StorageError, UserError
from mambaout_jax.files import write_file
from mambaout_jax.runtime import storage
from mambaout_jax.runtime.compilation import use_compilation_cache
from mambaout_jax.runtime.goodput import COMPILE, DATA, DEVICE, Goodput, divide
from mambaout_jax.runtime.profiler import Profiler
from mambaout_jax.runtime.workdir import lock_workdir
from mambaout_jax.training import between_steps, checkpoint, curves, recorder, restore
from mambaout_jax.training import step as step_module
from mambaout_jax.training.metrics import LossMeter
from mambaout_jax.training.state import init_state
from mambaout_jax.training.step import Recipe, update_step
from mambaout_jax.weights.info import WeightsInfo
from mambaout_jax.weights.store import load_weights


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 12 steps with checkpoints 4, 8 and 12."""
    workdir = epath.Path(tmp_path_factory.mktemp("run")) / "straight"
    train(small_config(), workdir)
    return workdir


@pytest.fixture
def stopped(finished, tmp_path):
    """The same run as it was after step 8."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    return tmp_path / "run"


def assert_same_end(workdir, finished):
    expected, got = (load_weights(path / "checkpoints" / "12")[0] for path in (finished, workdir))
    jax.tree.map(np.testing.assert_array_equal, expected, got)
    assert (workdir / "metrics.csv").read_text() == (finished / "metrics.csv").read_text()


def test_sigterm_saves_and_the_run_resumes_to_the_same_bits(finished, tmp_path, monkeypatch):
    push = LossMeter.push

    def terminate_at_six(losses, step, loss):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        push(losses, step, loss)

    monkeypatch.setattr(LossMeter, "push", terminate_at_six)
    with pytest.raises(PreemptedError, match="saved at step 6 of 12"):
        train(small_config(), tmp_path / "run")
    monkeypatch.undo()
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"4", "6"}
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    train(small_config(), tmp_path / "run")
    assert_same_end(tmp_path / "run", finished)


def largest(folder):
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )


def cut_off(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "where"),
    [
        pytest.param(
            cut_off, lambda folder: largest(folder / "optimizer"), marks=pytest.mark.slow, id="cut"
        ),
        pytest.param(flip_a_bit, lambda folder: largest(folder / "params"), id="bit"),
        pytest.param(
            Path.unlink,
            lambda folder: folder / "data" / "metadata",
            marks=pytest.mark.slow,
            id="missing",
        ),
        pytest.param(
            cut_off,
            lambda folder: folder / "metrics" / "metrics",
            marks=pytest.mark.slow,
            id="metrics",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    damage, where, finished, stopped, caplog
):
    damage(where(stopped / "checkpoints" / "8"))
    with caplog.at_level("INFO"):
        train(small_config(), stopped)
    assert "checkpoint 8 is damaged" in caplog.text
    assert "resumed at step 4 of 12" in caplog.text
    assert (stopped / "checkpoints" / "8.damaged").is_dir()
    assert_same_end(stopped, finished)


def test_a_run_does_not_start_from_scratch_where_all_checkpoints_are_damaged(stopped):
    for step in ("4", "8"):
        cut_off(largest(stopped / "checkpoints" / step / "params"))
    with pytest.raises(UserError, match=r"no checkpoint in .*checkpoints can be read \(8: .*; 4: "):
        train(small_config(), stopped)
    assert {path.name for path in (stopped / "checkpoints").iterdir()} == {"4", "8"}


def test_a_checkpoint_of_another_model_is_refused(stopped):
    path = stopped / "checkpoints/8/meta/metadata"
    info = WeightsInfo.from_json(json.loads(path.read_text()))
    path.write_text(json.dumps(dataclasses.replace(info, num_classes=11).to_json()))
    with pytest.raises(UserError, match=r"checkpoint 8 in .* is of another run: .* of 11 classes"):
        train(small_config(), stopped)


@pytest.mark.slow
# A loop that Orbax has left hears of the failed writes too late.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_save_that_cannot_be_written_leaves_the_last_checkpoint(finished, stopped, monkeypatch):
    """Once a save begins, files may grow to 100 kB: the arrays' are larger."""
    limits, save = resource.getrlimit(resource.RLIMIT_FSIZE), checkpoint.save

    def limited(*arguments, **keys):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        save(*arguments, **keys)

    monkeypatch.setattr(checkpoint, "save", limited)
    try:
        with pytest.raises(
            UserError, match=r"cannot save .*: File too large; checkpoint 8 is good"
        ):
            train(small_config(), stopped)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    train(small_config(), stopped)
    assert_same_end(stopped, finished)


def test_storage_that_fails_once_is_read_again(finished, stopped, monkeypatch, caplog):
    monkeypatch.setattr(restore, "restore", failing(restore.restore, times=1))
    with caplog.at_level("INFO"):
        train(small_config(), stopped)
    assert "checkpoint 8 in" in caplog.text
    assert "failed (Input/output error): trying again" in caplog.text
    assert "resumed at step 8" in caplog.text
    assert_same_end(stopped, finished)


def test_storage_that_keeps_failing_is_not_damage(stopped, monkeypatch):
    monkeypatch.setattr(restore, "restore", failing(restore.restore, times=100))
    monkeypatch.setattr(storage, "READ_ATTEMPTS", 2)
    with pytest.raises(StorageError, match=r"checkpoint 8 in .* cannot be read: Input/output"):
        train(small_config(), stopped)
    assert {path.name for path in (stopped / "checkpoints").iterdir()} == {"4", "8"}


def test_a_disk_that_fails_once_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "write_bytes", failing(Path.write_bytes, times=1))
    write_file(tmp_path / "file.json", "{}")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["{}"]


class FailingFile(io.FileIO):
    """A file of which the first two writes fail with EIO."""

    failures = 2

    def write(self, content):
        self.failures -= 1
        if self.failures >= 0:
            raise OSError(errno.EIO, "Input/output error", self.name)
        return super().write(content)


def test_events_whose_write_fails_twice_are_written_once(tmp_path):
    written = recorder.Recorder(epath.Path(tmp_path))
    written.scalars(1, {"first": 1.0})
    (path,) = (tmp_path / "tensorboard").iterdir()
    written.events._py_recordio_writer._writer = io.BufferedWriter(FailingFile(path, "ab"))
    written.scalars(2, {"second": 2.0})
    assert [path.read_bytes().count(tag) for tag in (b"first", b"second")] == [1, 1]
    written.close()


@pytest.mark.parametrize("kind", [StorageError, UserError, PreemptedError])
def test_an_error_is_not_hidden_by_events_that_cannot_be_written(kind, tmp_path, monkeypatch):
    calls = []

    def fails():
        calls.append(None)
        raise OSError(errno.ENOSPC, "No space left on device")

    def record():
        with recorder.Recorder(epath.Path(tmp_path)) as written:
            written.scalars(1, {"loss": 1.0})
            monkeypatch.setattr(written.events, "close", fails)
            raise kind("first")

    with pytest.raises(kind, match="first"):
        record()
    assert len(calls) == (kind is not StorageError)


def test_a_disk_that_keeps_failing_is_an_error_of_the_storage(stopped, monkeypatch):
    monkeypatch.setattr(files, "WRITE_ATTEMPTS", 1)
    monkeypatch.setattr(Path, "write_bytes", failing(Path.write_bytes, times=100))
    with pytest.raises(StorageError, match=r"cannot write .*metrics\.csv: Input/output error"):
        train(small_config(), stopped)


def failing(function, times):
    """Returns a function that raises EIO so many times before it works."""
    left = [times]

    def wrapped(*arguments, **keys):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error", "/data/array")
        return function(*arguments, **keys)

    return wrapped


def test_a_save_that_fails_with_eio_is_an_error_of_the_storage(stopped, monkeypatch):
    monkeypatch.setattr(files, "WRITE_ATTEMPTS", 1)
    monkeypatch.setattr(ocp.CheckpointManager, "save", failing(None, times=100))
    with pytest.raises(StorageError, match=r"cannot save .*: Input/output error .*; the checkpoin"):
        train(small_config(), stopped)
    assert {path.name for path in (stopped / "checkpoints").iterdir()} == {"4", "8"}


@pytest.mark.parametrize("name", ["99", "12"])
def test_an_empty_checkpoint_folder_is_not_a_finished_run(name, finished, stopped, caplog):
    (stopped / "checkpoints" / name).mkdir()
    with caplog.at_level("INFO"):
        train(small_config(), stopped)
    assert f"checkpoint {name} is damaged" in caplog.text
    assert "resumed at step 8 of 12" in caplog.text
    assert_same_end(stopped, finished)


def test_a_stop_in_an_evaluation_is_made_up_for(finished, tmp_path, monkeypatch, caplog):
    """The evaluation at step 8 is interrupted; the resumed run makes it before step 9."""
    evaluate = between_steps.evaluate
    calls = []

    def stopped_in_the_second(eval_step, params, batches, mesh, stop_requested, *rest):
        def with_signal():
            calls.append(None)
            if len(calls) == 4:  # two batches an evaluation
                os.kill(os.getpid(), signal.SIGTERM)
                while not stop_requested():
                    time.sleep(0.01)
            return stop_requested()

        return evaluate(eval_step, params, batches, mesh, with_signal, *rest)

    monkeypatch.setattr(between_steps, "evaluate", stopped_in_the_second)
    with pytest.raises(PreemptedError, match="saved at step 8 of 12"):
        train(small_config(), tmp_path / "run")
    monkeypatch.undo()
    assert len((tmp_path / "run/metrics.csv").read_text().splitlines()) == 2
    train(small_config(), tmp_path / "run")
    assert_same_end(tmp_path / "run", finished)
    for path in (tmp_path / "run", finished):
        metrics = json.loads((path / "checkpoints/8/metrics/metrics").read_text())
        assert metrics["top1"] == load_weights(path / "checkpoints/8")[1].metrics["top1"]


@pytest.mark.slow
def test_the_record_is_written_again_when_the_workdir_was_removed(tmp_path, monkeypatch):
    push = LossMeter.push

    def remove_at_six(losses, step, loss):
        if step == 6:
            while not (tmp_path / "run/checkpoints/4").exists():
                time.sleep(0.01)
            shutil.rmtree(tmp_path / "run")
        push(losses, step, loss)

    monkeypatch.setattr(LossMeter, "push", remove_at_six)
    train(small_config(), tmp_path / "run")
    monkeypatch.undo()
    assert json.loads((tmp_path / "run/config.json").read_text())["batch_size"] == 16
    assert len((tmp_path / "run/metrics.csv").read_text().splitlines()) == 4
    train(small_config(), tmp_path / "run")


def test_a_workdir_that_cannot_be_written_is_named():
    with pytest.raises(UserError, match="cannot write /proc/run"):
        train(small_config(), epath.Path("/proc/run"))


def test_a_workdir_whose_name_is_not_utf8_is_refused_at_once(tmp_path):
    workdir = epath.Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    with pytest.raises(UserError, match=r"caf\udce9 is not UTF-8, so TensorStore"):
        train(small_config(), workdir)
    assert not workdir.exists()


def test_curves_are_drawn_of_a_workdir_with_any_name(tmp_path):
    row = dict.fromkeys(recorder.COLUMNS, 1.0)
    curves.draw_curves([row], tmp_path / "curves.png", "caf\udce9 a$b_{$")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_checkpoints_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    def refused(folder, options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(folder))

    monkeypatch.setattr(ocp, "CheckpointManager", refused)
    with pytest.raises(UserError, match=r"cannot write .*run/checkpoints: Read-only file system"):
        train(small_config(), tmp_path / "run")


HOLD = """
import pathlib, sys, time
from mambaout_jax.runtime import storage
from mambaout_jax.runtime.workdir import lock_workdir
lock = lock_workdir(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(100)
"""


def test_a_second_run_in_a_workdir_is_refused_until_the_first_is_gone(stopped):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(stopped)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"{stopped} is in use by process {first.pid} of "):
            train(small_config(), stopped)
        first.kill()
        first.wait()
    lock_workdir(epath.Path(stopped)).close()


def poison(monkeypatch, first, last):
    """Makes the images of the steps from `first` to `last` NaN."""
    augment = step_module.augment

    def poisoned(key, step, batch, recipe):
        inputs = augment(key, step, batch, recipe)
        bad = (step + 1 >= first) & (step + 1 <= last)
        return inputs | {"image": jnp.where(bad, jnp.nan, inputs["image"])}

    monkeypatch.setattr(step_module, "augment", poisoned)


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch, caplog):
    poison(monkeypatch, 6, 7)
    with caplog.at_level("INFO"):
        train(small_config(max_bad_steps=2), tmp_path / "run")
    assert "gradient of step 6 is not finite: step skipped" in caplog.text
    assert "gradient of step 7 is not finite: step skipped" in caplog.text
    losses = json.loads((tmp_path / "run/checkpoints/12/data/metadata").read_text())["losses"]
    assert (losses["bad"], losses["bad_in_a_row"]) == (2, 0)
    assert np.isfinite(np.genfromtxt(tmp_path / "run/metrics.csv", delimiter=",")[1:]).all()


@pytest.mark.slow
def test_too_many_steps_in_a_row_that_are_not_finite_stop_the_run(tmp_path, monkeypatch):
    poison(monkeypatch, 6, 12)
    with pytest.raises(UserError, match=r"not finite in 3 steps in a row, .* step 8 \(config"):
        train(small_config(max_bad_steps=2), tmp_path / "run")
    assert (tmp_path / "run/checkpoints/4").is_dir()


def test_a_run_that_never_took_a_step_leaves_no_workdir(tmp_path, monkeypatch):
    poison(monkeypatch, 1, 12)
    with pytest.raises(UserError, match=r"config\.max_bad_steps is 0"):
        train(small_config(max_bad_steps=0), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_without_a_checkpoint_keeps_what_it_has_recorded(tmp_path, monkeypatch):
    """Steps 1 and 2 were logged."""
    poison(monkeypatch, 3, 12)
    with pytest.raises(UserError, match=r"config\.max_bad_steps is 0"):
        train(small_config(max_bad_steps=0), tmp_path / "run")
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["batch_size"] == 16


class Root:
    """A network of one parameter, the square root of which is the first logit."""

    def apply(self, variables, images, train, rngs):
        return jnp.sqrt(variables["params"]["w"]) * jnp.array([[1.0, 0.0]] * len(images))


def test_a_gradient_that_is_not_finite_shows_in_the_loss_and_changes_no_parameter():
    optimizer = optax.sgd(0.1)
    recipe = Recipe(num_classes=2, mean=(0.0,) * 3, std=(1.0,) * 3)
    inputs = {"image": jnp.zeros((1, 4, 4, 3)), "target": jnp.array([[0.0, 1.0]])}
    for weight, finite in ((1.0, True), (0.0, False)):
        state = init_state({"w": jnp.array(weight)}, optimizer, ema=False)
        parts = {"model": Root(), "optimizer": optimizer, "recipe": recipe}
        after, metrics = update_step(state, inputs, jax.random.key(0), **parts)
        assert np.isfinite(metrics["loss"]) == finite
        assert after.step == 1
        assert (after.params["w"] != state.params["w"]) == finite


def test_the_parts_of_the_time_sum_to_one():
    clock = Goodput()
    with clock.of(COMPILE):
        step = jax.jit(lambda x: x @ x).lower(jnp.ones((500, 500))).compile()
    for _ in range(3):
        with clock.waiting_for_batch():
            time.sleep(0.05)
        clock.dispatched(time.perf_counter(), step(jnp.ones((500, 500))))
    shares = clock.shares()
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares[part] for part in (DATA, DEVICE, COMPILE)) > 0
    assert re.search(
        r"data wait \d.*device \d.*checkpoint .*evaluation .*compile \d.*host", clock.line()
    )
    clock.close()


@pytest.mark.parametrize(
    ("before", "waited", "start", "end", "starved", "busy"),
    [
        (10.0, (3.0, 4.0), 5.0, 12.0, 0.0, 2.0),  # dispatched ahead: the batch came in time
        (10.0, (7.0, 11.0), 12.0, 15.0, 1.0, 3.0),  # of the wait, only what followed the last step
        (10.0, (11.0, 14.0), 15.0, 16.0, 3.0, 1.0),  # the rest of the pause is the host's
    ],
)
def test_only_what_devices_wait_for_counts_as_waiting(before, waited, start, end, starved, busy):
    assert divide(before, waited, start, end) == (starved, busy)


def test_the_profiler_traces_the_steps_it_is_asked_for(tmp_path):
    double = jax.jit(lambda x: x * 2)
    profiler = Profiler(epath.Path(tmp_path), start=0, steps=2)
    traced = []
    for step in range(1, 8):
        with profiler.step(step):
            double(jnp.ones(3)).block_until_ready()
        traced.append(profiler.running)
    assert traced == [False, False, True, True, False, False, False]
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))


def test_the_compilation_cache_is_where_the_configuration_says(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    try:
        for key, environment, expected in (
            ("auto", "/elsewhere", "/elsewhere"),
            ("auto", "", str(tmp_path / "mambaout_jax" / "xla")),
            ("/here", "/elsewhere", "/here"),
            ("", "/elsewhere", None),
        ):
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
            monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", environment)
            use_compilation_cache(key)
            assert jax.config.jax_compilation_cache_dir == expected
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
