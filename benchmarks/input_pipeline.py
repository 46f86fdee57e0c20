"""Images per second of the training pipeline, by workers, and compared to timm's loader.

Every run reads the same folder of 500x375 JPEGs in processes of its own: random-resized crop to
224, flip, and RandAugment where the row says so. What follows on the accelerator (normalisation,
erasing, mixing) is not part of it. Wall time depends on what else the machine does; processor time
per image (user and system, of the loader and its workers) depends on it less.

  python benchmarks/input_pipeline.py --scaling --workers 0 1 14 16 --batch=256

prints a row for each number of worker processes, 0 for threads of one process, -1 for the default.
Its first row is one thread, which the ratios of processor time refer to.

  python -m venv /tmp/timm && /tmp/timm/bin/pip install timm torch torchvision
  python benchmarks/input_pipeline.py --timm_python=/tmp/timm/bin/python --workers 1 2

runs both loaders in turns on the same cores. "ours" makes its images in as many threads as timm has
worker processes, "ours+processes" in worker processes too, "ours+pillow" in threads without the
extra `fast`. `--memory` follows the resident memory of one of ours instead.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_RECIPE = "rand-m9-mstd0.5-inc1"
_POLICIES = (_RECIPE, "")
_SIDES = ("ours", "ours+processes", "ours+pillow", "timm")
_NAMES = 32  # of each image
_WARM_UP = 6  # batches


def write_images(directory: Path, count: int) -> None:
    """Writes `count` JPEGs of 500x375 with detail at every scale, about 95 kB each.

    Each has further names by links: an epoch is longer than what is timed, because timm's workers
    wait for each other at its end.
    """
    folder = directory / "train" / "class"
    folder.mkdir(parents=True)
    for number in range(count):
        noise = np.random.RandomState(number)
        pixels = np.full((375, 500, 3), 128.0)
        for cells, amplitude in ((8, 60), (32, 40), (120, 25), (375, 10)):
            coarse = noise.standard_normal((cells, cells * 4 // 3, 3)) * amplitude + 128
            image = Image.fromarray(coarse.clip(0, 255).astype(np.uint8))
            pixels += np.asarray(image.resize((500, 375), Image.Resampling.BICUBIC)) - 128.0
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        path = folder / f"{number:05d}.JPEG"
        path.write_bytes(file.getvalue())
        for copy in range(1, _NAMES):
            (folder / f"{number:05d}_{copy}.JPEG").hardlink_to(path)


def our_batches(options: argparse.Namespace, policy: str) -> Any:
    """Returns our training batches, endless."""
    from configs import default
    from mambaout_jax.build_data import build_train_batches

    config = default.get_config()
    config.data.update(source="folder", dir=options.directory, num_classes=1)
    config.data.workers, config.data.threads = 0, options.workers[0]
    if options.run == "ours+processes":
        config.data.workers, config.data.threads = options.workers[0], options.threads
    config.data.backend = "pillow" if options.run == "ours+pillow" else "fast"
    config.augment.policy = policy
    config.batch_size = options.batch
    return build_train_batches(config)


def timm_batches(options: argparse.Namespace, policy: str) -> Any:
    """Yields the uint8 batches of timm's loader, endlessly, before they go to the device."""
    import torch
    from PIL import ImageOps
    from timm.data import auto_augment, create_dataset, create_loader

    def posterize(image, bits_to_keep, **_):  # Pillow 12 and later refuse zero bits
        return ImageOps.posterize(image, max(bits_to_keep, 1))

    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize
    torch.set_num_threads(1)
    loader = create_loader(
        create_dataset("", root=options.directory, split="train", is_training=True),
        input_size=(3, 224, 224),
        batch_size=options.batch,
        is_training=True,
        use_prefetcher=True,
        num_workers=options.workers[0],
        persistent_workers=True,
        color_jitter=None,
        auto_augment=policy or None,
        interpolation="random",
        device=torch.device("cpu"),
    )
    while True:
        yield from loader.loader  # the DataLoader under timm's transfer to the device


def processor_seconds() -> float:
    """Returns user and system time of this process and its living children (Linux)."""
    ticks = 0
    for pid in (os.getpid(), *_children()):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def resident_mib() -> float:
    """Returns the memory of this process and its living children, in MiB (Linux).

    Memory that several of them share counts once.
    """
    kib = 0
    for pid in (os.getpid(), *_children()):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            kib += int(line.split()[1]) if line.startswith("Pss:") else 0
    return kib / 1024


def _children() -> list[int]:
    tasks = Path("/proc/self/task").iterdir()
    return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]


