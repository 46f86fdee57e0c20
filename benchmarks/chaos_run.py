"""One run of main.py for `chaos.py`: starts it, says where it stands, and compares its end."""

import functools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mambaout_jax.bucket import children, is_bucket
from mambaout_jax.weights.steps import DAMAGED, whole_steps

# This process only reads arrays. It would take a TPU from the runs; and libtpu makes a process
# ignore SIGHUP, and the runs that it starts with it.
jax.config.update("jax_platforms", "cpu")

ROOT = Path(__file__).parents[1]
COMMAND = (sys.executable, "main.py")
KEYS = (
    "--config.model.depthwise=xla",
    "--config.data.workers=1",
    "--config.batch_size=16",
    "--config.eval.batch_size=10",
    "--config.eval.every=1 epochs",
    "--config.schedule.duration=3 epochs",
    "--config.schedule.warmup=1 epochs",
    "--config.log.every=1 steps",
    "--config.checkpoint.every=3 steps",
)
# What each task has before these keys: 64 images to train with, 30 to evaluate.
TASKS = {
    "classification": (
        "--config=configs/quickstart.py",
        "--config.data.train_split=train[:64]",
        "--config.data.eval_split=validation[:30]",
    ),
    "segmentation": (
        "--config=configs/shapes.py",
        "--config.data.image_size=32",
        "--config.segmentation.channels=4",
    ),
}
STEPS, EPOCH = 12, 4
TIMEOUT = 900  # seconds until a run counts as hanging


def make_shapes(folder: Path) -> None:
    """Writes the dataset of the runs of segmentation, if it is not there."""
    if folder.exists():
        return
    command = [sys.executable, "-m", "mambaout_jax.data.shapes", f"--output={folder}"]
    subprocess.run([*command, "--train=64", "--validation=30"], cwd=ROOT, check=True)


