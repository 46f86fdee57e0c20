"""Pictures a second that the training pipeline makes on the host, beside timm's own loader.

Both sides read the same folder of 500x375 JPEGs, in processes of their own that take turns on the
same cores: random-resized crop to 224, flip, and RandAugment where the row says so. What either
does on the accelerator (normalisation, erasing, ours also mixing) is left out. timm runs in an
environment of its own:

  python -m venv /tmp/timm && /tmp/timm/bin/pip install timm torch torchvision
  python benchmarks/input_pipeline.py --timm_python=/tmp/timm/bin/python

"ours" makes its pictures in as many threads as timm has worker processes, "ours+processes" in
worker processes too, "ours+pillow" in threads without the extra `fast`. Wall time depends on what
else the machine does; processor time (user and system, of the loader and its workers) a picture
does less. `--memory` follows the resident memory of our side instead.
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

import numpy as np
from PIL import Image

_POLICIES = ("rand-m9-mstd0.5-inc1", "")
_SIDES = ("ours", "ours+processes", "ours+pillow", "timm")
_NAMES = 32  # of each picture
_WARM_UP = 6  # batches


def write_pictures(directory: Path, count: int) -> None:
    """Writes `count` JPEGs of 500x375 with detail at every scale, some 95 kB each.

    Each is linked under further names: an epoch is longer than what is timed, since timm's workers
    wait for each other at its end.
    """
    folder = directory / "train" / "class"
    folder.mkdir(parents=True)
    for number in range(count):
        noise = np.random.RandomState(number)
        picture = np.full((375, 500, 3), 128.0)
        for cells, amplitude in ((8, 60), (32, 40), (120, 25), (375, 10)):
            coarse = noise.standard_normal((cells, cells * 4 // 3, 3)) * amplitude + 128
            coarse = Image.fromarray(coarse.clip(0, 255).astype(np.uint8))
            picture += np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)) - 128.0
        file = io.BytesIO()
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        path = folder / f"{number:05d}.JPEG"
        path.write_bytes(file.getvalue())
        for copy in range(1, _NAMES):
            (folder / f"{number:05d}_{copy}.JPEG").hardlink_to(path)


def our_batches(options: argparse.Namespace, policy: str):
    """Yields our training batches, endlessly."""
    from configs import default
    from mambaout_jax.build import build_train_batches

    config = default.get_config()
    config.data.update(source="folder", dir=options.directory, num_classes=1)
    config.data.workers, config.data.threads = 0, options.workers[0]
    if options.run == "ours+processes":
        config.data.workers, config.data.threads = options.workers[0], options.threads
    config.data.backend = "pillow" if options.run == "ours+pillow" else "fast"
    config.augment.policy = policy
    config.batch_size = options.batch
    yield from build_train_batches(config)


def timm_batches(options: argparse.Namespace, policy: str):
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
    """Returns the resident memory of this process and its living children, in MiB (Linux)."""
    pids = (os.getpid(), *_children())
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _children() -> list[int]:
    tasks = Path("/proc/self/task").iterdir()
    return [int(pid) for task in tasks for pid in (task / "children").read_text().split()]


def measure(batches, images: int, batch: int) -> dict[str, float]:
    """Returns pictures a second and processor milliseconds a picture, after a warm-up."""
    for _ in range(_WARM_UP):
        next(batches)
    steps = -(-images // batch)
    wall, processor = time.monotonic(), processor_seconds()
    for _ in range(steps):
        next(batches)
    wall, processor = time.monotonic() - wall, processor_seconds() - processor
    return {"rate": steps * batch / wall, "cpu_ms": processor / (steps * batch) * 1e3}


def follow_memory(batches, images: int, batch: int) -> None:
    """Prints the resident memory as pictures go by."""
    steps = images // batch
    for step in range(steps + 1):
        next(batches)
        if step % max(steps // 20, 1) == 0:
            print(f"{step * batch:7d} pictures  {resident_mib():8.1f} MiB", flush=True)


def compare(options: argparse.Namespace) -> None:
    """Runs both sides in turns, and prints the medians."""
    print(f"{'policy':22s} {'workers':>7s} {'side':18s} {'images/s':>9s} {'CPU ms/image':>13s}")
    for workers in options.workers:
        runs: dict[tuple[str, str], list[dict]] = {}
        for _ in range(options.rounds):
            for side in options.sides:
                python = options.timm_python if side == "timm" else sys.executable
                command = [python, __file__, f"--directory={options.directory}", f"--run={side}"]
                command += [f"--workers={workers}", f"--threads={options.threads}"]
                command += [f"--batch={options.batch}", f"--images={options.images}"]
                output = subprocess.run(command, capture_output=True, text=True, check=True)
                for policy, result in json.loads(output.stdout.splitlines()[-1]).items():
                    runs.setdefault((policy, side), []).append(result)
        for policy in _POLICIES:
            for side in options.sides:
                results = runs[policy, side]
                rate = statistics.median(result["rate"] for result in results)
                cpu = statistics.median(result["cpu_ms"] for result in results)
                label = policy or "none"
                print(f"{label:22s} {workers:7d} {side:18s} {rate:9.0f} {cpu:13.2f}", flush=True)


def open_batches(options: argparse.Namespace, policy: str):
    """Returns the batches of the side that the options name, ours if none."""
    return timm_batches(options, policy) if options.run == "timm" else our_batches(options, policy)


def main() -> None:
    """Compares both sides, or runs the one that the parent process asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--timm_python", default="python", help="of an environment with timm")
    parser.add_argument("--sides", nargs="+", default=_SIDES)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--threads", type=int, default=1, help='a process of "ours+processes"')
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1024, help="timed in a run")
    parser.add_argument("--pictures", type=int, default=512, help="written to the folder")
    parser.add_argument("--memory", action="store_true", help="follow our memory instead")
    parser.add_argument("--directory", default="", help="of the pictures; made if absent")
    parser.add_argument("--run", default="", help="one side, in this process")
    options = parser.parse_args()
    sys.path.insert(0, os.fspath(Path(__file__).parents[1]))
    with tempfile.TemporaryDirectory() as temporary:
        options.directory = options.directory or temporary
        if not (Path(options.directory) / "train").exists():
            write_pictures(Path(options.directory), options.pictures)
        if options.memory:
            batches = open_batches(options, _POLICIES[0])
            follow_memory(batches, options.images, options.batch)
            batches.close()
        elif options.run:
            results = {}
            for policy in _POLICIES:
                batches = open_batches(options, policy)
                results[policy] = measure(batches, options.images, options.batch)
                batches.close()
            print(json.dumps(results))
        else:
            compare(options)


if __name__ == "__main__":
    main()
