"""Real signals to real processes: main.py, as a shell, a cluster or a person stops it."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from compiler_flags import FAST_COMPILATION
from small_run import ROOT, SMALL

from mambaout_jax.runtime.preemption import StopRequest
from mambaout_jax.weights.store import load_weights

KEYS = [f"--config.{key}={value}" for key, value in SMALL.items()]


class Command:
    """main.py in a process group of its own, with its log."""

    def __init__(self, folder, *keys, program=("main.py",)):
        self.log = folder / f"{len(list(folder.glob('*.log')))}.log"
        command = [sys.executable, *program, "--config=configs/quickstart.py"]
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, *KEYS, *keys, f"--workdir={folder / 'run'}"],
                cwd=ROOT,
                env=os.environ | {"XLA_FLAGS": FAST_COMPILATION},
                stderr=file,
                start_new_session=True,
            )

    def wait_for(self, pattern):
        while not re.search(pattern, self.log.read_text()):
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.01)

    def end(self):
        """Returns the exit code and the log."""
        code = self.process.wait(timeout=120)
        return code, self.log.read_text()


def last_line(log):
    return log.strip().splitlines()[-1]


@pytest.fixture(autouse=True, scope="module")
def no_signal_is_ignored():
    """A shell's background jobs ignore SIGINT, and so would the processes that they start."""
    numbers = (signal.SIGINT, signal.SIGHUP)
    ignored = [number for number in numbers if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(scope="module")
def straight(no_signal_is_ignored, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    code, log = Command(folder).end()
    assert code == 0, log
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_group_saves_and_the_run_resumes_to_the_same_bits(
    number, straight, tmp_path
):
    run = Command(tmp_path, "--config.data.workers=1", "--config.log.every=1 steps")
    run.wait_for(r"step +2/12")
    os.killpg(run.process.pid, number)
    code, log = run.end()
    assert code == 75, log
    assert "Traceback" not in log
    assert re.search(r"saved at step \d+ of 12; the same command resumes it$", last_line(log))
    code, log = Command(tmp_path).end()
    assert code == 0, log
    ends = (load_weights(path / "checkpoints" / "12")[0] for path in (straight, tmp_path / "run"))
    expected, got = ends
    for name in expected:
        np.testing.assert_equal(got[name], expected[name])
    assert (straight / "metrics.csv").read_text() == (tmp_path / "run/metrics.csv").read_text()


def worker_of(process):
    """Returns the process id of a loader's worker, which a spawned child is."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
    return next(pid for pid, command in commands.items() if "spawn_main" in command)


@pytest.mark.slow
def test_a_loader_worker_that_is_killed_saves_the_run(straight, tmp_path):
    run = Command(tmp_path, "--config.data.workers=1", "--config.log.every=1 steps")
    run.wait_for(r"step +2/12")
    os.kill(worker_of(run.process), signal.SIGKILL)
    code, log = run.end()
    assert code in (0, 75), log
    assert "Traceback" not in log
    if code == 75:  # else the batches that were left had been made before
        assert re.search(r"loader worker 0 \(process \d+\) was killed by SIGKILL", log)
        assert re.search(r"saved at step \d+ of 12; the same command resumes it$", last_line(log))
    code, log = Command(tmp_path).end()
    assert code == 0, log
    assert (straight / "metrics.csv").read_text() == (tmp_path / "run/metrics.csv").read_text()


@pytest.mark.parametrize(
    "program",
    [
        ("main.py",),
        pytest.param(("-m", "mambaout_jax", "train"), marks=pytest.mark.slow),
        # As the program mambaout-jax does.
        pytest.param(
            ("-c", "from mambaout_jax.__main__ import main; main()", "train"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["main.py", "module", "program"],
)
def test_a_signal_while_python_imports_ends_the_run_with_one_line(program, tmp_path):
    run = Command(tmp_path, program=program)
    while "jaxlib" not in Path(f"/proc/{run.process.pid}/maps").read_text():
        time.sleep(0.001)
    os.killpg(run.process.pid, signal.SIGINT)
    code, log = run.end()
    assert code == 75, log
    assert last_line(log) == "stopped by SIGINT: the same command starts or resumes the run"
    assert "Traceback" not in log


def test_nothing_can_be_written_at_the_start(tmp_path):
    """No file may have a byte, as on a disk without space."""
    command = [sys.executable, "main.py", "--config=configs/quickstart.py", *KEYS]
    done = subprocess.run(
        ["prlimit", "--fsize=0", *command, f"--workdir={tmp_path / 'run'}"],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": FAST_COMPILATION},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert last_line(done.stderr) == f"error: cannot write {tmp_path}/run/lock: File too large"
    assert "Traceback" not in done.stderr


NO_ROOM = """
import resource, runpy
from mambaout_jax.training import loop
save = loop.save
def save_without_room(*args, **options):
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    save(*args, **options)
loop.save = save_without_room
runpy.run_path("main.py", run_name="__main__")
"""


@pytest.mark.slow
def test_the_reason_is_the_last_line_after_a_save_that_failed(tmp_path):
    """At the first save files may grow to 50 kB, less than arrays. Threads of Orbax fail, too."""
    keys = ("--config.data.threads=1", "--config.eval.every=12 steps")
    run = Command(tmp_path, *keys, program=("-c", NO_ROOM))
    code, log = run.end()
    assert code == 1, log
    assert re.match(
        r"error: cannot save to .*: File too large; there is no checkpoint yet$", last_line(log)
    )
    assert "Traceback" not in log
    assert "Event loop" not in log


def test_ctrl_c_while_the_run_starts_ends_it_at_once(tmp_path):
    run = Command(tmp_path)
    while not (tmp_path / "run" / "config.json").exists():
        assert run.process.poll() is None, run.log.read_text()
        time.sleep(0.01)
    os.killpg(run.process.pid, signal.SIGINT)
    code, log = run.end()
    assert code == 75, log
    assert last_line(log) == "stopped by SIGINT: the same command starts or resumes the run"
    assert "Traceback" not in log


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(tmp_path):
    """The first one is noticed while the process cannot act on it: it is stopped meanwhile."""
    run = Command(tmp_path, "--config.log.every=1 steps")
    run.wait_for(r"step +1/12")
    os.kill(run.process.pid, signal.SIGINT)
    run.wait_for("received SIGINT")
    os.kill(run.process.pid, signal.SIGINT)
    code, log = run.end()
    assert code in (75, 130), log
    assert "Traceback" not in log


def test_the_other_processes_are_told_before_a_request_returns():
    """By no signal, which another thread may handle, and only later."""
    told = []
    function = ctypes.CFUNCTYPE(None, ctypes.c_int)(told.append)
    with StopRequest() as stop:
        stop._jax_handler = ctypes.cast(function, ctypes.c_void_p).value
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            stop.request("the notice of a cluster")
            assert told == [signal.SIGTERM]
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
