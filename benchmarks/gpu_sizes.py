"""Inference at other sizes and with few images on one GPU: our kernels beside XLA's convolutions.

  python benchmarks/gpu_sizes.py --model=mambaout_femto

Both are this package's network in bfloat16 with random weights, and the images lie on the GPU.
"XLA" is the network with `depthwise="xla"`, which leaves all but LayerNorm to XLA. Milliseconds are
those of a call among many that follow one another: the median of several rounds. A ratio above 1
means that the kernels are faster.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp

import mambaout_jax
from mambaout_jax.models.mambaout import on_device
from mambaout_jax.runtime.compilation import compiler_options
from mambaout_jax.training.state import init_params

_SIZES = ((160, 160), (224, 224), (288, 288), (384, 384), (97, 131))
_BATCHES = (1, 3, 17)
_ROUNDS, _CALLS = 7, 30


def milliseconds(model: str, depthwise: str, shape: tuple[int, int, int]) -> float:
    """Returns the median time of a call."""
    network = mambaout_jax.create_model(model, dtype=jnp.bfloat16, depthwise=depthwise)
    network = on_device(network, jax.devices()[0])
    params = jax.jit(functools.partial(init_params, model=network, size=shape[1:]))(
        jax.random.key(0)
    )
    images = jax.random.normal(jax.random.key(1), (*shape, 3))
    call = jax.jit(
        lambda images: network.apply({"params": params}, images),
        compiler_options=compiler_options("gpu"),
    )
    call(images).block_until_ready()
    rounds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        for _ in range(_CALLS):
            logits = call(images)
        logits.block_until_ready()
        rounds.append((time.perf_counter() - started) / _CALLS)
    return 1e3 * statistics.median(rounds)


def main() -> None:
    """Prints a row for each size and batch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mambaout_femto")
    parser.add_argument("--batches", nargs="+", type=int, default=_BATCHES)
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.model}", flush=True)
    for height, width in _SIZES:
        for batch in args.batches:
            shape = (batch, height, width)
            xla, ours = (milliseconds(args.model, name, shape) for name in ("xla", "auto"))
            print(
                f"{height}x{width}, {batch:3} images: XLA {xla:7.3f} ms, ours {ours:7.3f} ms, "
                f"ratio {xla / ours:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
