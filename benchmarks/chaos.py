"""Disturbs runs at many moments, resumes them, and compares their ends.

    python benchmarks/chaos.py
    python benchmarks/chaos.py --faults=sigkill --moments=step,save --count=20
    python benchmarks/chaos.py --faults=sigkill --workdirs=gs://BUCKET/chaos
    python benchmarks/chaos.py --task=segmentation --folder=runs/chaos-shapes

The environment of the third is that of a bucket, or what `python tests/bucket_server.py` prints.

Each cell is a run of its own: a kind of fault (`chaos_faults.py`) at a random instance of a moment.
Then what can be repaired is repaired, such as a full disk, and the same command finishes the run.
Parameters, optimizer, averages, metrics.csv and the curves that TensorBoard shows must be those of
a run that was not disturbed, bit for bit. The results are kept in FOLDER/results.jsonl, with the
last line of each disturbed run: the same command makes the cells that are missing. The table has
the exit status, the seconds until the process ended, and where the run resumed.
"""

import argparse
import concurrent.futures
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from chaos_faults import FAULTS, MOMENTS, RESUMES, Fault
from chaos_run import EPOCH, ROOT, STEPS, TASKS, Run, differences, make_shapes
from etils import epath

from mambaout_jax.bucket import absolute, is_bucket
from mambaout_jax.weights.steps import whole_steps

RESTARTS = 3  # of a command that ends with status 75
lock = threading.Lock()  # of the results, and of jax


