r"""Compares CPU inference with timm's network in torch: milliseconds per batch, on the same cores.

Our network runs with the predictor's compiler options, and as a user's own `jax.jit(model.apply)`.
Each side runs in its own process. They take turns, a few batches each, so that other load on the
machine affects all. timm runs in its own environment:

  python -m venv /tmp/timm && /tmp/timm/bin/pip install timm torch
  python benchmarks/cpu_inference.py --timm_python=/tmp/timm/bin/python

Weights are random, float32; torch runs eagerly in inference mode. A ratio above 1 means that this
package is faster. The peer can also be our network with XLA's own convolutions, at any sizes:

  python benchmarks/cpu_inference.py --peer=xla --models mambaout_femto --batches 1 3 17 \
      --sizes 160 288 384 97x131 --turns=3
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


def ours(
    model: str, batch: int, size: tuple[int, int], depthwise: str, *, own_jit: bool
) -> tuple[Callable[[], object], float]:
    """Returns a call of our network and the seconds that its compilation took.

    `own_jit` is a user's `jax.jit(model.apply)`, without compiler options.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp

    import mambaout_jax
    from mambaout_jax.runtime.compilation import compiler_options

    network = mambaout_jax.create_model(model, depthwise=depthwise)
    images = jax.random.normal(jax.random.key(0), (batch, *size, 3), jnp.float32)
    params = jax.jit(network.init)(jax.random.key(0), images[:1])
    started = time.perf_counter()
    options = {} if own_jit else compiler_options("cpu", inference=True)
    apply = jax.jit(network.apply, compiler_options=options)
    apply = apply.lower(params, images).compile()
    seconds = time.perf_counter() - started
    return lambda: apply(params, images).block_until_ready(), seconds


def theirs(model: str, batch: int, size: tuple[int, int]) -> tuple[Callable[[], object], float]:
    """Returns a call of timm's network; nothing is compiled."""
    import timm
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network = timm.create_model(model).eval()
    images = torch.randn(batch, 3, *size)

    def call() -> object:
        with torch.inference_mode():
            return network(images)

    return call, 0.0


def serve(side: str, model: str, batch: int, size: tuple[int, int], depthwise: str) -> None:
    """Answers each line of the input with the milliseconds of one turn."""
    if side == "timm":
        call, seconds = theirs(model, batch, size)
    else:
        depthwise = "xla" if side == "xla" else depthwise
        call, seconds = ours(model, batch, size, depthwise, own_jit=side != "predictor")
    call()
    print(json.dumps(seconds), flush=True)
    for _ in sys.stdin:
        times = []
        for _ in range(_RUNS):
            started = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - started))
        print(json.dumps(statistics.median(times)), flush=True)


def compare(args: argparse.Namespace, model: str, size: tuple[int, int], batch: int) -> None:
    """Lets all sides take turns, and prints a row for each of ours."""
    sides = {}
    for side in ("predictor", "own jit", args.peer):
        python = args.timm_python if side == "timm" else sys.executable
        job = json.dumps([side, model, batch, size, args.depthwise])
        command = [python, __file__, "--serve", job]
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
    for side in ("predictor", "own jit"):
        peer = args.peer
        ratio = statistics.median(b / a for a, b in zip(times[side], times[peer], strict=True))
        shape = "x".join(map(str, (batch, *size)))
        print(
            f"{model:14} {shape:10} {side:9}: {middle[side]:7.1f} ms (least {best[side]:.1f}), "
            f"{peer} {middle[peer]:7.1f} ms (least {best[peer]:.1f}), ratio {ratio:.2f} "
            f"(of least {best[peer] / best[side]:.2f}); compiled in {seconds[side]:.1f} s",
            flush=True,
        )


def main() -> None:
    """Parses the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["mambaout_femto", "mambaout_tiny"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--sizes", nargs="+", default=["224"], help="side, or HEIGHTxWIDTH")
    parser.add_argument("--peer", default="timm", choices=["timm", "xla"])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--depthwise", default="auto", help="as config.model.depthwise")
    parser.add_argument("--timm_python", default="", help="a Python that has timm and torch")
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(*json.loads(args.serve))
    for model in args.models:
        for size in args.sizes:
            height, _, width = size.partition("x")
            for batch in args.batches:
                compare(args, model, (int(height), int(width or height)), batch)
    return None


if __name__ == "__main__":
    main()
