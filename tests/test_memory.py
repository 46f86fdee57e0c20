"""Runs and commands that do not fit into the memory of the devices, by XLA's own errors."""

import re
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_weights
from etils import epath
from small_run import ROOT, SMALL, small_config, train

from mambaout_jax.__main__ import main
from mambaout_jax.build import build_run
from mambaout_jax.errors import UserError
from mambaout_jax.inference import features, predictor
from mambaout_jax.runtime.memory import DeviceMemoryError, is_exhausted, memory_for
from mambaout_jax.training import between_steps, restore, teacher
from mambaout_jax.training.metrics import LossMeter
from mambaout_jax.training.out_of_memory import evaluation_message, training_message
from mambaout_jax.training.recorder import import_in_background
from mambaout_jax.weights.store import load_weights

# main.py, with a step that needs more memory than there is.
PROGRAM = """
import runpy, sys
sys.path[:0] = [sys.argv.pop(1), sys.argv.pop(1)]
import test_memory
from mambaout_jax.training import step
step.augment = test_memory.exhausting(step.augment)
sys.argv[0] = "main.py"
runpy.run_path("main.py", run_name="__main__")
"""

# main.py, on a host that has too little memory for the images.
HOST_PROGRAM = PROGRAM.replace(
    "step.augment = test_memory.exhausting(step.augment)",
    "from mambaout_jax import build; build.build_train_batches = test_memory.exhaust_host",
)


def exhaust(number):
    """Returns a number that needs an array of 2**50 bytes, more than a process can address.

    The allocation fails on every machine before anything is written.
    """
    cube = jax.lax.broadcasted_iota(jnp.float32, (2**16,) * 3, 2)
    return jax.lax.sort(jnp.sin(number * cube), dimension=2)[0, 0, 0]


def exhausting(augment):
    """Returns `augment` as a part of a step that does not fit into memory."""

    def larger(key, step, batch, recipe):
        inputs = augment(key, step, batch, recipe)
        return inputs | {"image": inputs["image"] + exhaust(inputs["image"].mean())}

    return larger


