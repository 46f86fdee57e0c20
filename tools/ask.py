"""Does an SSM help on these images? Trains each network under one recipe, and compares them.

    python tools/ask.py --mixers=conv,conv_ssm,none --seeds=3 --budget="30 epochs" --output=runs/ask

Every combination of network, image size and seed is one run of main.py with the same config, except
for the keys that the combination sets. The same command again continues where it was stopped, and
trains nothing twice. In --output stand each run's workdir, log and result, table.md, and the images
accuracy_over_macs.png, accuracy_over_tokens.png and full_against_causal.png. Further keys of the
config, for all runs: --config.model.name=mambaout_femto and so on.

--jobs=4 trains four runs at a time; images/s are then those of a machine that four share. On a GPU,
set XLA_PYTHON_CLIENT_PREALLOCATE=false for that.

Exit codes: 0 all runs are finished; 1 a run cannot be trained; 75 a run was stopped and saved.
"""

import argparse
import concurrent.futures
import csv
import json
import re
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ask_report

from mambaout_jax import config as configuration
from mambaout_jax.config import duration_steps
from mambaout_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
RESUME = 75  # main.py's exit code for a run that is saved

# Keys that the combinations set, and the options for them.
OWN_KEYS = {
    "data.image_size": "--resolutions",
    "model.attention": "--attention",
    "model.token_mixer": "--mixers",
    "schedule.duration": "--budget",
    "seed": "--seeds",
}


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Returns the options, and the keys of --config.key=value."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", default="configs/quickstart.py", help="the recipe")
    parser.add_argument(
        "--data", default="", help="folder of split/class/image; default: the config's data"
    )
    parser.add_argument(
        "--mixers",
        default="conv,conv_ssm,none",
        help="token mixers; those of four stages are joined by +: conv+conv+conv_ssm+conv_ssm",
    )
    parser.add_argument(
        "--attention", default="", help="ViTs beside them: full, causal or full,causal"
    )
    parser.add_argument("--vit", default="vit_tiny_patch16_224", help="which ViT")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each combination")
    parser.add_argument(
        "--resolutions", default="", help="image sizes in pixels; default: the config's"
    )
    parser.add_argument("--budget", default="30 epochs", help="duration of each run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--output", type=Path, default=Path("runs/ask"))
    options, rest = parser.parse_known_args(argv)
    keys = {}
    for argument in rest:
        match = re.fullmatch(r"--config\.([^=]+)=(.*)", argument)
        if not match:
            raise UserError(f"unknown argument {argument!r}: expected --config.KEY=VALUE")
        keys[match[1]] = match[2]
    configuration.check_command_line([f"--config={options.config}", *rest])
    for key, option in OWN_KEYS.items():
        if key in keys:
            raise UserError(f"--config.{key} differs between the runs: use {option}")
    for option in ("seeds", "jobs"):
        if (number := getattr(options, option)) < 1:
            raise UserError(f"--{option} is {number}: expected at least 1")
    return options, keys


