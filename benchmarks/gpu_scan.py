"""Times the selective scan alone on one GPU, beside the time that its bytes take.

  python benchmarks/gpu_scan.py

Random x, b and c in bfloat16 and delta in float32, as the network has them, for the widths of a
model's stages at 224 pixels. "forward" is the scan, "gradient" the scan and all its gradients.
There are two floors. That of memory: each input read once and each output written once by the scan,
and again by its gradient, at the bandwidth of the card. That of the exponentials, one for each
token, channel and state, in the scan and again in its gradient, which computes the states again: 16
a cycle and multiprocessor. Median of several rounds; MiB are the memory of the gradient. "error" is
the largest of y and the gradients, the norm of the difference over the norm, from `scan` of the
same inputs in float32; it is that of a few images, and of an odd shape at the end.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from mambaout_jax.models.variants import find_variant
from mambaout_jax.ops import selective_scan

_STATE = 16
_ROUNDS, _CALLS = 5, 10
_CHECKED = 4  # images
_ODD = (3, 37, 100)  # images, tokens and channels


def arguments(n: int, length: int, channels: int) -> tuple[jax.Array, ...]:
    """Returns x, delta, a, b, c and d, and y's gradient."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape, np.float32))

    tokens, coefficients = (n, length, channels), (n, length, _STATE)
    x, dy = (normal(*tokens).astype(jnp.bfloat16) for _ in range(2))
    b, c = (normal(*coefficients).astype(jnp.bfloat16) for _ in range(2))
    a = -jnp.broadcast_to(jnp.arange(1.0, 1 + _STATE), (channels, _STATE))
    return x, jax.nn.softplus(normal(*tokens) - 4), a, b, c, normal(channels), dy


def seconds(function, args: tuple[jax.Array, ...]) -> float:  # type: ignore[no-untyped-def]
    """Returns the median seconds of a call, of rounds of several."""
    jax.block_until_ready(function(*args))
    rounds = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        for _ in range(_CALLS):
            results = function(*args)
        jax.block_until_ready(results)
        rounds.append((time.perf_counter() - started) / _CALLS)
    return statistics.median(rounds)


def measure(implementation: str, args: tuple[jax.Array, ...]) -> str:
    """Returns a row of the table."""
    scan = functools.partial(selective_scan, implementation=implementation)

    @jax.jit
    def gradient(*args: jax.Array):  # type: ignore[no-untyped-def]
        y, transpose = jax.vjp(scan, *args[:-1])
        return y, transpose(args[-1])

    compiled = gradient.lower(*args).compile().memory_analysis()
    peak = compiled.temp_size_in_bytes + compiled.output_size_in_bytes
    forward, both = (
        1e6 * seconds(*call) for call in ((jax.jit(scan), args[:-1]), (gradient, args))
    )
    return (
        f"forward {forward:10,.0f} µs, gradient {both:10,.0f} µs, {peak / 2**20:8,.0f} MiB, "
        f"error {error(implementation, args):.1e}, in float32 "
        f"{error(implementation, in_float32(args)):.1e}"
    )


def output_and_gradients(implementation: str, args: tuple[jax.Array, ...]) -> list[jax.Array]:
    """Returns y, and the gradients of all inputs."""

    @jax.jit
    def both(*args: jax.Array):  # type: ignore[no-untyped-def]
        scan = functools.partial(selective_scan, implementation=implementation)
        y, transpose = jax.vjp(scan, *args[:-1])
        return y, *transpose(args[-1])

    return [array.astype(jnp.float32) for array in both(*args)]


def in_float32(args: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Returns the arrays in float32."""
    return tuple(array.astype(jnp.float32) for array in args)


def error(implementation: str, args: tuple[jax.Array, ...]) -> float:
    """Returns the largest error of y and the gradients; not a number counts as infinite."""
    x, delta, a, b, c, d, dy = args
    x, delta, b, c, dy = (array[:_CHECKED] for array in (x, delta, b, c, dy))
    args = (x, delta, a, b, c, d, dy)
    expected = output_and_gradients("scan", in_float32(args))
    errors = [
        float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs))
        for ours, theirs in zip(output_and_gradients(implementation, args), expected, strict=True)
    ]
    return max(np.inf if np.isnan(error) else error for error in errors)


def floors(args: tuple[jax.Array, ...], bandwidth: float, exponentials: float) -> list[str]:
    """Returns the rows of the floors, of rates in millions a second."""
    *inputs, dy = args
    read, y = sum(array.nbytes for array in inputs), dy.nbytes
    states = dy.size * _STATE
    rows = []
    for name, rate, forward, backward in (
        ("bytes", bandwidth, read + y, 2 * read + y),
        ("exponentials", exponentials, states, states),
    ):
        both = forward + backward
        rows.append(
            f"{name:12} forward {forward / rate:10,.0f} µs, gradient {both / rate:10,.0f} µs"
        )
    return rows


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mambaout_tiny")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--stages", type=int, nargs="+", default=[3, 2, 1, 0])
    parser.add_argument("--scans", nargs="+", default=["triton", "chunked", "scan"])
    parser.add_argument("--bandwidth", type=float, default=3.35, help="TB/s; 3.35 is an H100's")
    parser.add_argument(
        "--exponentials", type=float, default=3.7, help="10^12 a second; 16 x 132 x 1.755 GHz"
    )
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, batch {args.batch}")
    widths = find_variant(args.model).widths
    shapes = [(args.batch, (56 // 2**stage) ** 2, widths[stage]) for stage in args.stages]
    for n, length, channels in (*shapes, _ODD):
        arrays = arguments(n, length, channels)
        print(f"L {length}, E {channels}; floors:")
        for row in floors(arrays, 1e6 * args.bandwidth, 1e6 * args.exponentials):
            print(f"  {row}", flush=True)
        for implementation in args.scans:
            try:
                row = measure(implementation, arrays)
            except jax.errors.JaxRuntimeError as error:  # out of memory
                row = str(error).splitlines()[0][:90]
            print(f"  {implementation:12} {row}", flush=True)


if __name__ == "__main__":
    main()
