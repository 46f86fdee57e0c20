"""Damaged images: replaced, counted and named in training, an error in evaluation."""

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from batches import eval_batches, train_batches
from imagenet_fixture import jpeg

from configs import default
from mambaout_jax.data import digits
from mambaout_jax.data.decoding import UnreadableError
from mambaout_jax.errors import StorageError, UserError


@pytest.fixture
def folder(tmp_path):
    """Twelve images in order, of which numbers 3 and 4 are damaged."""
    directory = tmp_path / "damaged" / "train" / "class"
    directory.mkdir(parents=True)
    for number in range(12):
        (directory / f"{number:02d}.JPEG").write_bytes(jpeg(number))
    (directory / "03.JPEG").write_bytes(b"not an image")
    without_tables = jpeg(4).replace(b"\xff\xdb", b"\xff\xef")  # found out while decoding
    (directory / "04.JPEG").write_bytes(without_tables)
    return tmp_path / "damaged"


def config(folder, max_bad_fraction=0.2, workers=0, backend="auto"):
    config = default.get_config()
    config.data.update(source="folder", dir=str(folder), num_classes=1, image_size=16)
    config.data.update(threads=2, workers=workers, backend=backend, eval_split="train")
    config.augment.update(max_bad_fraction=max_bad_fraction)
    config.batch_size = config.eval.batch_size = 12
    return config


@pytest.mark.parametrize(("workers", "backend"), [(0, "pillow"), (1, "auto")])
def test_training_replaces_counts_and_names_once(tmp_path, folder, caplog, workers, backend):
    whole = shutil.copytree(folder, tmp_path / "whole")
    for number in (3, 4):
        (whole / "train" / "class" / f"{number:02d}.JPEG").write_bytes(jpeg(5))
    batches = train_batches(config(folder, workers=workers, backend=backend))
    expected = train_batches(config(whole))
    for _ in range(2):
        batch, replaced = next(batches), next(expected)
        np.testing.assert_array_equal(batch["image"], replaced["image"])
        assert batch["replaced"].sum() == 2
    batches.close()
    names = {str(folder / "train" / "class" / name) for name in ("03.JPEG", "04.JPEG")}
    assert batches.bad_images == names
    assert "The next image replaces it (2 of at most 2)" in caplog.text
    for name in names:
        assert sum(name in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("max_bad_fraction", [0.1, 0.001, 0.0])
def test_one_bad_image_is_always_tolerated_and_two_must_be_allowed(folder, max_bad_fraction):
    limited = config(folder, max_bad_fraction)
    with pytest.raises(
        UserError,
        match=r"^2 of 12 training images could not be decoded; the limit is 1: repair .*03.JPEG, "
        r".*04.JPEG, or raise augment.max_bad_fraction$",
    ):
        next(train_batches(limited))
    (folder / "train" / "class" / "03.JPEG").write_bytes(jpeg(3))
    batches = train_batches(limited)
    assert [next(batches)["replaced"].sum() for _ in range(2)] == [1, 1]


@pytest.mark.parametrize(
    ("max_bad_fraction", "message"),
    [(0.2, "3 of 12 training images could not be decoded"), (1.0, "none of the 12 training")],
)
def test_nothing_but_bad_images_stops_the_run(folder, max_bad_fraction, message):
    for image in (folder / "train" / "class").iterdir():
        image.write_bytes(b"")
    with pytest.raises(UserError, match=message):
        next(train_batches(config(folder, max_bad_fraction)))


def test_evaluation_names_the_damaged_image(folder):
    with pytest.raises(UserError, match=r"0[34].JPEG cannot be decoded"):
        list(eval_batches(config(folder)))


# The kernel answers each read at the start of this file with EIO.
BROKEN_DISK = "/proc/self/mem"


class Repair(logging.Handler):
    """Replaces a file by its good content once the log says that reading it failed."""

    def __init__(self, path, content):
        super().__init__()
        self._path, self._content = path, content

    def emit(self, record):
        if str(self._path) in record.getMessage() and "trying again" in record.getMessage():
            self._path.unlink()
            self._path.write_bytes(self._content)


def broken(folder, number):
    path = folder / "train" / "class" / f"{number:02d}.JPEG"
    path.unlink()
    path.symlink_to(BROKEN_DISK)
    return path


def test_a_read_that_fails_once_is_repeated(folder, tmp_path):
    # Of a copy: the threads of these batches read on, and must not meet the broken file.
    expected = next(train_batches(config(shutil.copytree(folder, tmp_path / "copy"))))
    repair = Repair(broken(folder, 7), jpeg(7))
    logger = logging.getLogger("mambaout_jax.runtime.storage")
    logger.addHandler(repair)
    try:
        batches = train_batches(config(folder))
        batch = next(batches)
    finally:
        logger.removeHandler(repair)
    np.testing.assert_array_equal(batch["image"], expected["image"])
    assert len(batches.bad_images) == 2


@pytest.fixture
def good_folder(folder):
    """Twelve images, none of them damaged."""
    for number in (3, 4):
        (folder / "train" / "class" / f"{number:02d}.JPEG").write_bytes(jpeg(number))
    return folder


def test_an_image_that_stays_unreadable_counts_as_bad(good_folder):
    folder = good_folder
    path = broken(folder, 7)
    batches = train_batches(config(folder, max_bad_fraction=0.0))
    assert next(batches)["replaced"].sum() == 1
    assert batches.bad_images == {str(path)}
    with pytest.raises(UnreadableError, match=r"07.JPEG cannot be read: Input/output error"):
        list(eval_batches(config(folder)))


@pytest.mark.slow
def test_a_broken_disk_is_no_mistake_of_the_user(good_folder):
    for number in (7, 9):
        broken(good_folder, number)
    with pytest.raises(StorageError, match="2 of 12 training images could not be read; the limit"):
        next(train_batches(config(good_folder, max_bad_fraction=0.0)))


def test_a_file_that_becomes_a_fifo_is_a_bad_image_and_no_wait(folder):
    batches = eval_batches(config(folder))
    path = folder / "train" / "class" / "00.JPEG"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"00.JPEG cannot be decoded"):
        list(batches)


