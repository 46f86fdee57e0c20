"""What befalls a run: signals, damage, full disks, a second command, losses that are not finite."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from mambaout_jax import config as configuration
from mambaout_jax.build import build_train_batches
from mambaout_jax.errors import PreemptedError, UserError
from mambaout_jax.runtime.compilation import use_compilation_cache
from mambaout_jax.runtime.goodput import COMPILE, WAIT, Goodput
from mambaout_jax.runtime.profiler import Profiler
from mambaout_jax.runtime.workdir import lock_workdir
from mambaout_jax.training import loop
from mambaout_jax.training.loop import train
from mambaout_jax.training.losses import Losses
from mambaout_jax.training.skipping import batch_number, skipping
from mambaout_jax.training.state import init_state
from mambaout_jax.training.step import Recipe, update_step
from mambaout_jax.weights.store import load_weights

ROOT = Path(__file__).parents[1]


def small_config(**keys):
    """The quickstart's data and a run of four steps in each of three epochs."""
    config = configuration.load_config(ROOT / "configs/quickstart.py")
    small = {
        "model.depthwise": "xla",
        "data.train_split": "train[:64]",
        "data.eval_split": "validation[:30]",
        "batch_size": 16,
        "eval.batch_size": 16,
        "schedule.duration": "3 epochs",
        "schedule.warmup": "1 epochs",
        "checkpoint.keep": 3,
        "log.every": "2 steps",
    }
    config.update_from_flattened_dict(small | keys)
    return config


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
    push = Losses.push

    def terminate_at_six(losses, step, loss):
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        push(losses, step, loss)

    monkeypatch.setattr(Losses, "push", terminate_at_six)
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
        (cut_off, lambda folder: largest(folder / "optimizer")),
        (flip_a_bit, lambda folder: largest(folder / "params")),
        (Path.unlink, lambda folder: folder / "data" / "metadata"),
        (cut_off, lambda folder: folder / "metrics" / "metrics"),
    ],
    ids=["cut off", "bit", "missing", "metrics"],
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
    path.write_text(path.read_text().replace('"num_classes": 10', '"num_classes": 11'))
    with pytest.raises(UserError, match=r"checkpoint 8 in .* is of another run: .* of 11 classes"):
        train(small_config(), stopped)


# A loop that Orbax has left hears of the failed writes too late.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_save_that_cannot_be_written_leaves_the_last_checkpoint(finished, stopped):
    """Files may grow to 100 kB: the arrays' are larger."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(
            UserError, match=r"cannot save .*: File too large; checkpoint 8 is good"
        ):
            train(small_config(), stopped)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    train(small_config(), stopped)
    assert_same_end(stopped, finished)


def test_a_workdir_that_cannot_be_written_is_named():
    with pytest.raises(UserError, match="cannot write /proc/run"):
        train(small_config(), epath.Path("/proc/run"))


HOLD = """
import pathlib, sys, time
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


def test_a_bad_batch_is_left_out_where_that_is_allowed(tmp_path, monkeypatch, caplog):
    """The sixth batch, number 5, makes loss and parameters NaN; checkpoint 4 is before it."""
    batches = build_train_batches(small_config())
    bad = [next(batches)["label"] for _ in range(6)][5]
    batches.close()
    compile_train_step = loop.compile_train_step

    def poisoned(*arguments):
        step = compile_train_step(*arguments)

        def run(state, batch, key):
            factor = jnp.where((batch["label"] == bad).all(), jnp.nan, 1.0)
            state, metrics = step(state, batch, key)
            params = jax.tree.map(lambda leaf: leaf * factor, state.params)
            return state.replace(params=params), metrics | {"loss": metrics["loss"] * factor}

        return run

    monkeypatch.setattr(loop, "compile_train_step", poisoned)
    with pytest.raises(
        UserError, match=r"loss of step 6 is nan; .* from checkpoint 4, the last good"
    ):
        train(small_config(), tmp_path / "run")
    with caplog.at_level("INFO"):
        train(small_config(skip_bad_batches=1), tmp_path / "run")
    assert "going back to checkpoint 4, the last good one, and leaving out batch 5" in caplog.text
    data = json.loads((tmp_path / "run/checkpoints/12/data/metadata").read_text())
    assert data["skipped"] == [5]
    assert data["batches"]["step"] == 13
    assert np.isfinite(np.genfromtxt(tmp_path / "run/metrics.csv", delimiter=",")[1:]).all()


class Root:
    """A network of one parameter, the square root of which is the first logit."""

    def apply(self, variables, images, train, rngs):
        return jnp.sqrt(variables["params"]["w"]) * jnp.array([[1.0, 0.0]] * len(images))


def test_a_gradient_that_is_not_finite_shows_in_the_loss():
    """Else the loss would tell of it a step later, and the batch after the bad one be left out."""
    optimizer = optax.sgd(0.1)
    recipe = Recipe(num_classes=2, mean=(0.0,) * 3, std=(1.0,) * 3)
    inputs = {"image": jnp.zeros((1, 4, 4, 3)), "target": jnp.array([[0.0, 1.0]])}
    for weight, finite in ((1.0, True), (0.0, False)):
        state = init_state({"w": jnp.array(weight)}, optimizer, ema=False)
        parts = {"model": Root(), "optimizer": optimizer, "recipe": recipe}
        _, metrics = update_step(state, inputs, jax.random.key(0), **parts)
        assert np.isfinite(metrics["loss"]) == finite


@pytest.mark.parametrize("skipped", [[], [0], [3], [3, 4], [0, 2, 9], [5, 3]])
def test_batch_numbers_agree_with_what_is_yielded(skipped):
    used = skipping(iter(range(20)), 0, skipped)
    for steps in range(10):
        assert batch_number(steps, skipped) == next(used)
    again = skipping(iter(range(batch_number(4, skipped), 20)), batch_number(4, skipped), skipped)
    assert next(again) == batch_number(4, skipped)


def test_the_parts_of_the_time_sum_to_one():
    clock = Goodput()
    with clock.of(WAIT):
        jax.jit(lambda x: x * 3 + 1)(jnp.arange(7)).block_until_ready()
    clock.close()
    assert sum(clock.shares().values()) == pytest.approx(1)
    assert clock.seconds[COMPILE] > 0
    assert re.search(r"step \d.*input wait .*checkpoint .*evaluation .*compile \d", clock.line())


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
            use_compilation_cache(small_config(compilation_cache=key))
            assert jax.config.jax_compilation_cache_dir == expected
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