class Run:
    """A workdir, and the processes that train in it, one after the other."""

    def __init__(self, workdir: epath.Path, log: Path, keys: Sequence[str]):
        self.workdir, self.log, self.keys = workdir, log, keys
        self.log.write_text("")
        self.process: subprocess.Popen | None = None

    def start(self, *keys: str, **environment: str) -> None:
        """Starts the run, or resumes it, in a process group of its own."""
        # Little optimization: the compilation would take most of the time.
        flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONUNBUFFERED": "1"}
        with self.log.open("a") as file:
            self.process = subprocess.Popen(
                (*COMMAND, *self.keys, *KEYS, *keys, f"--workdir={self.workdir}"),
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": str(ROOT)} | flags | environment,
                stderr=file,
                start_new_session=True,
            )

    def ended(self) -> bool:
        """Returns whether the process has ended."""
        assert self.process
        return self.process.poll() is not None

    def wait_for(self, condition: Callable[[], bool], seconds: float = TIMEOUT) -> None:
        """Waits until the condition holds, the process ends, or the time is over."""
        end = time.monotonic() + seconds
        pause = 0.05 if is_bucket(self.workdir) else 0.002  # of requests, or of files
        while not condition() and not self.ended() and time.monotonic() < end:
            time.sleep(pause)

    def finish(self) -> int | None:
        """Waits for the end of the process; returns its status, None for one that hangs."""
        assert self.process
        try:
            return self.process.wait(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return None

    def leftover(self, seconds: float = 60) -> bool:
        """Returns whether processes of the group are still there after so many seconds."""
        assert self.process
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if not self.group():
                return False
            time.sleep(0.05)
        os.killpg(self.process.pid, signal.SIGKILL)
        return True

    def group(self) -> list[int]:
        """Returns the processes of the group that have not ended, without the first one."""
        assert self.process
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue  # it has ended
            if int(group) == self.process.pid and state != "Z":
                found.append(int(path.parent.name))
        return [process for process in found if process != self.process.pid]

    def workers(self) -> list[int]:
        """Returns the loader's worker processes."""
        found = []
        for process in self.group():
            try:
                command = Path(f"/proc/{process}/cmdline").read_bytes()
            except OSError:
                continue
            if b"spawn_main" in command:
                found.append(process)
        return found

    def text(self) -> str:
        """Returns the log."""
        return self.log.read_text(errors="replace")

    def last_line(self) -> str:
        """Returns the last line of the log, without the time of day."""
        lines = self.text().replace(str(self.workdir), "WORKDIR").strip().splitlines()
        lines = lines or ["(nothing)"]
        return re.sub(r"^\d\d:\d\d:\d\d ", "", lines[-1])

    def last_step(self) -> int:
        """Returns the last step that the log shows, 0 before the first."""
        return max(map(int, re.findall(r"\bstep +(\d+)/", self.text())), default=0)

    def evaluated(self, step: int) -> bool:
        """Returns whether the log shows the evaluation after a step."""
        return f"epoch {step // EPOCH}/{STEPS // EPOCH}:" in self.text()

    def loops(self) -> bool:
        """Returns whether the compilation is over."""
        return " parameters, " in self.text()

    def unfinished(self) -> list[str]:
        """Returns the names of saves that are under way, or were when the run was killed."""
        folder = self.workdir / "checkpoints"
        names = {path.name for path in children(folder)}
        if is_bucket(self.workdir):
            names -= {str(step) for step in whole_steps(folder)}
            return sorted(name for name in names if not name.endswith(DAMAGED))
        return sorted(name for name in names if "orbax-checkpoint-tmp" in name)

    def place(self) -> str:
        """Returns where the run stands, as its log and its workdir show it."""
        if self.ended():
            return "had ended"
        if not (self.workdir / "config.json").exists():
            return "start-up"
        if not self.loops():
            return "compile"
        step = self.last_step()
        place = f"after step {step}"
        if step and step % EPOCH == 0 and not self.evaluated(step):
            place = f"evaluation {step}"
        return f"{place}, saving" if self.unfinished() else place


def arrays(workdir: epath.Path) -> dict[str, np.ndarray]:
    """Returns every array of the last checkpoint."""
    found = {}
    step = workdir / "checkpoints" / str(STEPS)
    for item in ("params", "optimizer", "ema_params"):
        if not (step / item).exists():
            continue  # not every recipe averages
        tree = ocp.StandardCheckpointer().restore(step / item)
        for path, leaf in jax.tree.leaves_with_path(tree):
            found[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


def curves(workdir: epath.Path) -> dict[tuple[str, int], float]:
    """Returns the scalars that TensorBoard shows, but those that are times.

    A later file's session replaces what older ones say of its first step and those after it.
    """
    from tensorboardX.proto.event_pb2 import Event

    shown: dict[tuple[str, int], float] = {}
    for file in children(workdir / "tensorboard"):  # their names begin with the time
        data, at = file.read_bytes(), 0
        while at + 12 <= len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            record = data[at + 12 : at + 12 + length]
            at += 16 + length
            if at > len(data):
                break  # cut off by the fault
            event = Event.FromString(record)
            if event.HasField("session_log"):
                shown = {key: value for key, value in shown.items() if key[1] < event.step}
            for value in event.summary.value:
                if value.tag.startswith(("train/", "eval/", "learning_rate")):
                    shown[value.tag, event.step] = value.simple_value
    return shown


@functools.cache
def expected(straight: epath.Path) -> tuple[dict, dict, bytes]:
    """Returns the end of the undisturbed run."""
    return arrays(straight), curves(straight), (straight / "metrics.csv").read_bytes()


def differences(run: Run, straight: epath.Path) -> list[str]:
    """Returns what differs from the run that was not disturbed."""
    found = []
    theirs, their_curves, metrics = expected(straight)
    if (run.workdir / "metrics.csv").read_bytes() != metrics:
        found.append("metrics.csv")
    ours = arrays(run.workdir)
    if ours.keys() != theirs.keys():
        found.append("arrays' names")
    found += [key for key in ours if not np.array_equal(ours[key], theirs.get(key))]
    if curves(run.workdir) != their_curves:
        found.append("TensorBoard's curves")
    if run.unfinished():
        found.append("unfinished saves are left")
    return found
