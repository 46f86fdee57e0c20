"""Training runs on one GPU, from files to the loss: ours beside timm's, and what bounds them.

  python benchmarks/whole_run.py --models mambaout_femto mambaout_tiny --workers=14

makes a folder of 500x375 JPEGs, and runs for each model, one after the other on the same machine:

- `step`: our bare update, with inputs on the GPU (benchmarks/gpu_step.py);
- `synthetic`: main.py with random images from memory, which shows what the loop loses;
- `loader`: our loader alone, which makes the images of the next row (benchmarks/input_pipeline.py);
- `files`: main.py with the paper's recipe from the files;
- `timm`: timm's loader with the same recipe and mixing, and its network under torch.compile, with
  channels last, autocast to bfloat16 and fused AdamW, from the same files by as many workers.

Prints images/s and the ratios to `step` and to `timm`. For main.py the figure is the median of its
log lines without the first ones, and the shares of time are those of the last line. Logs are kept
in --output.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from input_pipeline import write_images

from mambaout_jax import config as configuration

ROOT = Path(__file__).resolve().parents[1]
LOG_EVERY, SKIPPED = 25, 4  # steps; log lines, while queues fill
LINE = re.compile(r"step +\d+/\d+: .* ([\d,]+) images/s, (data wait .*), \d+:\d+ left")


def config_keys(options: argparse.Namespace, model: str, source: str) -> dict[str, Any]:
    """Returns the keys of a run, by dotted name."""
    keys: dict[str, Any] = {
        "model.name": model,
        "batch_size": options.batch,
        "data.workers": options.workers,
        "schedule.duration": f"{options.steps} steps",
        "schedule.warmup": f"{options.steps // 10} steps",
        "schedule.cooldown": "",
        "schedule.per": "step",
        "schedule.learning_rate": 1e-4,
        "eval.every": f"{options.steps} steps",
        "checkpoint.every": f"{options.steps} steps",
        "log.every": f"{LOG_EVERY} steps",
    }
    if source == "synthetic":
        return keys | {"data.source": "synthetic", "data.eval_split": "256"}
    folder = {"data.source": "folder", "data.dir": os.path.abspath(options.directory)}
    return keys | folder | {"data.num_classes": 1, "data.eval_split": "validation"}


def make_data(directory: Path, files: int) -> None:
    """Writes the images of a run, and one for its evaluation."""
    write_images(directory, files)
    held_out = directory / "validation" / "class"
    held_out.mkdir(parents=True)
    (held_out / "image.jpg").hardlink_to(next((directory / "train" / "class").iterdir()))


def recipe(model: str) -> str:
    """Returns the config of a model's recipe."""
    return f"configs/{model.removeprefix('mambaout_')}.py"


def run(command: list[str], log: Path) -> str:
    """Runs a command, and returns what it printed, which `log` keeps."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    log.write_text(done.stdout + done.stderr)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout + done.stderr


def our_run(options: argparse.Namespace, model: str, source: str) -> tuple[float, str]:
    """Returns images/s of main.py, and the shares of its time in the last line of its log."""
    workdir = options.output / f"{model}-{source}"
    flags = [f"--config.{k}={v}" for k, v in config_keys(options, model, source).items()]
    command = [sys.executable, "main.py", f"--config={recipe(model)}", f"--workdir={workdir}"]
    text = run(command + flags, workdir.with_suffix(".log"))
    found = LINE.findall(text)[SKIPPED:]
    return statistics.median(float(rate.replace(",", "")) for rate, _ in found), found[-1][1]


def bare_step(options: argparse.Namespace, model: str) -> float:
    """Returns images/s of our update alone."""
    job = json.dumps(["ours", model, (options.batch, 224, 224), "train", "auto"])
    command = [sys.executable, "benchmarks/gpu_step.py", "--measure", job]
    text = run(command, options.output / f"{model}-step.log")
    return json.loads(next(line for line in text.splitlines() if line.startswith("{")))["rate"]


def loader(options: argparse.Namespace) -> float:
    """Returns images/s of our loader alone, by as many workers as the runs have."""
    policy = configuration.load_config(ROOT / "configs/tiny.py").augment.policy
    command = [sys.executable, "benchmarks/input_pipeline.py", "--run=ours+processes"]
    command += [f"--directory={options.directory}", f"--workers={options.workers}", "--threads=4"]
    command += [f"--batch={options.batch}", f"--images={100 * options.batch}"]
    text = run([*command, "--policies", policy], options.output / "loader.log")
    return json.loads(next(line for line in text.splitlines() if line.startswith("{")))[policy][
        "rate"
    ]


def timm_run(options: argparse.Namespace, model: str) -> float:
    """Returns images/s of timm's loader, network and optimizer, after a warm-up."""
    command = [sys.executable, __file__, *sys.argv[1:], "--timm_side", model]
    text = run(command, options.output / f"{model}-timm.log")
    return float(text.split()[-1])


