"""The kinds of fault of `chaos.py`: real signals, full disks, damaged files, failing calls."""

import contextlib
import dataclasses
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from chaos_run import Run
from etils import epath

from mambaout_jax.weights.steps import whole_steps

MOMENTS = ("start-up", "compile", "step", "evaluation", "save", "resumable")
LOOP = MOMENTS[2:5]
KILLED = -signal.SIGKILL
RESUMES = 75


def nothing(run: Run, random_: random.Random) -> None:
    """Does nothing."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Attributes:
        inject: makes the fault at the moment.
        status: exit statuses that are promised of the run; 0, if it had nothing left to do, is one.
        moments: that it is made at.
        prepare: called before the run starts.
        mend: called before the run is resumed.
        preloads: whether the run starts with `chaos_eio.c`.
        mounts: whether it needs root.
        disk: whether it is a fault of disks alone, as those that mount and preload are.
        loses: what is promised to survive everywhere else, and is lost here.
    """

    inject: Callable[[Run, random.Random], None]
    status: tuple[int, ...]
    moments: tuple[str, ...] = MOMENTS[:5]
    prepare: Callable[[Run, random.Random], None] = nothing
    mend: Callable[[Run, random.Random], None] = nothing
    preloads: bool = False
    mounts: bool = False
    disk: bool = False
    loses: tuple[str, ...] = ()


def sent(number: signal.Signals, group: bool) -> Callable[[Run, random.Random], None]:
    """Returns what sends a signal to the process, or to its group."""

    def inject(run: Run, random_: random.Random) -> None:
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(run.process.pid, number)

    return inject


def kill_worker(run: Run, random_: random.Random) -> None:
    """Kills a worker of the loader, as the kernel does where memory is short."""
    run.wait_for(lambda: bool(run.workers()))
    if workers := run.workers():
        with contextlib.suppress(ProcessLookupError):
            os.kill(random_.choice(workers), signal.SIGKILL)


def limit_files(run: Run, random_: random.Random) -> None:
    """Lets files grow to 600 kB: the arrays' are larger."""
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (600_000, 600_000))


def mount_disk(run: Run, random_: random.Random) -> None:
    """Puts the workdir's parent on a disk of 32 MB."""
    disk = Path(run.workdir.parent)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", disk], check=True)


def fill_disk(run: Run, random_: random.Random) -> None:
    """Fills the disk, and keeps it full until the process ends."""
    filler, process = Path(run.workdir.parent) / "filler", run.process

    def fill() -> None:
        with filler.open("ab", buffering=0) as file:
            while not process or process.poll() is None:  # run.process changes
                for size in (1 << 20, 1 << 12, 1):
                    with contextlib.suppress(OSError):
                        while file.write(bytes(size)) == size:
                            pass
                if not process:
                    return
                time.sleep(0.02)

    if process:
        threading.Thread(target=fill, daemon=True).start()
    else:
        fill()


def full_disk(run: Run, random_: random.Random) -> None:
    """Puts the workdir's parent on a disk without space."""
    mount_disk(run, random_)
    fill_disk(run, random_)


def free_disk(run: Run, random_: random.Random) -> None:
    """Makes space on the disk."""
    (Path(run.workdir.parent) / "filler").unlink(missing_ok=True)


