"""Several real processes, of which one is asked to end, dies, or is not what the others are."""

import csv
import functools
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from compiler_flags import FAST_COMPILATION
from small_run import train

from mambaout_jax import config as configuration
from mambaout_jax.weights.store import load_weights

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
KEYS = (
    "--config=configs/quickstart.py",
    "--config.model.depthwise=xla",
    "--config.data.train_split=train[:64]",
    "--config.data.eval_split=validation[:30]",
    "--config.batch_size=16",
    "--config.eval.batch_size=16",
    "--config.schedule.duration=3 epochs",
    "--config.schedule.warmup=1 epochs",
    "--config.log.every=1 steps",
)
# main.py with less patience than JOIN_SECONDS.
IMPATIENT = """
import runpy, sys
from mambaout_jax.runtime import processes
processes.JOIN_SECONDS = 2
sys.argv = ["main.py", *sys.argv[1:]]
runpy.run_path("main.py", run_name="__main__")
"""


class Launch:
    """The command in processes of one device each, of which `indices` are started."""

    def __init__(self, folder, count, indices=None, program=("main.py",), keys=None):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]
        self.logs, self.processes = [], []
        for index in range(count) if indices is None else indices:
            cluster = {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{self.port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            }
            environment = (
                os.environ | {"XLA_FLAGS": FAST_COMPILATION} | (cluster if count > 1 else {})
            )
            own = (keys or {}).get(index, ())
            command = [sys.executable, *program, *KEYS, f"--workdir={folder / 'run'}", *own]
            log = folder / f"{len(list(folder.glob('*.log')))}.log"
            with log.open("w") as file:
                started = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=file)
            self.logs.append(log)
            self.processes.append(started)

    def wait_for(self, pattern):
        """Waits until the first process has logged what matches."""
        while not re.search(pattern, self.logs[0].read_text(), re.MULTILINE):
            assert self.processes[0].poll() is None, self.logs[0].read_text()
            time.sleep(0.01)

    def end(self):
        """Returns the exit code and the log of each process."""
        codes = [process.wait(timeout=300) for process in self.processes]
        return codes, [log.read_text() for log in self.logs]


def table(workdir):
    with (workdir / "metrics.csv").open() as file:
        return [[float(value) for value in row.values()] for row in csv.DictReader(file)]


def test_one_of_two_is_asked_to_end_and_another_world_goes_on(tmp_path, caplog):
    """Saved by two processes, resumed by one of eight devices, equal to a run of those alone."""
    # Longer than the others: the processes must agree on a step at which both stop.
    keys = ("--config.schedule.duration=20 epochs", "--config.eval.every=20 epochs")
    pair = Launch(tmp_path, 2, keys=dict.fromkeys((0, 1), keys))
    pair.wait_for(r"step +2/")
    pair.processes[1].send_signal(signal.SIGTERM)
    codes, logs = pair.end()
    assert codes == [75, 75], logs
    (step,) = {*re.findall(r"saved at step (\d+) of 80", "".join(logs))}
    config = configuration.load_config(ROOT / "configs/quickstart.py")
    for key in (*KEYS[1:], *keys):
        name, value = key.removeprefix("--config.").split("=")
        config.update_from_flattened_dict({name: int(value) if value.isdigit() else value})
    train(config, tmp_path / "straight")
    with caplog.at_level("INFO"):
        train(config, tmp_path / "run")
    assert f"resumed at step {step} of 80" in caplog.text
    assert "saved by 2 devices in 2 processes; now there are 8 devices in 1 proc" in caplog.text
    np.testing.assert_allclose(table(tmp_path / "run"), table(tmp_path / "straight"), rtol=1e-5)


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    """A run of two processes: its folder, and the logged loss of each step."""
    folder = tmp_path_factory.mktemp("two")
    codes, logs = Launch(
        folder, 2, keys=dict.fromkeys((0, 1), ("--config.checkpoint.keep=3",))
    ).end()
    assert codes == [0, 0], logs
    assert ("Numba" in logs[0]) == FAST
    return folder, losses(logs[0])


