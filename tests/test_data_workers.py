"""Worker processes of the loader: signals, deaths, errors, and their end."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from batches import train_batches

from configs import default
from mambaout_jax.data import prefetch
from mambaout_jax.data.buffers import Layout
from mambaout_jax.data.parallel import Parallel
from mambaout_jax.data.prefetch import BatchesAhead
from mambaout_jax.data.workers import WorkerLostError
from mambaout_jax.errors import UserError

WORKERS = Parallel(workers=2, threads=2, cores=1)


class CountingMaker:
    """Each row is its number, unless something happens at a row of a given number."""

    def __init__(self, what="nothing", number=-1):
        self.layout = Layout(20, (("number", (), "int64"),))
        self._what, self._number = what, number

    def name(self, step, row):
        return f"number {20 * step + row}"

    def __call__(self, step, start, out, permit):
        with permit:
            for row in range(len(out["number"])):
                out["number"][row] = 20 * step + start + row
                if out["number"][row] == self._number:
                    self._happen()
        return []

    def _happen(self):
        if self._what in ("SIGKILL", "SIGSEGV"):
            os.kill(os.getpid(), signal.Signals[self._what])
            time.sleep(60)  # another thread may receive it
        elif self._what == "exit":
            os._exit(3)
        elif self._what == "UserError":
            raise UserError("no such thing")
        elif self._what == "KeyError":
            raise KeyError("missing")


class NotPickledError(Exception):
    """Its pickle does not load."""

    def __init__(self, first, second):
        super().__init__(first)


class MakerThatCannotStart(CountingMaker):
    """Ends each process that loads it."""

    def __setstate__(self, state):
        os._exit(4)


class MakerOfUnportableErrors(CountingMaker):
    """Raises an error that cannot be pickled."""

    def __call__(self, step, start, out, permit):
        raise NotPickledError("one", "two")


def digits_config(**data):
    config = default.get_config()
    config.data.update(name="digits", num_classes=10, image_size=24, threads=2, **data)
    config.batch_size = 120
    return config


def assert_the_same(batches, expected, count):
    for _ in range(count):
        image = next(batches)["image"]
        np.testing.assert_array_equal(image, next(expected)["image"])


@pytest.fixture
def patient(monkeypatch):
    """Processes start slowly on a machine that runs other tests."""
    monkeypatch.setattr(prefetch, "_REPEAT_SECONDS", 600.0)


def test_batches_come_in_order_and_end():
    batches = list(BatchesAhead(CountingMaker(), WORKERS, 3, 9))
    assert [damages for _, damages in batches] == [[]] * 6
    numbers = np.concatenate([batch["number"] for batch, _ in batches])
    np.testing.assert_array_equal(numbers, np.arange(60, 180))
    assert not multiprocessing.active_children()


def test_a_killed_worker_is_named_and_the_same_batches_follow():
    expected = train_batches(digits_config(workers=0))
    batches = train_batches(digits_config(workers=2))
    next(batches), next(expected)
    lost = multiprocessing.active_children()[0]
    os.kill(lost.pid, signal.SIGKILL)
    with pytest.raises(
        WorkerLostError, match=rf"\(process {lost.pid}\) was killed by SIGKILL"
    ) as e:
        assert_the_same(batches, expected, sys.maxsize)
    assert (e.value.pid, e.value.signal, e.value.status) == (lost.pid, "SIGKILL", -signal.SIGKILL)
    assert f"loader worker {e.value.worker} " in str(e.value)
    assert "if memory ran out" in str(e.value)
    assert not multiprocessing.active_children()
    assert_the_same(batches, expected, 3)  # new workers, from the batch that was not made
    batches.close()


@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("SIGKILL", "are killed by SIGKILL each time they make number 45: .*, or give .* memory"),
        ("exit", "end with status 3 each time they make number 45: repair or remove it$"),
    ],
)
def test_an_image_that_kills_each_worker_is_named_as_the_mistake(patient, what, how):
    ahead = BatchesAhead(CountingMaker(what, 45), WORKERS, 0)
    with pytest.raises(UserError, match=f"^loader workers {how}"):
        list(ahead)
    assert not multiprocessing.active_children()


def test_workers_that_cannot_start_are_a_mistake(patient):
    ahead = BatchesAhead(MakerThatCannotStart(), WORKERS, 0)
    with pytest.raises(UserError, match=r"^loader workers end with status 4 when they start: see"):
        next(ahead)


def test_errors_of_a_worker_are_raised_with_its_traceback():
    with pytest.raises(UserError, match=r"^no such thing$"):
        list(BatchesAhead(CountingMaker("UserError", 45), WORKERS, 0, 9))
    with pytest.raises(KeyError, match="missing") as e:
        list(BatchesAhead(CountingMaker("KeyError", 45), WORKERS, 0, 9))
    assert "in _happen" in "".join(e.value.__notes__)
    with pytest.raises(RuntimeError, match="NotPickledError"):
        list(BatchesAhead(MakerOfUnportableErrors(), WORKERS, 0, 9))
    assert not multiprocessing.active_children()


def test_a_forgotten_iterator_ends_its_workers():
    ahead = BatchesAhead(CountingMaker(), WORKERS, 0)
    next(ahead)
    assert len(multiprocessing.active_children()) == 2
    del ahead
    assert not multiprocessing.active_children()


START = """
import multiprocessing, signal, sys
from configs import default
from mambaout_jax.build_data import build_train_batches

config = default.get_config()
config.data.update(name="digits", num_classes=10, image_size=24, workers=2)
config.batch_size = 16
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    signal.signal(getattr(signal, name), lambda number, frame: print(number, flush=True))
batches = build_train_batches(config)
print("starting", flush=True)
"""
GROUP = (
    START
    + """
next(batches)
workers = [child.pid for child in multiprocessing.active_children()]
print("started", flush=True)
for line in sys.stdin:
    for _ in range(20):
        next(batches)
    assert workers == [child.pid for child in multiprocessing.active_children()]
    print("made", flush=True)
"""
)


def test_signals_to_the_group_leave_the_workers_to_the_main_process():
    with subprocess.Popen(
        [sys.executable, "-c", GROUP],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as run:
        lines = iter(run.stdout.readline, "")
        for sign in ("starting", "started"):
            assert sign in (line.strip() for line in lines)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                os.killpg(run.pid, number)
                assert str(int(number)) in (line.strip() for line in lines)
        print("go", file=run.stdin, flush=True)
        assert "made" in (line.strip() for line in lines)
        run.stdin.close()
        assert run.wait(300) == 0


def test_workers_end_with_a_main_process_that_does_not_close_them():
    code = START + "next(batches); print(multiprocessing.active_children()[0].pid)"
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True, timeout=300
    )
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout.split()[-1]), 0)


KILLED_PARENT = """
import multiprocessing, os, signal, sys
from configs import default
from mambaout_jax.build_data import build_train_batches

config = default.get_config()
config.data.update(name="digits", num_classes=10, image_size=24, workers=1)
config.batch_size = 16
batches = build_train_batches(config)
next(batches)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_when_their_parent_is_killed():
    done = subprocess.run([sys.executable, "-c", KILLED_PARENT], stdout=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL
    (worker,) = map(int, done.stdout.split())
    for _ in range(300):
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail(f"the worker {worker} lives on")