def forbid_writes(run: Run, random_: random.Random) -> None:
    """Makes the workdir read-only for whatever is opened from now on."""
    run.wait_for(run.workdir.exists)
    if run.workdir.exists():
        subprocess.run(["mount", "--bind", run.workdir, run.workdir], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", run.workdir], check=True)


def allow_writes(run: Run, random_: random.Random) -> None:
    """Makes the workdir writable again."""
    subprocess.run(["umount", run.workdir], stderr=subprocess.DEVNULL)


def remove(run: Run, random_: random.Random) -> None:
    """Removes the workdir under the run."""
    while run.workdir.exists() and not run.ended():
        shutil.rmtree(run.workdir, ignore_errors=True)


def failing(kind: str, times: int, number: int = errno.EIO) -> Callable[[Run, random.Random], None]:
    """Returns what makes so many reads or writes in the workdir fail with an error."""

    def inject(run: Run, random_: random.Random) -> None:
        run.log.with_suffix(f".{kind}").write_text(f"{times} {number}")

    return inject


def stop_failing(run: Run, random_: random.Random) -> None:
    """Lets reads and writes succeed again."""
    for kind in ("reads", "writes"):
        run.log.with_suffix(f".{kind}").unlink(missing_ok=True)


def newest(run: Run) -> epath.Path:
    """Returns the folder of the newest checkpoint."""
    steps = whole_steps(run.workdir / "checkpoints")
    return steps[max(steps)]


def kill_with_two_checkpoints(run: Run, random_: random.Random) -> None:
    """Kills the run once it has two checkpoints: one is to be damaged."""
    run.wait_for(lambda: len(whole_steps(run.workdir / "checkpoints")) > 1)
    sent(signal.SIGKILL, group=False)(run, random_)
    run.process.wait()


def flip_bit(run: Run, random_: random.Random) -> None:
    """Flips a bit in an array file of the newest checkpoint."""
    kill_with_two_checkpoints(run, random_)
    path = array_file(run, random_)
    content = bytearray(path.read_bytes())
    content[random_.randrange(len(content))] ^= 1 << random_.randrange(8)
    path.write_bytes(content)


def cut_file(run: Run, random_: random.Random) -> None:
    """Cuts an array file of the newest checkpoint off."""
    kill_with_two_checkpoints(run, random_)
    path = array_file(run, random_)
    content = path.read_bytes()
    path.write_bytes(content[: random_.randrange(len(content))])


def empty_folder(run: Run, random_: random.Random) -> None:
    """Leaves an empty folder named as the run's last step."""
    kill_with_two_checkpoints(run, random_)
    (Path(run.workdir) / "checkpoints" / "12").mkdir(exist_ok=True)


def array_file(run: Run, random_: random.Random) -> epath.Path:
    """Returns a file with arrays of the newest checkpoint."""
    files = [path for path in newest(run).glob("*/d/*") if len(path.read_bytes()) > 1000]
    return random_.choice(sorted(files))


def failing_resume(run: Run, random_: random.Random) -> None:
    """Kills the run; when it resumes, the first reads fail."""
    kill_with_two_checkpoints(run, random_)
    failing("reads", 3)(run, random_)


FAULTS = {
    "sigkill": Fault(sent(signal.SIGKILL, False), (KILLED,), MOMENTS),
    "sigterm": Fault(sent(signal.SIGTERM, False), (RESUMES,)),
    "sigterm-group": Fault(sent(signal.SIGTERM, True), (RESUMES,)),
    "sigint-group": Fault(sent(signal.SIGINT, True), (RESUMES,)),
    "sighup-group": Fault(sent(signal.SIGHUP, True), (RESUMES,)),
    "worker": Fault(kill_worker, (RESUMES,), LOOP),
    "disk-full-at-start": Fault(
        nothing, (1,), ("start-up",), prepare=full_disk, mend=free_disk, mounts=True
    ),
    "disk-full": Fault(
        fill_disk, (1,), MOMENTS[1:5], prepare=mount_disk, mend=free_disk, mounts=True
    ),
    "file-limit": Fault(limit_files, (1,), disk=True),
    "read-only": Fault(forbid_writes, (1,), mend=allow_writes, mounts=True),
    "removed": Fault(remove, (0, 1), MOMENTS[1:5], loses=("TensorBoard's curves",), disk=True),
    "bit": Fault(flip_bit, (KILLED,), LOOP),
    "cut": Fault(cut_file, (KILLED,), LOOP),
    "empty": Fault(empty_folder, (KILLED,), LOOP, disk=True),
    "eio-writes": Fault(failing("writes", 10**9), (RESUMES,), mend=stop_failing, preloads=True),
    "eio-one-write": Fault(failing("writes", 1), (), LOOP, preloads=True),
    "no-space-once": Fault(failing("writes", 1, errno.ENOSPC), (), LOOP, preloads=True),
    "eio-reads": Fault(failing_resume, (KILLED,), LOOP, preloads=True),
}