def wait_for_moment(run: Run, moment: str, random_: random.Random) -> None:
    """Waits for a random instance of a moment."""
    step = random_.randrange(1, STEPS)
    if moment == "start-up":
        run.wait_for((run.workdir / "config.json").exists, random_.random() * 6)
    elif moment == "compile":
        run.wait_for((run.workdir / "config.json").exists)
        run.wait_for(run.loops, random_.random() * 10)
    elif moment == "step":
        run.wait_for(lambda: run.last_step() >= step)
        time.sleep(random_.random() * 0.1)
    elif moment == "save":
        run.wait_for(lambda: run.last_step() >= step and bool(run.unfinished()))
        time.sleep(random_.random() * 0.1)
    elif moment == "resumable":
        run.wait_for(lambda: bool(whole_steps(run.workdir / "checkpoints")))
        run.wait_for(lambda: run.last_step() == STEPS, random_.random() * 5)
    else:
        step = EPOCH * random_.randrange(1, STEPS // EPOCH + 1)
        run.wait_for(lambda: run.last_step() >= step)
        run.wait_for(lambda: run.evaluated(step), random_.random() * 4)


def disturb(run: Run, fault: Fault, moment: str, random_: random.Random, library: Path) -> dict:
    """Starts a run, injects the fault and repairs it; returns what was seen."""
    environment = {}
    if fault.preloads:
        environment = {
            "LD_PRELOAD": str(library),
            "CHAOS_FOLDER": str(run.workdir),
            "CHAOS_FLAG": str(run.log.with_suffix("")),
        }
    fault.prepare(run, random_)
    # Programs that were compiled before would leave no moment of compilation.
    keys = ["--config.compilation_cache="] if moment == "compile" else []
    run.start(*keys, **environment)
    wait_for_moment(run, moment, random_)
    place = run.place()
    fault.inject(run, random_)
    begin = time.monotonic()
    status = run.finish()
    seconds = time.monotonic() - begin
    seen = {"place": place, "status": status, "seconds": round(seconds, 1)}
    seen["last line"] = run.last_line()
    bad = [] if status in (0, *fault.status) else ["status"]
    if place == "had ended":
        bad.append("moment missed")
    bad += ["a traceback"] if "Traceback" in run.text() else []
    bad += ["processes are left"] if run.leftover() else []
    fault.mend(run, random_)
    return seen | {"bad": bad, "environment": environment}


def measure(folder: Path, workdirs: epath.Path, keys: Sequence[str], cell: str, seed: int) -> dict:
    """Makes one cell of runs with these keys; returns its row."""
    name, moment, number = cell.split("/")
    fault, random_ = FAULTS[name], random.Random(f"{seed} {cell}")
    label = cell.replace("/", "-")
    run = Run(workdirs / label / "run", folder / f"{label}.log", keys)
    run.workdir.parent.rmtree(missing_ok=True)
    run.workdir.parent.mkdir(parents=True)
    row = disturb(run, fault, moment, random_, folder / "chaos_eio.so")
    bad, environment, text = row.pop("bad"), row.pop("environment"), run.text()
    for _ in range(RESTARTS):
        run.start(**environment)
        if (status := run.finish()) != RESUMES:
            break
    after = run.text()[len(text) :]
    row["resumed"] = next(
        (line.split("resumed at ")[1] for line in after.splitlines() if "resumed at " in line),
        "nothing was left to do" if "finished already" in after else "from step 0",
    )
    with lock:
        bad += differences(run, workdirs / "straight") if status == 0 else [f"then {status}"]
    bad += ["then a traceback"] if "Traceback" in after else []
    lost = [what for what in bad if what in fault.loses]
    bad = [what for what in bad if what not in fault.loses]
    row["end"] = ", ".join(bad or ["identical", *(f"but {what}" for what in lost)])
    if fault.mounts:
        subprocess.run(["umount", run.workdir.parent], stderr=subprocess.DEVNULL)
    if not bad:
        (run.workdir.parent).rmtree()
    return {"fault": name, "moment": moment, "number": int(number)} | row


def table(rows: list[dict]) -> str:
    """Returns the outcomes as a Markdown table: a row for each fault, a column for each moment."""
    moments = [moment for moment in MOMENTS if any(row["moment"] == moment for row in rows)]
    lines = [f"| fault | {' | '.join(moments)} |", "|---" * (len(moments) + 1) + "|"]
    for name in FAULTS:
        cells = [
            "<br>".join(
                outcome(row) for row in rows if (row["fault"], row["moment"]) == (name, moment)
            )
            for moment in moments
        ]
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def outcome(row: dict) -> str:
    """Returns the status, the seconds until the process ended, and where the run resumed."""
    resumed = row["resumed"].split(" of ")[0]
    end = "" if row["end"] == "identical" else f", **{row['end']}**"
    return f"{row['status']}, {row['seconds']} s, {resumed}{end}"


def skip(
    why: str, faults: list[tuple[str, Fault]], which: Callable[[Fault], bool]
) -> list[tuple[str, Fault]]:
    """Returns the faults that can be made, and names the others."""
    if left := [name for name, fault in faults if which(fault)]:
        print(f"not run, for {why}:", *left)
    return [(name, fault) for name, fault in faults if not which(fault)]


def read_results(path: Path) -> dict[str, dict]:
    """Returns the rows of the cells that were made, by cell."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {f"{row['fault']}/{row['moment']}/{row['number']}": row for row in rows}


def main() -> int:
    """Makes the cells that are missing; returns the number of those that went wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--faults", default=",".join(FAULTS))
    parser.add_argument("--moments", default=",".join(MOMENTS))
    parser.add_argument("--task", choices=TASKS, default="classification")
    parser.add_argument("--count", type=int, default=1, help="cells of each fault and moment")
    parser.add_argument("--folder", default="runs/chaos", help="of results and logs")
    parser.add_argument("--workdirs", help="folder of the workdirs, default: the same")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time")
    arguments = parser.parse_args()
    folder = Path(arguments.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    workdirs, results = absolute(arguments.workdirs or folder), folder / "results.jsonl"
    library, source = folder / "chaos_eio.so", ROOT / "benchmarks" / "chaos_eio.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    keys = TASKS[arguments.task]
    if arguments.task == "segmentation":
        make_shapes(folder / "data")
        keys = (*keys, f"--config.data.dir={folder / 'data'}")
    straight = Run(workdirs / "straight", folder / "straight.log", keys)
    straight.start()
    assert straight.finish() == 0, straight.text()
    chosen = [(name, FAULTS[name]) for name in arguments.faults.split(",")]
    if is_bucket(workdirs):
        chosen = skip(
            "they are faults of disks", chosen, lambda x: x.disk or x.mounts or x.preloads
        )
    elif os.geteuid():
        chosen = skip("they mount disks", chosen, lambda x: x.mounts)
    cells = [
        f"{name}/{moment}/{number}"
        for number in range(arguments.count)
        for name, fault in chosen
        for moment in arguments.moments.split(",")
        if moment in fault.moments
    ]
    missing = [cell for cell in cells if cell not in read_results(results)]
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        made = [pool.submit(measure, folder, workdirs, keys, x, arguments.seed) for x in missing]
        for done in concurrent.futures.as_completed(made):
            row = done.result()
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(*row.values(), sep="  ", flush=True)
    rows = read_results(results)
    rows = {cell: rows[cell] for cell in cells}
    print(table(list(rows.values())))
    good = sum(row["end"].startswith("identical") for row in rows.values())
    print(f"{good} of {len(rows)} identical to the run that was not disturbed")
    return len(rows) - good


if __name__ == "__main__":
    # A shell's background jobs ignore some, and so would the processes that they start.
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    sys.exit(min(main(), 1))
