"""Compares CPU inference with timm's network in torch: milliseconds per batch, on the same cores.

Each side runs in its own process. They take turns, a few batches each, so that other load on the
machine affects both. timm runs in its own environment:

  python -m venv /tmp/timm && /tmp/timm/bin/pip install timm torch
  python benchmarks/cpu_inference.py --timm_python=/tmp/timm/bin/python

Weights are random, float32, 224 pixels; torch runs eagerly in inference mode. A ratio above 1
means that this package is faster.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

_RUNS = 5  # batches a turn, of which the median counts
_SIZE = 224  # pixels


def ours(model: str, batch: int, depthwise: str) -> tuple[Callable[[], object], float]:
    """Returns a call of our network and the seconds that its compilation took."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp

    import mambaout_jax
    from mambaout_jax.runtime.compilation import compiler_options

    network = mambaout_jax.create_model(model, depthwise=depthwise)
    images = jax.random.normal(jax.random.key(0), (batch, _SIZE, _SIZE, 3), jnp.float32)
    params = jax.jit(network.init)(jax.random.key(0), images[:1])
    started = time.perf_counter()
    apply = jax.jit(network.apply, compiler_options=compiler_options("cpu"))
    apply = apply.lower(params, images).compile()
    seconds = time.perf_counter() - started
    return lambda: apply(params, images).block_until_ready(), seconds


def theirs(model: str, batch: int) -> tuple[Callable[[], object], float]:
    """Returns a call of timm's network; nothing is compiled."""
    import timm
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network = timm.create_model(model).eval()
    images = torch.randn(batch, 3, _SIZE, _SIZE)

    def call() -> object:
        with torch.inference_mode():
            return network(images)

    return call, 0.0


def serve(side: str, model: str, batch: int, depthwise: str) -> None:
    """Answers each line of the input with the milliseconds of one turn."""
    call, seconds = ours(model, batch, depthwise) if side == "ours" else theirs(model, batch)
    call()
    print(json.dumps(seconds), flush=True)
    for _ in sys.stdin:
        times = []
        for _ in range(_RUNS):
            started = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - started))
        print(json.dumps(statistics.median(times)), flush=True)


def compare(args: argparse.Namespace, model: str, batch: int) -> None:
    """Lets both sides take turns and prints a row."""
    sides = {}
    for side, python in (("ours", sys.executable), ("timm", args.timm_python)):
        command = [python, __file__, "--serve", json.dumps([side, model, batch, args.depthwise])]
        sides[side] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    seconds = {name: json.loads(side.stdout.readline()) for name, side in sides.items()}
    times = {name: [] for name in sides}
    for _ in range(args.turns):
        for name, side in sides.items():
            side.stdin.write("turn\n")
            side.stdin.flush()
            times[name].append(json.loads(side.stdout.readline()))
    for side in sides.values():
        side.stdin.close()
        side.wait()
    best = {name: min(values) for name, values in times.items()}
    middle = {name: statistics.median(values) for name, values in times.items()}
    paired = statistics.median(b / a for a, b in zip(times["ours"], times["timm"], strict=True))
    print(
        f"{model:16} batch {batch}: ours {middle['ours']:7.1f} ms (least {best['ours']:.1f}), "
        f"timm {middle['timm']:7.1f} ms (least {best['timm']:.1f}), ratio {paired:.2f} "
        f"(of least {best['timm'] / best['ours']:.2f}); ours compiled in {seconds['ours']:.1f} s",
        flush=True,
    )


def main() -> None:
    """Parses the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["mambaout_femto", "mambaout_tiny"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--depthwise", default="auto", help="as config.model.depthwise")
    parser.add_argument("--timm_python", default="", help="a Python that has timm and torch")
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(*json.loads(args.serve))
    for model in args.models:
        for batch in args.batches:
            compare(args, model, batch)
    return None


if __name__ == "__main__":
    main()
