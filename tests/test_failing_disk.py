"""Saves on a disk whose writes fail inside Orbax's own threads, by a preloaded library."""

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import make_checkpoints
import pytest
from etils import epath

import main
from mambaout_jax.errors import UserError
from mambaout_jax.training import checkpoint
from mambaout_jax.training.restore import restore_newest

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
]
STATE, STEPS = make_checkpoints.state(), 4


def save_steps(workdir, flag, failing_step, failures):
    """Saves the steps, and lets writes fail from one on. Runs in a process with the library."""
    main.log_to_stderr()
    with checkpoint.open_checkpoints(workdir, keep=STEPS) as manager:
        for step in range(1, STEPS + 1):
            if step == failing_step:
                flag.write_text(failures)
            state = dataclasses.replace(STATE, step=jnp.asarray(step, jnp.int32))
            data, metrics = {"batches": {"step": step}}, {"top1": float(step)}
            info = dataclasses.replace(make_checkpoints.INFO, averaged=True, metrics=metrics)
            last = step == STEPS
            checkpoint.save(manager, state, data, info, metrics, wait=last)
            while step < failing_step and manager.is_saving_in_progress():
                time.sleep(0.01)  # so that the failing write is one of that step's


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("library") / "chaos_eio.so"
    source = ROOT / "benchmarks" / "chaos_eio.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", path, source, "-ldl"], check=True)
    return path


def run(library, folder, failing_step, failures):
    """Returns the process that saved the steps, and the steps that are there."""
    workdir, flag = folder / "run", folder / "flag"
    variables = {
        "LD_PRELOAD": library,
        "CHAOS_FOLDER": workdir,
        "CHAOS_FLAG": flag,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    done = subprocess.run(
        [sys.executable, __file__, workdir, f"{flag}.writes", str(failing_step), failures],
        env=os.environ | {name: str(value) for name, value in variables.items()},
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr
    names = {path.name for path in (workdir / "checkpoints").iterdir()}
    return done, names


def newest(workdir):
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATE
    )
    with checkpoint.open_checkpoints(epath.Path(workdir), keep=STEPS) as manager:
        state, _ = restore_newest(manager, abstract)
    return int(state.step)


@pytest.mark.parametrize(
    ("times", "number", "failing_step"),
    [
        (1, errno.EIO, 2),
        (1, errno.ENOSPC, STEPS),
        (12, errno.EIO, STEPS),
        (12, errno.ENOSPC, 2),
    ],
)
def test_a_write_that_fails_for_a_while_is_made_up_for(
    times, number, failing_step, library, tmp_path
):
    done, names = run(library, tmp_path, failing_step, f"{times} {number}")
    assert done.returncode == 0, done.stderr
    assert f"{os.strerror(number)} (" in done.stderr
    assert ": trying again" in done.stderr
    assert {"1", "3", "4"} <= names <= {"1", "2", "3", "4"}
    assert newest(tmp_path / "run") == STEPS


@pytest.mark.parametrize(
    ("number", "kind", "sentence"),
    [
        (errno.EIO, "StorageError", "Input/output error (check the disk: dmesg may say more); the"),
        (errno.ENOSPC, "FullError", "No space left on device (free space there); checkpoint 2 is"),
    ],
)
def test_writes_that_keep_failing_end_with_one_sentence(number, kind, sentence, library, tmp_path):
    done, names = run(library, tmp_path, 3, f"{10**9} {number}")
    assert done.returncode == 1
    assert done.stderr.count("trying again") == 3
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith(f"{kind}: cannot save to {tmp_path}/run/checkpoints: {sentence}")
    assert names == {"1", "2"}
    assert newest(tmp_path / "run") == 2


if __name__ == "__main__":
    try:
        save_steps(epath.Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    except UserError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    finally:
        Path(sys.argv[2]).unlink(missing_ok=True)