# Reads of a file in $BROKEN fail with EIO while the file $BROKEN/broken exists.
FAULTY_READS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int broken(int file) {
  char link[64], path[4096], flag[4096];
  const char *folder = getenv("BROKEN");
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  snprintf(flag, sizeof flag, "%s/broken", folder);
  return strncmp(path, folder, strlen(folder)) == 0 && access(flag, F_OK) == 0;
}
#define FAIL if (broken(file)) { errno = EIO; return -1; }
ssize_t read(int file, void *to, size_t count) {
  FAIL
  return ((ssize_t (*)(int, void *, size_t))dlsym(RTLD_NEXT, "read"))(file, to, count);
}
ssize_t pread(int file, void *to, size_t count, off_t at) {
  FAIL
  return ((ssize_t (*)(int, void *, size_t, off_t))dlsym(RTLD_NEXT, "pread"))(file, to, count, at);
}
ssize_t pread64(int file, void *to, size_t count, off_t at) {
  FAIL
  return ((ssize_t (*)(int, void *, size_t, off_t))dlsym(RTLD_NEXT, "pread"))(file, to, count, at);
}
"""

PREPARED = """
import logging, os, pathlib, sys
from mambaout_jax.data.decoding import UnreadableError
from mambaout_jax.data.sources import Dataset, open_source

flag = pathlib.Path(os.environ["BROKEN"]) / "broken"
source = open_source(Dataset("tfds", "digits", os.environ["BROKEN"], "train", "", 10), "train")
first = source[0]

class Repair(logging.Handler):
    def emit(self, record):
        assert "digits/1.0.0/train[1]" in record.getMessage(), record.getMessage()
        assert "Input/output error" in record.getMessage()
        flag.unlink()

repair = Repair()
logger = logging.getLogger("mambaout_jax.runtime.storage")
logger.addHandler(repair)
flag.touch()
second = source[1]
logger.removeHandler(repair)
assert second["image"] != first["image"]
flag.touch()
try:
    source[2]
except UnreadableError as error:
    print(error)
flag.unlink()
assert source[0] == first and source[1] == second
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler, cc")
def test_a_record_is_read_again(tmp_path):
    """The readers of array_record stay broken after a fault: they must be opened again."""
    (tmp_path / "faulty.c").write_text(FAULTY_READS)
    library = tmp_path / "faulty.so"
    command = ["cc", "-shared", "-fPIC", "-o", library, tmp_path / "faulty.c", "-ldl"]
    subprocess.run(command, check=True)
    data = tmp_path / "data"
    shutil.copytree(Path(digits.__file__).parent / "1.0.0", data / "digits" / "1.0.0")
    environment = os.environ | {"LD_PRELOAD": str(library), "BROKEN": str(data)}
    done = subprocess.run(
        [sys.executable, "-c", PREPARED], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "digits/1.0.0/train[2] cannot be read: " in done.stdout
    assert "Input/output error" in done.stdout
