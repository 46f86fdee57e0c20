r"""Compares what a run's log says of its time with a trace of the same steps.

  python benchmarks/log_and_trace.py --config=configs/quickstart.py --workdir=/tmp/run \
      --config.schedule.duration='150 steps' --config.schedule.cooldown= \
      --config.schedule.warmup='5 steps' --config.schedule.per=step --config.profile='100 steps'

takes main.py's flags. Prints the seconds of the traced steps in which the devices computed and did
not, by the log's own clock and by the trace. In the trace of a GPU the first device computes while
any of its streams does; in that of a CPU while a program is executed.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
from absl import app

import main
from mambaout_jax.runtime import goodput
from mambaout_jax.training import loop as training

clocks: list[goodput.Goodput] = []
snapshots: list[dict[str, float]] = []
folders: list[str] = []


class Clock(goodput.Goodput):
    """The run's clock, where this script finds it."""

    def __init__(self) -> None:
        super().__init__()
        clocks.append(self)


def busy_seconds(events: Iterable[Any]) -> float:
    """Returns the length of the union of the events."""
    seconds, end = 0.0, 0.0
    for event in sorted(events, key=lambda event: event.start_ns):
        start = max(event.start_ns, end)
        seconds += max(event.end_ns - start, 0) / 1e9
        end = max(end, event.end_ns)
    return seconds


def is_execution(plane: str, line: str, event: str) -> bool:
    """Returns whether an event of a trace says that the first device computes."""
    if plane == "/device:GPU:0":
        return line.startswith("Stream")
    return plane == "/host:CPU" and event == "ThunkExecutor::Execute"


def read_trace(folder: str) -> float:
    """Returns the seconds in which the first device computed."""
    (file,) = Path(folder).glob("**/*.xplane.pb")
    planes = list(jax.profiler.ProfileData.from_file(os.fspath(file)).planes)
    gpus = [plane for plane in planes if plane.name == "/device:GPU:0"]
    return busy_seconds(
        event
        for plane in gpus or planes
        for line in plane.lines
        for event in line.events
        if is_execution(plane.name, line.name, event.name)
    )


def start_trace(folder: Any) -> None:
    """Starts the trace when the steps before it have ended."""
    clocks[-1].elapsed()
    folders.append(os.fspath(folder))
    start(folder)
    snapshots.append(clocks[-1].elapsed())


def stop_trace() -> None:
    """Ends the trace when its steps have ended, and prints the comparison."""
    after, before = clocks[-1].elapsed(), snapshots[-1]
    stop()
    parts = {name: after[name] - before[name] for name in before}
    total, traced = sum(parts.values()), read_trace(folders[-1])
    print(
        ", ".join(f"{name} {seconds:.3f}" for name, seconds in parts.items()), f"of {total:.3f} s"
    )
    device = parts[goodput.DEVICE]
    print(f"the devices compute: by the log {device:.3f} s, by the trace {traced:.3f} s")
    print(f"they do not: by the log {total - device:.3f} s, by the trace {total - traced:.3f} s")


start, stop = jax.profiler.start_trace, jax.profiler.stop_trace
jax.profiler.start_trace, jax.profiler.stop_trace = start_trace, stop_trace

if __name__ == "__main__":
    training.Goodput = Clock  # type: ignore[misc]
    app.run(main.main, flags_parser=main.parse_run_flags)
