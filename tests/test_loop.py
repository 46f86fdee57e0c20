"""Whole runs on real images: train, resume, evaluate, and every mistake a user can make."""

import csv
import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import small_run
from compiler_flags import FAST_COMPILATION
from etils import epath
from imagenet_fixture import jpeg, train_tiny, write_imagenet
from jax._src.array import ArrayImpl

from mambaout_jax import config as configuration
from mambaout_jax.errors import UserError
from mambaout_jax.evaluate_run import evaluate_workdir
from mambaout_jax.training import loop
from mambaout_jax.training.metrics import LossMeter
from mambaout_jax.training.recorder import Recorder, read_rows, wandb_id
from mambaout_jax.weights.store import load_weights

SMALL = {
    "model.drop_path_rate": 0.1,
    "schedule.duration": "4 epochs",
    "checkpoint.keep": 2,
    "optimizer.ema_decay": 0.9,
}


def small_config(**keys):
    """Four epochs with averaged parameters; eight devices share each batch of 16."""
    return small_run.small_config(**(SMALL | keys))


def run_main(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "main.py", *arguments],
        cwd=small_run.ROOT,
        env=os.environ | {"XLA_FLAGS": FAST_COMPILATION} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 16 steps, four epochs, with averaged parameters."""
    workdir = epath.Path(tmp_path_factory.mktemp("run")) / "straight"
    small_run.train(small_config(), workdir)
    return workdir


def test_a_run_leaves_all_that_a_person_looks_at(finished):
    with (finished / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [4, 8, 12, 16]
    assert [float(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((finished / "tensorboard").glob("events.out.tfevents.*"))
    assert json.loads((finished / "config.json").read_text())["data.name"] == "digits"


def test_the_newest_two_and_the_best_checkpoint_stay(finished):
    with (finished / "metrics.csv").open() as file:
        top1 = {int(row["step"]): float(row["top1"]) for row in csv.DictReader(file)}
    steps = {int(path.name) for path in (finished / "checkpoints").iterdir()}
    best = {step for step, value in top1.items() if value == max(top1.values())}
    assert {12, 16} <= steps
    assert best & steps
    assert len(steps) <= 3


def test_a_finished_run_says_so_and_changes_nothing(finished, caplog):
    def is_file(path):
        return path.is_file() and path.name != "lock"

    before = {path: path.stat().st_mtime_ns for path in Path(finished).rglob("*") if is_file(path)}
    with caplog.at_level("INFO"):
        small_run.train(small_config(), finished)
    assert "finished already: 16 steps, top-1" in caplog.text
    after = {path: path.stat().st_mtime_ns for path in Path(finished).rglob("*") if is_file(path)}
    assert before == after


@pytest.mark.parametrize(
    "damage", [lambda text: text[:-9], lambda text: b"", lambda text: b"\x00\xff", None]
)
def test_metrics_and_curves_that_are_not_whole_are_written_again(
    damage, finished, tmp_path, caplog
):
    """From the last checkpoint, by the command of a finished run; cut, empty, binary or gone."""
    shutil.copytree(finished, tmp_path / "straight")
    path = tmp_path / "straight" / "metrics.csv"
    expected = path.read_bytes()
    if damage:
        path.write_bytes(damage(expected))
        with pytest.raises(UserError, match=rf"{path} is damaged: restore it from a copy, or move"):
            read_rows(epath.Path(path))
    else:
        path.unlink()
        (path.parent / "curves.png").unlink()
    small_run.train(small_config(), path.parent)
    assert f"{path} or curves.png is not whole: writing both again" in caplog.text
    assert path.read_bytes() == expected
    assert (path.parent / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_read_or_compiled_between_two_log_lines(tmp_path, monkeypatch):
    """Log lines at steps 5 and 10, the only evaluation and save at step 10."""
    reads, compilations, counts = [], [], {}
    value, push = ArrayImpl._value, LossMeter.push
    main = threading.main_thread()

    def read(array):
        reads.append(array.shape)
        return value.fget(array)

    def count(name, seconds, **_):
        if name.endswith("backend_compile_duration") and threading.current_thread() is main:
            compilations.append(seconds)

    def push_and_count(losses, step, loss):
        counts[step] = len(reads), len(compilations)
        push(losses, step, loss)

    monkeypatch.setattr(ArrayImpl, "_value", property(read))
    monkeypatch.setattr(LossMeter, "push", push_and_count)
    jax.monitoring.register_event_duration_secs_listener(count)
    keys = dict.fromkeys(("schedule.duration", "eval.every", "checkpoint.every"), "10 steps")
    config = small_config(**keys, **{"schedule.warmup": "1 steps", "log.every": "5 steps"})
    with jax.transfer_guard_device_to_host("disallow"):  # a CPU's reads are not guarded
        small_run.train(config, tmp_path / "run")
    assert compilations
    assert counts[2] == counts[3] == counts[4] == counts[5]
    assert counts[7] == counts[8] == counts[9] == counts[10]
    assert counts[6][0] > counts[5][0], "the log line reads the losses"


def test_a_batch_is_sent_before_the_step_ahead_of_it(tmp_path, monkeypatch):
    events = []
    send, compile_programs = loop.global_batch, small_run.compile_once

    def sending(*args):
        events.append("send")
        return send(*args)

    def compiling(*args):
        programs = compile_programs(*args)

        def step(*step_args):
            events.append("step")
            return programs.train_step(*step_args)

        return dataclasses.replace(programs, train_step=step)

    monkeypatch.setattr(loop, "global_batch", sending)
    monkeypatch.setattr(small_run, "compile_once", compiling)
    keys = {"schedule.duration": "4 steps", "schedule.warmup": "1 steps"}
    small_run.train(small_config(**keys), tmp_path / "run")
    assert events == ["send", "send", "step", "send", "step", "send", "step", "step"]


def test_the_time_of_a_step_begins_when_the_profiler_has_started(tmp_path, monkeypatch):
    events = []

    def counter():
        events.append("clock")
        return time.perf_counter()

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=counter))
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: events.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    keys = {"schedule.duration": "4 steps", "schedule.warmup": "1 steps", "profile": "1 steps"}
    small_run.train(small_config(**keys), tmp_path / "run")
    assert events == ["clock", "clock", "start", "clock", "stop", "clock"]


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_bits(finished, tmp_path, monkeypatch):
    """Stopped in the middle of an epoch after an evaluation, with a later row already written."""
    workdir = tmp_path / "stopped"
    config = small_config(**{"checkpoint.every": "6 steps"})
    push = LossMeter.push

    def crash_at_ten(losses, step, loss):
        if step == 10:
            raise RuntimeError("crashed")
        push(losses, step, loss)

    monkeypatch.setattr(LossMeter, "push", crash_at_ten)
    with pytest.raises(RuntimeError, match="crashed"):
        small_run.train(config, workdir)
    monkeypatch.undo()
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"6"}
    small_run.train(config, workdir)
    expected, got = (
        load_weights(finished / "checkpoints/16"),
        load_weights(workdir / "checkpoints/16"),
    )
    jax.tree.map(np.testing.assert_array_equal, expected[0], got[0])
    assert (workdir / "metrics.csv").read_text() == (finished / "metrics.csv").read_text()


@pytest.mark.slow
def test_two_processes_of_one_device_equal_one_process_of_eight(finished, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for index in range(2):
        cluster = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
        }
        config = small_config()
        flat = {key: configuration.flatten(config)[key] for key in (*small_run.SMALL, *SMALL)}
        keys = [f"--config.{key}={value}" for key, value in flat.items()]
        command = ["main.py", "--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}"]
        with (tmp_path / f"{index}.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, *command, *keys],
                cwd=small_run.ROOT,
                env=os.environ | {"XLA_FLAGS": FAST_COMPILATION} | cluster,
                stderr=log,
            )
        started.append(process)
    codes = [process.wait(timeout=300) for process in started]
    first, second = ((tmp_path / f"{index}.log").read_text() for index in range(2))
    assert codes == [0, 0], (first + second)[-3000:]
    assert "epoch 4/4" in first
    assert "epoch 4/4" not in second
    tables = []
    for workdir in (finished, tmp_path / "run"):
        rows = csv.DictReader((workdir / "metrics.csv").read_text().splitlines())
        tables.append([[float(value) for value in row.values()] for row in rows])
    np.testing.assert_allclose(*tables, rtol=1e-5)


def test_evaluation_of_a_checkpoint_equals_the_runs_own(finished, tmp_path):
    """Thirty images, which no batch divides, in two batch sizes."""
    with (finished / "metrics.csv").open() as file:
        best = max(csv.DictReader(file), key=lambda row: (float(row["top1"]), int(row["step"])))
    for batch_size in (16, 40):
        config = small_config(**{"eval.batch_size": batch_size, "init_from": str(finished)})
        report = evaluate_workdir(config, tmp_path / str(batch_size))
        assert report["examples"] == 30
        np.testing.assert_allclose(report["top1"], float(best["top1"]), rtol=1e-6)
        np.testing.assert_allclose(report["loss"], float(best["eval_loss"]), rtol=1e-5)
        assert json.loads((tmp_path / str(batch_size) / "eval.json").read_text()) == report


def test_evaluation_of_a_workdir_uses_the_runs_own_config(finished, tmp_path):
    """The command line names the quickstart's whole split; the run's has 30 images."""
    shutil.copytree(finished, tmp_path / "run")
    config = configuration.load_config(small_run.ROOT / "configs/quickstart.py")
    config.eval.batch_size = 24
    config.init_from = "weights-to-start-from"  # of the config's file: the run has its own now
    report = evaluate_workdir(config, tmp_path / "run", {"eval.batch_size"})
    assert report["examples"] == 30
    assert report["data"] == "digits/1.0.0/validation[:30]"
    assert config.eval.batch_size == 24


def test_evaluation_refuses_weights_of_another_model(finished, tmp_path):
    config = small_config(**{"init_from": str(finished), "model.name": "mambaout_femto"})
    with pytest.raises(UserError, match="'mambaout_femto', but the weights have"):
        evaluate_workdir(config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_fine_tuning_starts_from_the_weights_and_swaps_the_last_layer(finished, tmp_path, caplog):
    """Two classes of a folder of images, at another resolution, from the ten digits' weights."""
    for split, count in (("train", 8), ("val", 3)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number}.jpg").write_bytes(jpeg(100 * label + number))
    keys = {
        "init_from": str(finished),
        "data.source": "folder",
        "data.dir": str(tmp_path / "pets"),
        "data.train_split": "train",
        "data.eval_split": "val",
        "data.num_classes": 2,
        "data.image_size": 40,
        "optimizer.ema_decay": 0.0,
        "schedule.duration": "1 steps",
        "schedule.warmup": "",
        "schedule.learning_rate": 0.0,
        "schedule.min_learning_rate": 0.0,
    }
    with caplog.at_level("INFO"):
        small_run.train(small_config(**keys), tmp_path / "run")
    assert "the last layer is new, for 2 classes" in caplog.text
    (params, info), (start, _) = load_weights(tmp_path / "run"), load_weights(finished)
    assert info.class_names == ("cat", "dog")
    assert params["head"].pop("fc2")["kernel"].shape == (256, 2)
    del start["head"]["fc2"]
    jax.tree.map(np.testing.assert_array_equal, params, start)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model.name": "mambaout_tinny"}, "did you mean 'mambaout_tiny'"),
        ({"data.name": "imagenet2012"}, "tfds build imagenet2012 --file_format=array_record"),
        ({"data.num_classes": 11}, "has 10 classes"),
        ({"batch_size": 12}, "does not divide over 8 devices"),
        ({"batch_size": 72}, "64"),
        ({"data.source": "folder", "data.dir": "/nonexistent"}, "/nonexistent"),
        ({"model.depthwise": "fast"}, "implementation 'fast'"),
        ({"augment.policy": "rand-m9-q"}, "rand-m9-q"),
    ],
)
def test_mistakes_are_named_before_the_workdir_exists(keys, message, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "no_data"))
    with pytest.raises(UserError, match=re.escape(message)):
        small_run.train(small_config(**keys), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_files_that_are_no_images_are_named_and_leave_no_workdir(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "pets" / split / name).mkdir(parents=True)
            for number in range(8):
                (tmp_path / "pets" / split / name / f"{number}.jpg").write_bytes(jpeg(number))
    for number in (3, 5):
        (tmp_path / f"pets/train/dog/{number}.jpg").write_text("this is no image")
    keys = {
        "data.source": "folder",
        "data.dir": str(tmp_path / "pets"),
        "data.train_split": "train",
        "data.eval_split": "val",
        "data.num_classes": 2,
    }
    with pytest.raises(UserError, match="2 of 16 training images could not be"):
        small_run.train(small_config(**keys), epath.Path(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_tiny_trains_on_a_small_imagenet(tmp_path):
    """The paper's configuration, as a user starts it, on TFDS's imagenet2012 at few pixels."""
    data = write_imagenet(tmp_path / "data", train=32, validation=6)
    log = train_tiny(data, tmp_path / "run")
    assert "mambaout_tiny: 26,545,096 parameters" in log
    assert re.search(r"step 2/2: loss [\d.]+, lr [\d.e-]+, [\d,]+ images/s.* left", log)
    assert "epoch 1/1: train loss" in log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/tiny.py", "--config.batchsize=3", "--workdir=x"], "batch_size"),
        (["--config=configs/tinny.py", "--workdir=x"], "configs/tiny.py"),
        (["--config=configs/quickstart.py"], "workdir"),
        (["--config=configs/quickstart.py", "--workdir=x", "--config.batch_size=a"], "batch_size"),
        (["--config=configs/quickstart.py", "--workdir=x", "eval"], "unexpected argument 'eval'"),
    ],
)
def test_main_answers_a_mistake_in_a_sentence(arguments, message):
    done = run_main(*arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (small_run.ROOT / "x").exists()


def test_wandb_that_is_not_installed_is_said_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"mambaout_jax\[wandb\]"):
        Recorder(epath.Path(tmp_path), wandb_project="digits")


def test_each_workdir_keeps_an_id_of_weights_and_biases_of_its_own(tmp_path):
    first, second = (epath.Path(tmp_path / name) for name in ("first", "second"))
    drawn = wandb_id(first)
    assert wandb_id(first) == drawn != wandb_id(second)
    first.rename(tmp_path / "moved")
    assert wandb_id(epath.Path(tmp_path / "moved")) == drawn != wandb_id(first)
    for damage in (b"", b"0123", b"\x00\xff"):
        (second / "wandb_id").write_bytes(damage)
        assert wandb_id(second) == wandb_id(second) != damage.decode(errors="ignore")