def measure(batches, images: int, batch: int) -> dict[str, float]:
    """Returns images per second, processor time per image and memory, after a warm-up."""
    for _ in range(_WARM_UP):
        next(batches)
    steps = -(-images // batch)
    wall, processor = time.monotonic(), processor_seconds()
    for _ in range(steps):
        next(batches)
    wall, processor = time.monotonic() - wall, processor_seconds() - processor
    return {
        "rate": steps * batch / wall,
        "cpu_ms": processor / (steps * batch) * 1e3,
        "mib": resident_mib(),
    }


def follow_memory(batches, images: int, batch: int) -> None:
    """Prints the memory while images are made."""
    steps = images // batch
    for step in range(steps + 1):
        next(batches)
        if step % max(steps // 20, 1) == 0:
            print(f"{step * batch:7d} images  {resident_mib():8.1f} MiB", flush=True)


def run_side(
    options: argparse.Namespace, side: str, workers: int, threads: int, images: int
) -> Any:
    """Runs one side in a process of its own and returns its measurements by policy."""
    python = options.timm_python if side == "timm" else sys.executable
    command = [python, __file__, f"--directory={options.directory}", f"--run={side}"]
    command += [f"--workers={workers}", f"--threads={threads}", f"--batch={options.batch}"]
    command += [f"--images={images}", "--policies", *options.policies]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(output.stdout.splitlines()[-1])


def compare(options: argparse.Namespace) -> None:
    """Runs all sides in turns, and prints the medians."""
    print(f"{'policy':22s} {'workers':>7s} {'side':18s} {'images/s':>9s} {'CPU ms/image':>13s}")
    for workers in options.workers:
        runs: dict[tuple[str, str], list[dict]] = {}
        for _ in range(options.rounds):
            for side in options.sides:
                results = run_side(options, side, workers, options.threads, options.images)
                for policy, result in results.items():
                    runs.setdefault((policy, side), []).append(result)
        for policy in options.policies:
            for side in options.sides:
                results = runs[policy, side]
                rate = statistics.median(result["rate"] for result in results)
                cpu = statistics.median(result["cpu_ms"] for result in results)
                label = policy or "none"
                print(f"{label:22s} {workers:7d} {side:18s} {rate:9.0f} {cpu:13.2f}", flush=True)


def scale(options: argparse.Namespace) -> None:
    """Prints a row for each number of workers."""
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores, {options.images} images a row, batches of {options.batch}")
    print("policy                 processes threads images/s CPU ms/image  ratio      MiB")
    first: dict[str, float] = {}
    rows = [("ours", 0, 1), *((("ours+processes" if n else "ours"), n, 0) for n in options.workers)]
    for side, workers, threads in rows:
        threads = threads or (options.threads if workers else cores)
        images = options.images if len(first) else max(options.images // cores, 1024)
        count = workers if workers else threads
        for policy, result in run_side(options, side, count, threads, images).items():
            cpu = result["cpu_ms"]
            ratio = cpu / first.setdefault(policy, cpu)
            print(
                f"{policy or 'none':22s} {workers:9d} {threads:7d} {result['rate']:8.0f} "
                f"{cpu:12.3f} {ratio:6.2f} {result['mib']:8.0f}",
                flush=True,
            )


def open_batches(options: argparse.Namespace, policy: str) -> Any:
    """Returns the batches of the side that the options name, ours by default."""
    return timm_batches(options, policy) if options.run == "timm" else our_batches(options, policy)


def run_one(options: argparse.Namespace) -> None:
    """Runs one side in this process."""
    if options.memory:
        batches = open_batches(options, options.policies[0])
        follow_memory(batches, options.images, options.batch)
        batches.close()
        return
    results = {}
    for policy in options.policies:
        batches = open_batches(options, policy)
        results[policy] = measure(batches, options.images, options.batch)
        batches.close()
    print(json.dumps(results))


def main() -> None:
    """Compares both sides, prints the table of workers, or runs one side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--timm_python", default="python", help="of an environment with timm")
    parser.add_argument("--sides", nargs="+", default=_SIDES)
    parser.add_argument("--scaling", action="store_true", help="print a row for each --workers")
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--threads", type=int, default=1, help="of each worker process")
    parser.add_argument("--policies", nargs="+", default=_POLICIES)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1024, help="timed in a run")
    parser.add_argument("--files", type=int, default=512, help="images written to the folder")
    parser.add_argument("--memory", action="store_true", help="follow the memory of --run instead")
    parser.add_argument("--directory", default="", help="of the images; made if absent")
    parser.add_argument("--run", default="", help="one side, in this process")
    options = parser.parse_args()
    sys.path.insert(0, os.fspath(Path(__file__).parents[1]))
    with tempfile.TemporaryDirectory() as temporary:
        options.directory = options.directory or temporary
        if not (Path(options.directory) / "train").exists():
            write_images(Path(options.directory), options.files)
        if options.memory or options.run:
            run_one(options)
        elif options.scaling:
            scale(options)
        else:
            compare(options)


if __name__ == "__main__":
    main()