def exhaust_host(*args, **kwargs):
    """Raises numpy's MemoryError."""
    return np.empty(2**59)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 12 steps with checkpoints 4, 8 and 12."""
    workdir = epath.Path(tmp_path_factory.mktemp("run")) / "straight"
    train(small_config(), workdir)
    return workdir


def assert_resumes_to_the_same_end(workdir, finished):
    train(small_config(), workdir)
    expected, got = (load_weights(path / "checkpoints" / "12")[0] for path in (finished, workdir))
    jax.tree.map(np.testing.assert_array_equal, expected, got)
    assert (workdir / "metrics.csv").read_text() == (finished / "metrics.csv").read_text()


def checkpoints(workdir):
    return {path.name for path in (workdir / "checkpoints").iterdir()}


def test_a_run_that_does_not_fit_ends_with_one_sentence(tmp_path):
    keys = [f"--config.{key}={value}" for key, value in SMALL.items()]
    flags = ["--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}", *keys]
    program = [sys.executable, "-c", PROGRAM, str(ROOT), str(ROOT / "tests")]
    done = subprocess.run([*program, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if " test_mambaout: 193,130" not in line]
    assert len(errors) == 1, done.stderr
    assert errors[0].startswith(
        "error: not enough memory on 8 devices to train test_mambaout with config.batch_size=16, "
        "2 images per device ("
    )
    (size,) = re.findall(r"Out of memory allocating (\d+) bytes\): try config.acc", errors[0])
    assert int(size) > 2**47
    assert not (tmp_path / "run").exists(), "another batch size could not start there"


def test_a_host_without_memory_ends_with_one_sentence(tmp_path, capsys, monkeypatch):
    flags = ["--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}"]
    program = [sys.executable, "-c", HOST_PROGRAM, str(ROOT), str(ROOT / "tests")]
    done = subprocess.run([*program, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    reason = "not enough memory on this host (Unable to allocate 4.00 EiB for an array with shape "
    assert done.stderr.startswith(f"error: {reason}"), done.stderr
    assert "try fewer config.data.workers" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
    small_weights.image(0).save(tmp_path / "image.png")
    monkeypatch.setattr(predictor.Predictor, "load", exhaust_host)
    assert main(["predict", str(tmp_path / "image.png"), "--weights=test_mambaout.digits"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {reason}")
    assert printed.count("\n") == 1


def test_a_host_whose_memory_runs_out_in_a_run_resumes(finished, tmp_path, monkeypatch):
    push = LossMeter.push

    def exhausted_at_nine(losses, step, loss):
        push(losses, step, exhaust_host() if step == 9 else loss)

    monkeypatch.setattr(LossMeter, "push", exhausted_at_nine)
    with pytest.raises(UserError, match=r"not enough memory on this host .* may be resumed"):
        train(small_config(), tmp_path / "run")
    monkeypatch.undo()
    assert checkpoints(tmp_path / "run") == {"4", "8"}
    assert_resumes_to_the_same_end(tmp_path / "run", finished)


def test_an_import_in_the_background_that_fails_prints_nothing(monkeypatch):
    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # importing it is an ImportError
    import_in_background()
    for thread in threading.enumerate():
        if thread.name == "imports":
            thread.join()
    assert not failed


def test_a_teacher_that_does_not_fit(tmp_path, monkeypatch):
    """In the memory of the host, of a device, and of a device that trains as well."""
    config = small_config(**{"distillation.teacher": "test_mambaout.digits"})
    message = r"the teacher test_mambaout\.digits does not fit into memory \(.*\): expected a sm"
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "read_weights", exhaust_host)
        with pytest.raises(UserError, match=message):
            build_run(config)

    run = build_run(config)
    assert training_message(run, "why").endswith(
        "a smaller config.batch_size or a smaller config.distillation.teacher in a new --workdir"
    )

    device_put = jax.device_put

    def exhausted(tree, *rest):
        return jax.jit(exhaust)(1.5) if isinstance(tree, dict) else device_put(tree, *rest)

    monkeypatch.setattr(jax, "device_put", exhausted)
    with pytest.raises(DeviceMemoryError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_is_being_written_becomes_whole(finished, tmp_path, monkeypatch):
    """The result of step 9 does not fit, while the checkpoint of step 8 is being written."""
    push = LossMeter.push

    def exhausted_at_nine(losses, step, loss):
        push(losses, step, jax.jit(exhaust)(1.5) if step == 9 else loss)

    monkeypatch.setattr(LossMeter, "push", exhausted_at_nine)
    with pytest.raises(DeviceMemoryError, match=r"to train .*\.batch_size=16, .*_steps=2"):
        train(small_config(), tmp_path / "run")
    monkeypatch.undo()
    assert checkpoints(tmp_path / "run") == {"4", "8"}
    assert_resumes_to_the_same_end(tmp_path / "run", finished)


def test_an_evaluation_that_does_not_fit_loses_no_step(finished, tmp_path, monkeypatch, caplog):
    """That of step 8: the step is saved, and the resumed run, if that fails too, keeps it."""
    evaluate = between_steps.evaluate
    evaluations = []

    def too_large(eval_step, params, batches, mesh, *rest):
        def larger(params, batch):
            sums = eval_step(params, batch)
            return sums | {"loss": sums["loss"] + jax.jit(exhaust)(sums["loss"])}

        evaluations.append(None)
        step = eval_step if len(evaluations) == 1 else larger
        return evaluate(step, params, batches, mesh, *rest)

    monkeypatch.setattr(between_steps, "evaluate", too_large)
    message = (
        r"to evaluate test_mambaout with config\.eval\.batch_size=16, 2 images per device, while "
        r"it trains \(.*\): resume the run with a smaller config\.eval\.batch_size"
    )
    for _ in range(2):
        with pytest.raises(DeviceMemoryError, match=message):
            train(small_config(), tmp_path / "run")
        assert checkpoints(tmp_path / "run") == {"4", "8"}
    monkeypatch.undo()
    with caplog.at_level("INFO"):
        assert_resumes_to_the_same_end(tmp_path / "run", finished)
    assert "resumed at step 8 of 12" in caplog.text


def test_a_checkpoint_that_does_not_fit_is_not_damaged(finished, monkeypatch):
    monkeypatch.setattr(restore, "fingerprints", lambda **_: float(jax.jit(exhaust)(1.5)))
    with pytest.raises(DeviceMemoryError, match="not enough memory on 8 devices"):
        train(small_config(), finished)
    assert checkpoints(finished) == {"4", "8", "12"}


def test_what_changes_least_is_proposed_first():
    run = build_run(small_config())
    assert training_message(run, "why") == (
        "not enough memory on 8 devices to train test_mambaout with config.batch_size=16, 2 images "
        "per device (why): try config.accumulate_steps=2 (or more), config.model.remat=True, "
        "config.mesh.fsdp=8 or the same command on more devices, with which a run may be resumed, "
        "or else config.model.dtype=bfloat16 or a smaller config.batch_size in a new --workdir"
    )
    changed = {"accumulate_steps": 2, "model.remat": True, "mesh.fsdp": 8, "eval.batch_size": 8}
    run = build_run(small_config(**changed, **{"model.dtype": "bfloat16"}))
    assert training_message(run, "why") == (
        "not enough memory on 8 devices to train test_mambaout with config.batch_size=16, 1 image "
        "per device in each of 2 parts (why): try the same command on more devices, with which a "
        "run may be resumed, or else a smaller config.batch_size in a new --workdir"
    )
    assert evaluation_message(run, "why").endswith("(why): resume the run with more devices")


def test_predict_and_probe_that_do_not_fit(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mambaout_jax.runtime.processes.join_processes", lambda: None)
    normalize = predictor.normalize

    def larger(images, mean, std):
        pixels = normalize(images, mean, std)
        return pixels + exhaust(pixels.mean())

    for module in (predictor, features):
        monkeypatch.setattr(module, "normalize", larger)
    weights = small_weights.write(tmp_path / "w", num_classes=3)
    small_weights.image(0).save(tmp_path / "image.png")
    for arguments, message in (
        (["predict", str(tmp_path / "image.png")], "not enough memory for 64 images a step ("),
        (
            ["probe", "--data=digits", "--train-split=train[:40]", "--split=validation[:40]"],
            "not enough memory for the features and 256 images a step (",
        ),
    ):
        assert main([*arguments, f"--weights={weights}"]) == 1
        printed = capsys.readouterr().err
        assert printed.startswith(f"error: {message}")
        assert "try a smaller --batch-size" in printed
        assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("message", "exhausted"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory allocating 31422819712 bytes.", True),
        ("INTERNAL: Error dispatching computation: Out of memory allocating 8 bytes.", True),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 42949672960 bytes.", True),
        ("RESOURCE_EXHAUSTED: Failed to allocate request for 2.0GiB (2147483648B)", True),
        ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the", True),
        ("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory", True),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.", False),
        ("RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 270336", False),
        ("RESOURCE_EXHAUSTED: No space left on device", False),
        ("INTERNAL: something else", False),
    ],
)
def test_only_memory_of_devices_is_reported(message, exhausted):
    error = jax.errors.JaxRuntimeError(message)
    assert is_exhausted(error) == exhausted
    assert not is_exhausted(ValueError(message))
    raised = DeviceMemoryError if exhausted else jax.errors.JaxRuntimeError
    with pytest.raises(raised), memory_for(str):
        raise error