def timm_side(options: argparse.Namespace, model: str) -> None:
    """Trains with timm in this process, and prints images/s as the last word."""
    import timm
    import torch
    from duel_timm import SoftTargetCrossEntropy, create_optimizer_v2, train_loader

    config = configuration.load_config(ROOT / recipe(model))
    config.update_from_flattened_dict(config_keys(options, model, "files"))
    device = torch.device("cuda")
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    loader = train_loader(configuration.flatten(config), device, options.workers)
    network = timm.create_model(model, num_classes=1, drop_path_rate=config.model.drop_path_rate)
    network = network.to(device, memory_format=torch.channels_last)
    rate, decay = config.schedule.learning_rate, config.optimizer.weight_decay
    optimizer = create_optimizer_v2(network, "adamw", lr=rate, weight_decay=decay, fused=True)
    compiled, loss_fn, step, start = torch.compile(network), SoftTargetCrossEntropy(), 0, 0.0
    warm_up = LOG_EVERY * SKIPPED
    while step < options.steps:
        for images, targets in loader:
            with torch.autocast("cuda", torch.bfloat16):
                logits = compiled(images.contiguous(memory_format=torch.channels_last))
                loss = loss_fn(logits, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step == warm_up:
                torch.cuda.synchronize()
                start = time.perf_counter()
            if step == options.steps:
                break
    torch.cuda.synchronize()
    print((step - warm_up) * options.batch / (time.perf_counter() - start))


def main() -> None:
    """Runs everything for each model, and prints a row for each run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--models", nargs="+", default=["mambaout_femto", "mambaout_tiny"])
    parser.add_argument("--rows", nargs="+", default=["step", "synthetic", "files", "timm"])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--files", type=int, default=1000, help="images written to the folder")
    parser.add_argument("--output", type=Path, default=Path("runs/whole_run"))
    parser.add_argument("--directory", default="", help="of the images; made in --output if absent")
    parser.add_argument("--timm_side", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps <= LOG_EVERY * SKIPPED:
        parser.error(f"--steps is {options.steps}: the first {LOG_EVERY * SKIPPED} are not counted")
    options.output = options.output.absolute()
    options.directory = options.directory or os.fspath(options.output / "images")
    if options.timm_side:
        return timm_side(options, options.timm_side)
    options.output.mkdir(parents=True, exist_ok=True)
    if not Path(options.directory).exists():
        make_data(Path(options.directory), options.files)
    if "files" in options.rows:
        print(f"loader alone, {options.workers} workers: {loader(options):,.0f} images/s")
    print(f"{'model':16} {'run':10} {'images/s':>9} {'of step':>8} {'of timm':>8}")
    for model in options.models:
        rates, shares = {}, {}
        for row in [row for row in ("step", "timm", "synthetic", "files") if row in options.rows]:
            if row == "step":
                rates[row] = bare_step(options, model)
            elif row == "timm":
                rates[row] = timm_run(options, model)
            else:
                rates[row], shares[row] = our_run(options, model, row)
            of = [rates[row] / rates[base] if base in rates else 0 for base in ("step", "timm")]
            ratios = " ".join(f"{ratio:8.2f}" if ratio else f"{'':8}" for ratio in of)
            print(
                f"{model:16} {row:10} {rates[row]:9,.0f} {ratios}  {shares.get(row, '')}",
                flush=True,
            )
    return None


if __name__ == "__main__":
    main()
