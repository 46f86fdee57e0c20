"""A FIFO, a socket, a device or a folder in place of a file: one sentence, and no wait for it."""

import os
import shutil
import signal
import socket
from pathlib import Path

import pytest
from etils import epath

from mambaout_jax import config, files
from mambaout_jax.bucket import absolute
from mambaout_jax.data.prepared import prepared_directory
from mambaout_jax.data.segmentation.sources import FolderMaskSource
from mambaout_jax.errors import UserError
from mambaout_jax.inference.ground_truth import read_real_labels, read_subset
from mambaout_jax.runtime.workdir import check_workdir, lock_workdir, read_record
from mambaout_jax.training import checkpoint, recorder
from mambaout_jax.weights.load import read_weights

RUN = Path(__file__).parent / "checkpoints" / "run-1"


def make_socket(path):
    os.chdir(path.parent)  # the name of a socket is short
    socket.socket(socket.AF_UNIX).bind(path.name)


KINDS = {
    "a FIFO": os.mkfifo,
    "a socket": make_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": lambda path: path.mkdir(),
}


@pytest.fixture(autouse=True)
def no_endless_wait(monkeypatch, tmp_path):
    """Ends a test that waits for a writer."""
    monkeypatch.chdir(tmp_path)

    def fail(number, frame):
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=list(KINDS))
def kind(request):
    return request.param


def open_masks(path):
    for name in ("images/train/1.jpg", "annotations/train/1.png"):
        (path.parent / name).parent.mkdir(parents=True)
        (path.parent / name).touch()
    FolderMaskSource(str(path.parent), "train", 2, False)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("x", files.read_bytes),
        ("config.json", lambda path: read_record(epath.Path(path.parent))),
        ("config.json", lambda path: check_workdir(epath.Path(path.parent), {})),
        ("lock", lambda path: lock_workdir(epath.Path(path.parent))),
        ("metrics.csv", lambda path: recorder.read_rows(epath.Path(path))),
        ("wandb_id", lambda path: recorder.wandb_id(epath.Path(path.parent))),
        ("real.json", read_real_labels),
        ("subset.txt", lambda path: read_subset(path, 10)),
        ("own.py", config.load_config),
        ("classes.txt", open_masks),
    ],
)
def test_a_file_that_is_none(name, read, kind, tmp_path):
    KINDS[kind](tmp_path / name)
    with pytest.raises(UserError, match=f"{name} is {kind}, not a "):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("loop", r"cannot use .*/loop: Too many levels of symbolic links"),
        ("loop/run", r"cannot use .*/loop/run: Too many levels of symbolic links"),
        ("broken", r"/broken is a link to nothing: remove it, or make that folder"),
        ("x" * 300, r"cannot use .*: File name too long"),
    ],
)
def test_a_path_that_cannot_be_used(name, message, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "broken").symlink_to("nothing")
    with pytest.raises(UserError, match=message):
        absolute(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("meta/metadata", "a FIFO"),
        ("ema_params/_METADATA", "a socket"),
        ("_CHECKPOINT_METADATA", "a device"),
    ],
)
def test_a_checkpoint_with_something_else_is_damaged(name, kind, tmp_path, caplog):
    workdir = tmp_path / "run"
    shutil.copytree(RUN, workdir)
    steps = {path.name for path in (workdir / "checkpoints").iterdir()}
    (workdir / "checkpoints/3" / name).unlink()
    KINDS[kind](workdir / "checkpoints/3" / name)
    with pytest.raises(UserError, match=f"{name} is {kind}, not a file"):
        read_weights(workdir / "checkpoints" / "3")
    with checkpoint.open_checkpoints(epath.Path(workdir), keep=5):
        pass
    assert f"{name} is {kind}, not a file" in caplog.text
    found = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert found == steps - {"3"} | {"3.damaged"}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "a folder"])
def test_a_prepared_dataset_with_something_else(kind, tmp_path):
    version = tmp_path / "digits" / "1.0.0"
    version.mkdir(parents=True)
    KINDS[kind](version / "dataset_info.json")
    with pytest.raises(UserError, match=f"dataset_info.json is {kind}, not a file"):
        prepared_directory("digits", str(tmp_path))
