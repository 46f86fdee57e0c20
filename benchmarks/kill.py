"""Kills runs at random moments with SIGKILL, resumes them, and compares their ends.

    python benchmarks/kill.py --kills=20
    python benchmarks/kill.py --kills=10 --folder=gs://BUCKET/kill

Each kill is of a run of its own: moments are spread over steps, saves and evaluations. The same
command then finishes the run. Parameters, optimizer, averages, metrics.csv and the curves that
TensorBoard shows must be those of the run that was never killed, bit for bit.
"""

import argparse
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mambaout_jax.bucket import absolute, children, is_bucket
from mambaout_jax.weights.steps import whole_steps

ROOT = Path(__file__).parents[1]
COMMAND = (
    sys.executable,
    "main.py",
    "--config=configs/quickstart.py",
    "--config.model.depthwise=xla",
    "--config.data.train_split=train[:64]",
    "--config.data.eval_split=validation[:30]",
    "--config.batch_size=16",
    "--config.eval.batch_size=10",
    "--config.schedule.duration=4 epochs",
    "--config.schedule.warmup=1 epochs",
    "--config.log.every=1 steps",
    "--config.checkpoint.every=3 steps",
)
STEPS = 16


def start(workdir: epath.Path, log: Path) -> subprocess.Popen:
    """Starts the run, or resumes it."""
    with log.open("a") as file:
        return subprocess.Popen((*COMMAND, f"--workdir={workdir}"), cwd=ROOT, stderr=file)


def unfinished(workdir: epath.Path) -> list[str]:
    """Returns the names of saves that are under way, or were when the run was killed."""
    names = {path.name for path in children(workdir / "checkpoints")}
    if is_bucket(workdir):
        return sorted(names - {str(step) for step in whole_steps(workdir / "checkpoints")})
    return sorted(name for name in names if "orbax-checkpoint-tmp" in name)


def finish(workdir: epath.Path, log: Path) -> int:
    """Runs until the end; returns the exit code."""
    return start(workdir, log).wait(timeout=600)


def arrays(workdir: epath.Path) -> dict[str, np.ndarray]:
    """Returns every array of the last checkpoint."""
    found = {}
    for item in ("params", "optimizer", "ema_params"):
        tree = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(STEPS) / item)
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
                break  # cut off by the kill
            event = Event.FromString(record)
            if event.HasField("session_log"):
                shown = {key: value for key, value in shown.items() if key[1] < event.step}
            for value in event.summary.value:
                if value.tag.startswith(("train/", "eval/", "learning_rate")):
                    shown[value.tag, event.step] = value.simple_value
    return shown


def differences(workdir: epath.Path, straight: epath.Path) -> list[str]:
    """Returns what differs from the run that was not killed."""
    found = []
    if (workdir / "metrics.csv").read_bytes() != (straight / "metrics.csv").read_bytes():
        found.append("metrics.csv")
    ours, theirs = arrays(workdir), arrays(straight)
    if ours.keys() != theirs.keys():
        found.append("arrays' names")
    found += [key for key in ours if not np.array_equal(ours[key], theirs[key])]
    if curves(workdir) != curves(straight):
        found.append("TensorBoard's curves")
    if unfinished(workdir):
        found.append("unfinished saves are left")
    return found


def last_step(log: str) -> int:
    """Returns the last step that a log shows."""
    return max(map(int, re.findall(r"\bstep +(\d+)/", log)), default=0)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    """Waits until the condition holds or the process ends."""
    while not condition() and process.poll() is None:
        time.sleep(0.001)


def kill_once(workdir: epath.Path, log: Path, moment: str, random_: random.Random) -> str:
    """Starts a run, kills it at a random instance of `moment`, and says where that was."""
    process = start(workdir, log)
    step = random_.randrange(1, STEPS)
    if moment == "start":  # imports, compilation, before the first step
        wait_for(lambda: workdir.exists(), process)
        time.sleep(random_.random() * 3)
    elif moment == "step":
        wait_for(lambda: last_step(log.read_text()) >= step, process)
        time.sleep(random_.random() * 0.1)
    elif moment == "save":
        wait_for(lambda: last_step(log.read_text()) >= step and bool(unfinished(workdir)), process)
        time.sleep(random_.random() * 0.1)
    else:  # an evaluation follows steps 4, 8, 12 and 16, and ends with a line on the epoch
        epoch = random_.randrange(1, 5)
        wait_for(lambda: last_step(log.read_text()) >= 4 * epoch, process)
        time.sleep(random_.random() * 0.05)
    process.send_signal(signal.SIGKILL)
    code = process.wait()
    state = f"step {last_step(log.read_text())}"
    if unfinished(workdir):
        state += ", saving"
    return f"{moment}: {state}" if code == -signal.SIGKILL else f"{moment}: had finished"


def main() -> int:
    """Prints a table of moments and outcomes; returns the number of runs that differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="of the workdirs, such as gs://BUCKET/kill")
    arguments = parser.parse_args()
    logs = Path(tempfile.mkdtemp(prefix="kill_"))
    folder = absolute(arguments.folder or logs)
    straight, random_ = folder / "straight", random.Random(arguments.seed)
    assert finish(straight, logs / "straight.log") == 0, (logs / "straight.log").read_text()
    failures = 0
    for number in range(arguments.kills):
        workdir, log = folder / str(number), logs / f"{number}.log"
        moment = ("step", "save", "evaluation", "start")[number % 4]
        moment = kill_once(workdir, log, moment, random_)
        code = finish(workdir, log)
        found = differences(workdir, straight) if code == 0 else [f"exit code {code}"]
        failures += bool(found)
        resumed = re.findall(r"resumed at step (\d+)", log.read_text())
        begun = f"resumed at step {resumed[-1]}" if resumed else "started anew"
        print(
            f"{number + 1:2}  {moment:32} {begun:20} {', '.join(found) or 'identical'}", flush=True
        )
    print(f"{arguments.kills - failures} of {arguments.kills} identical to the run not killed")
    if not failures:
        shutil.rmtree(logs)
        if is_bucket(folder):
            folder.rmtree()
    return failures


if __name__ == "__main__":
    sys.exit(min(main(), 1))
