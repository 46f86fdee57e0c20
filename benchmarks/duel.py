"""Trains the same network to the end twice, by main.py and by timm in PyTorch, and compares them.

  python -m mambaout_jax.data.fractals --output=fractals --folders
  python benchmarks/duel.py --data=fractals --output=runs/duel --seeds 0 1 2
  python benchmarks/duel.py --config=configs/quickstart.py --output=runs/digits --seeds 0 1 2 3 4

Both sides follow one config: the network and its initialisation, the images, the augmentation, the
optimizer, the schedule, the loss. Each run is a process of its own, which has the GPU to itself,
and leaves OUTPUT/RUN.json; a finished run is not repeated, and an interrupted one of ours resumes.
Runs may be divided over several calls, and over several GPUs by CUDA_VISIBLE_DEVICES and --sides.

OUTPUT/table.md has final loss and top-1 of all runs so far, mean and standard error by side, the
differences from timm and whether they are within two standard errors; OUTPUT/curves.png the curves.
--fault trains ours with one deliberate mistake, which the comparison must notice to be worth
anything.
"""

import argparse
import contextlib
import csv
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import duel_report

from mambaout_jax import config as configuration
from mambaout_jax.build_data import build_dataset
from mambaout_jax.data.sources import open_source

ROOT = Path(__file__).resolve().parents[1]
# Deliberate mistakes that are a key of the config; duel_fault.py makes the others.
CONFIG_FAULTS = {
    "no_erasing": {"augment.random_erasing": 0.0},
    "one_mixing_draw": {"augment.mixup_group": 0},
}
CODE_FAULTS = ("tanh_gelu", "same_padding")


def parse() -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", default="configs/fractals.py")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs and results")
    parser.add_argument("--data", default="", help="folder of train/CLASS and validation/CLASS")
    parser.add_argument("--sides", nargs="*", default=["ours", "timm"], choices=["ours", "timm"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the computation")
    parser.add_argument("--fault", choices=[*CONFIG_FAULTS, *CODE_FAULTS], help="of our side")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--warmup", type=int, help="epochs")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--eval-every", type=int, default=1, help="epochs")
    parser.add_argument(
        "--workers", type=int, default=-1, help="processes that load; -1: the cores"
    )
    parser.add_argument("--limit", type=float, help="seconds; a run that may take longer is left")
    options = parser.parse_args()
    if options.fault and options.sides != ["ours"]:
        parser.error("--fault is for --sides ours alone")
    return options


def changed_keys(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what the options change in the config, by dotted keys."""
    keys: dict[str, Any] = {"eval.every": f"{options.eval_every} epochs"}
    keys["data.workers"] = options.workers
    if options.data:
        keys |= {"data.source": "folder", "data.dir": os.path.abspath(options.data)}
    for key, value in (
        ("model.dtype", options.dtype),
        ("schedule.duration", options.epochs and f"{options.epochs} epochs"),
        ("schedule.warmup", options.warmup and f"{options.warmup} epochs"),
        ("data.image_size", options.image_size),
        ("batch_size", options.batch_size),
        ("schedule.learning_rate", options.learning_rate),
    ):
        if value is not None:
            keys[key] = value
    return keys | CONFIG_FAULTS.get(options.fault, {})


def our_command(options: argparse.Namespace, keys: dict[str, Any], workdir: Path) -> list[str]:
    """Returns the command of a run of ours."""
    code = ["main.py"]
    if options.fault in CODE_FAULTS:
        code = ["benchmarks/duel_fault.py", options.fault]
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    return [sys.executable, *code, f"--config={options.config}", f"--workdir={workdir}", *flags]


def timm_command(config: dict[str, Any], workdir: Path) -> list[str]:
    """Returns the command of a run of timm's, which follows a config in a file."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(config, indent=2))
    return [sys.executable, "benchmarks/duel_timm.py", os.fspath(workdir)]


def write_folders(config: Any, folder: Path) -> None:
    """Writes a prepared dataset as class folders, which timm reads."""
    dataset = build_dataset(config)
    for split in (dataset.train_split, dataset.eval_split):
        source = open_source(dataset, split)
        for name in source.class_names:
            (folder / split / name).mkdir(parents=True, exist_ok=True)
        for index in range(len(source)):
            record = source[index]
            name = source.class_names[record["label"]]
            (folder / split / name / f"{index:05d}.png").write_bytes(record["image"])


def run(options: argparse.Namespace, side: str, seed: int, keys: dict[str, Any]) -> dict[str, Any]:
    """Trains once, and returns the result."""
    keys = keys | {"seed": seed}
    config = configuration.load_config(options.config)
    config.update_from_flattened_dict(keys)
    configuration.check(config)
    workdir = (options.output / run_name(side, config, options.fault, seed)).absolute()
    if side == "ours":
        command = our_command(options, keys, workdir)
    else:
        flat = configuration.flatten(config)
        if not options.data:
            flat["data.dir"] = os.fspath(options.output.absolute() / "folders")
            if not Path(flat["data.dir"]).exists():
                write_folders(config, Path(flat["data.dir"]))
        command = timm_command(flat, workdir)
    start = time.monotonic()
    with workdir.with_suffix(".log").open("a") as log:
        done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=False)
    if done.returncode:
        tail = workdir.with_suffix(".log").read_text()[-3000:]
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{tail}")
    rows = list(csv.DictReader((workdir / "metrics.csv").read_text().splitlines()))
    return {
        "side": side,
        "seed": seed,
        "dtype": config.model.dtype,
        "fault": options.fault or "",
        "seconds": round(time.monotonic() - start, 1),
        "device": device_name(),
        "versions": versions(),
        "command": command,
        "rows": [
            {key: float(row[key]) for key in ("epoch", "train_loss", "eval_loss", "top1")}
            for row in rows
        ],
    }


def run_name(side: str, config: Any, fault: str | None, seed: int) -> str:
    """Returns what the files of a run are called."""
    return "-".join([side, config.model.dtype, *([fault] if fault else []), f"seed{seed}"])


def versions() -> dict[str, str]:
    """Returns the versions of the libraries that the sides use, of those that are installed."""
    found = {}
    for package in ("jax", "timm", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def device_name() -> str:
    """Returns the GPU's name, or the processor's where there is none."""
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[
            0
        ]
    except (OSError, subprocess.CalledProcessError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "CPU")


def main() -> None:
    """Trains what is not yet trained, and compares."""
    options, started = parse(), time.monotonic()
    options.output.mkdir(parents=True, exist_ok=True)
    keys = changed_keys(options)
    config = configuration.load_config(options.config)
    config.update_from_flattened_dict(keys)
    for seed in options.seeds:
        for side in options.sides:
            path = options.output / f"{run_name(side, config, options.fault, seed)}.json"
            if path.exists():
                continue
            taken = [r["seconds"] for r in duel_report.read(options.output) if r["side"] == side]
            longest = time.monotonic() - started + max(taken, default=0)
            if options.limit and longest > options.limit:
                print(f"left for the next call: {path.stem}", flush=True)
                continue
            result = run(options, side, seed, keys)
            path.write_text(json.dumps(result, indent=1))
            last = result["rows"][-1]
            print(f"{path.stem}: {last} in {result['seconds']} s", flush=True)
    print(duel_report.write(options.output))


if __name__ == "__main__":
    main()
