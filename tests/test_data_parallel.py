"""How many processes and threads the loader starts."""

import pytest

from mambaout_jax.data import parallel


@pytest.fixture
def machine(monkeypatch):
    """Sets the cores and the free memory of the machine."""

    def be(cores, memory=2**40):
        monkeypatch.setattr(parallel, "usable_cores", lambda: cores)
        monkeypatch.setattr(parallel, "free_memory", lambda: memory)

    return be


@pytest.mark.parametrize(
    ("cores", "workers", "images", "expected"),
    [
        (2, -1, None, (0, 2)),
        (4, -1, None, (0, 4)),
        (6, -1, None, (5, 1)),
        (16, -1, None, (14, 1)),
        (224, -1, None, (64, 4)),
        (16, -1, 50_000, (14, 1)),
        (16, -1, 6_000, (4, 4)),
        (16, -1, 360, (0, 16)),
        (16, 3, 360, (3, 5)),
        (16, 0, None, (0, 16)),
        (1, 2, None, (2, 1)),
    ],
)
def test_workers_follow_the_cores_and_leave_some_to_the_main_process(
    machine, cores, workers, images, expected
):
    machine(cores)
    options = parallel.choose(workers, 3, images)
    assert (options.workers, options.cores) == expected
    assert options.threads == 3


def test_workers_fit_into_the_memory(machine, caplog):
    machine(16, memory=2**30)
    assert parallel.choose(-1, 2).workers == 3
    assert not caplog.records
    assert parallel.choose(16, 2).workers == 16
    assert "data.workers is 16, but the free memory is enough for 3 of about 300" in caplog.text


def test_the_memory_of_this_machine_is_read():
    assert 2**20 < parallel.free_memory() < 2**50
