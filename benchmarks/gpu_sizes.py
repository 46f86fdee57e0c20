"""Inference at other sizes and with few images on one GPU: our kernels beside XLA's convolutions.

  python benchmarks/gpu_sizes.py --model=mambaout_femto

Both are this package's network in bfloat16 with random weights, and the images lie on the GPU.
"XLA" is the network with `depthwise="xla"`, which leaves all but LayerNorm to XLA. Milliseconds are
those of a call among many that follow one another: the median of several rounds. A ratio above 1
means that the kernels are faster.
"""

import argparse
import concurrent.futures
import itertools
import statistics
from collections.abc import Callable

import jax
from gpu_step import ours, seconds_a_call

_SIZES = ((160, 160), (224, 224), (288, 288), (384, 384), (97, 131))
_BATCHES = (1, 3, 17)
_CALLS = 30  # of a round


def compiled(model: str, shape: tuple[int, int, int], depthwise: str) -> tuple[Callable, Callable]:
    """Returns a call that starts one inference, and one that waits for all; one has run."""
    call, wait, _ = ours(model, shape, "infer", depthwise)
    call()
    wait()
    return call, wait


def main() -> None:
    """Prints a row for each size and batch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mambaout_femto")
    parser.add_argument("--batches", nargs="+", type=int, default=_BATCHES)
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.model}", flush=True)
    shapes = [(batch, *size) for size, batch in itertools.product(_SIZES, args.batches)]
    jobs = list(itertools.product(shapes, ("xla", "auto")))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = list(pool.map(lambda job: compiled(args.model, *job), jobs))
    times = {
        job: 1e3 * statistics.median(seconds_a_call(_CALLS, *program))
        for job, program in zip(jobs, programs, strict=True)
    }
    for batch, height, width in shapes:
        xla, kernels = (times[(batch, height, width), name] for name in ("xla", "auto"))
        print(
            f"{height}x{width}, {batch:3} images: XLA {xla:7.3f} ms, ours {kernels:7.3f} ms, "
            f"ratio {xla / kernels:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