def networks(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Returns the config's keys of each network, by its name in the table."""
    mixers = [name for name in options.mixers.split(",") if name]
    found: dict[str, dict[str, Any]] = {
        name: {"model.token_mixer": name.replace("+", ",")} for name in mixers
    }
    for attention in filter(None, options.attention.split(",")):
        found[f"ViT-{attention}"] = {"model.name": options.vit, "model.attention": attention}
    return found


def data_keys(folder: str) -> dict[str, Any]:
    """Returns the config's keys of a folder of split/class/image.

    Raises:
        UserError: it has no classes.
    """
    if not folder:
        return {}
    classes = [path for path in (Path(folder) / "train").glob("*") if path.is_dir()]
    if not classes:
        raise UserError(f"no classes in {folder}: expected {folder}/train/CLASS/IMAGE")
    return {"data.source": "folder", "data.dir": folder, "data.num_classes": len(classes)}


def recipe_keys(options: argparse.Namespace) -> dict[str, Any]:
    """Returns the keys of the budget: a cosine over all of it, its first tenth warmup."""
    try:
        duration_steps(options.budget, steps_per_epoch=1, batch_size=1)
    except UserError as error:
        raise UserError(f"--budget: {error}") from None
    number, unit = options.budget.replace("_", "").split()
    return {
        "schedule.duration": options.budget,
        "schedule.warmup": f"{float(number) / 10:g} {unit}",
        "schedule.cooldown": "",
        "schedule.per": "step",
    }


def plan(options: argparse.Namespace, given: dict[str, str]) -> list[dict[str, Any]]:
    """Returns the runs: network, size, seed and the config's keys. First all of the first seed."""
    shared = {**recipe_keys(options), **data_keys(options.data), **given}
    sizes = [size for size in options.resolutions.split(",") if size]
    if not sizes:
        sizes = [str(configuration.load_config(options.config).data.image_size)]
    if bad := [size for size in sizes if not size.isdecimal()]:
        raise UserError(f"--resolutions has {bad[0]!r}: expected pixels, such as 32,64")
    return [
        {
            "network": name,
            "size": int(size),
            "seed": seed,
            "keys": {**shared, **keys, "data.image_size": int(size), "seed": seed},
        }
        for seed in range(options.seeds)
        for size in sizes
        for name, keys in networks(options).items()
    ]


def count(config_file: str, keys: dict[str, Any]) -> dict[str, int]:
    """Returns the parameters and MACs of a run's network, its tokens L and their width D.

    Raises:
        UserError: the config has no such network.
    """
    import jax

    from mambaout_jax.build import build_model
    from mambaout_jax.models.flops import count_total
    from mambaout_jax.models.mambaout import MambaOut
    from mambaout_jax.models.vit import PATCH

    jax.config.update("jax_platforms", "cpu")  # the accelerator is for the runs
    config = configuration.load_config(config_file)
    config.unlock()
    for key, value in keys.items():
        kind = type(configuration.flatten(config)[key])
        config.update_from_flattened_dict({key: kind(value)})
    size = config.data.image_size
    model = build_model(config)
    if isinstance(model, MambaOut):
        model = model.clone(depthwise="xla")
    # Of MambaOut, those of stage 3: its stride is that of a ViT's patches.
    width = model.widths[2] if isinstance(model, MambaOut) else model.width
    total = count_total(model, (size, size, 3))
    tokens = (-(-size // PATCH)) ** 2
    return {"params": total.params, "macs": total.macs, "tokens": tokens, "width": width}


def train(options: argparse.Namespace, run: dict[str, Any]) -> dict[str, Any] | int:
    """Trains one run by main.py, or reads its result; returns main.py's exit code if not 0."""
    name = f"{run['network']}-{run['size']}-seed{run['seed']}"
    folder = options.output / name
    result, log = options.output / f"{name}.json", options.output / f"{name}.log"
    if result.exists():
        known = json.loads(result.read_text())
        if known["keys"] == run["keys"]:
            return {**run, **known}
        raise UserError(f"{result} is of a run with other keys: choose another --output")
    figures = count(options.config, run["keys"])  # a bad combination ends before it trains
    print(f"training {name}", flush=True)
    command = [sys.executable, str(ROOT / "main.py"), f"--config={options.config}"]
    command += [f"--workdir={folder}"]
    command += [f"--config.{key}={value}" for key, value in run["keys"].items()]
    options.output.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        code = subprocess.run(command, stderr=file, stdout=file, check=False).returncode
    lines = log.read_text().splitlines()
    if code:
        print(f"{name} ended with exit code {code}: {lines[-1] if lines else ''}", file=sys.stderr)
        return code
    with (folder / "metrics.csv").open() as file:
        top1 = float(list(csv.DictReader(file))[-1]["top1"])
    # The first figures are of steps that wait for the compilation.
    text = "\n".join(lines)
    rates = [float(rate.replace(",", "")) for rate in re.findall(r"([\d,]+) images/s", text)]
    speed = statistics.median(rates[1:]) if len(rates) > 1 else None
    measured = {"keys": run["keys"], "top1": top1, "images_per_s": speed, **figures}
    result.write_text(json.dumps(measured, indent=1))
    return {**run, **measured}


def main(argv: list[str]) -> int:
    """Trains all runs, and reports after each."""
    options, given = parse_arguments(argv)
    results, failed = [], threading.Event()

    def train_next(run: dict[str, Any]) -> dict[str, Any] | int:
        if failed.is_set():
            return RESUME
        try:
            done = train(options, run)
        except BaseException:
            failed.set()
            raise
        if isinstance(done, int):
            failed.set()
        return done

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        for done in pool.map(train_next, plan(options, given)):
            if isinstance(done, int):
                return RESUME if done in (RESUME, 130) else 1
            results.append(done)
            ask_report.write(results, options.output)
    print((options.output / "table.md").read_text(), end="")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