def losses(log):
    return {
        int(step): float(loss) for step, loss in re.findall(r"step +(\d+)/.*loss ([\d.]+)", log)
    }


FAST = importlib.util.find_spec("numba") is not None
FASTER = {
    "accumulate_steps": "4",
    "model.remat": "True",
    "data.backend": "pillow",
    "model.depthwise": "shifted",
}


@pytest.mark.parametrize("names", [[name] for name in FASTER] + [list(FASTER)], ids=".".join)
def test_a_smaller_slice_may_go_on_with_other_keys_of_speed(on_two, tmp_path, names):
    """One process resumes at step 4; the losses and parameters are those of two processes."""
    folder, expected = on_two
    shutil.copytree(folder / "run", tmp_path / "run")
    for step in ("8", "12"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / step)
    keys = [f"--config.{name}={FASTER[name]}" for name in names]
    codes, (log,) = Launch(tmp_path, 1, keys={0: keys}).end()
    assert codes == [0], log
    assert "resumed at step 4 of 12" in log
    assert ("Numba" in log) == (FAST and "data.backend" not in names)
    found = losses(log)
    assert list(found) == list(range(5, 13))
    np.testing.assert_allclose([*found.values()], [expected[step] for step in found], atol=2e-4)
    np.testing.assert_allclose(table(tmp_path / "run"), table(folder / "run"), rtol=1e-4)
    ours, theirs = (
        load_weights(path / "run" / "checkpoints" / "12")[0] for path in (tmp_path, folder)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), ours, theirs)


def test_a_process_that_dies_ends_the_other(tmp_path):
    pair = Launch(tmp_path, 2)
    pair.wait_for(r"step +2/")
    pair.processes[1].kill()
    codes, logs = pair.end()
    assert codes == [75, -signal.SIGKILL], logs
    assert "another process of the run has ended or cannot be reached" in logs[0]


def test_a_process_that_is_alone_says_so(tmp_path):
    launch = Launch(tmp_path, 2, [0], ("-c", IMPATIENT))
    (code,), (log,) = launch.end()
    assert code == 75, log
    assert f"did not come at localhost:{launch.port} within 2 s: start the same command" in log
    assert "Traceback" not in log
    assert not (tmp_path / "run").exists()


def test_processes_that_differ_say_in_what(tmp_path):
    codes, logs = Launch(tmp_path, 2, keys={1: ("--config.schedule.learning_rate=0.1",)}).end()
    assert codes == [1, 1], logs
    for log in logs:
        assert "the hosts differ in the config: process 1 from process 0" in log
        assert "Traceback" not in log
    assert not (tmp_path / "run").exists()


def test_what_one_process_cannot_do_is_said_by_both(tmp_path):
    """The data is not where the second host is told to look for it."""
    codes, logs = Launch(tmp_path, 2, keys={1: ("--config.data.dir=/nonexistent",)}).end()
    assert codes == [1, 1], logs
    assert "error: process 1 of the run says: " in logs[0]
    assert all("/nonexistent" in log and "Traceback" not in log for log in logs)
    assert not (tmp_path / "run").exists()


BROKEN = """
import runpy, sys
from mambaout_jax.training.metrics import LossMeter
def push(losses, step, loss):
    raise ValueError("the connection of two layers is unavailable")
LossMeter.push = push
sys.argv = ["main.py", *sys.argv[1:]]
runpy.run_path("main.py", run_name="__main__")
"""


def test_an_error_that_speaks_of_a_connection_is_no_lost_process(tmp_path):
    """Else both would be started again for ever."""
    codes, logs = Launch(tmp_path, 2, program=("-c", BROKEN)).end()
    assert codes == [1, 1], logs
    for log in logs:
        assert "error: the connection of two layers is unavailable" in log
