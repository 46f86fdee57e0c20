r"""Compares training, inference and latency on one GPU with timm under torch.compile, in images/s.

Each side runs in its own process with the GPU to itself. The two sides of a model run one after
the other in the same run of this script:

  python benchmarks/gpu_step.py --models mambaout_femto mambaout_tiny --batch=256

Both compute in bfloat16, ours also in others of --dtypes, at 224 pixels from images and labels that
lie on the GPU, with random weights, label smoothing 0.1, the paper's drop path and AdamW. timm runs
with channels_last, autocast, fused AdamW and torch.compile, in each of --timm_modes. Median of
several rounds. A ratio above 1 means that this package is faster.

"latency" is inference that waits for each batch. Our weights are then constants of the program, as
in `Predictor`:

  python benchmarks/gpu_step.py --modes latency --batch=1 --timm_modes reduce-overhead

The first row is the base of the ratios. If a row fails, its error is printed, the others follow,
and the exit status is 1. For the cost of an SSM in the last two stages, with each implementation of
the selective scan:

  python benchmarks/gpu_step.py --models mambaout_tiny --modes train --batch=128 --no_timm \
      --token_mixers conv conv,conv,conv_ssm,conv_ssm --scans triton chunked scan

and for the cost of float32:

  python benchmarks/gpu_step.py --models mambaout_femto --modes train --no_timm \
      --dtypes bfloat16 float32
"""

import argparse
import functools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

_ROUNDS = 7
_STEPS = {"train": 10, "infer": 10, "latency": 100}  # of a round
_DROP_PATH = {
    "mambaout_femto": 0.025,
    "mambaout_kobe": 0.025,
    "mambaout_tiny": 0.2,
    "mambaout_small": 0.4,
    "mambaout_base": 0.6,
}


def ours(
    model: str,
    shape: tuple[int, int, int],
    mode: str,
    depthwise: str,
    token_mixer: str = "conv",
    scan: str = "auto",
    dtype: str = "bfloat16",
) -> tuple[Callable[[], None], Callable, Callable[[], int]]:
    """Returns a call that starts one step, one that waits for all, and one for the peak memory."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import mambaout_jax
    from mambaout_jax.models import ssm
    from mambaout_jax.models.mambaout import on_device
    from mambaout_jax.runtime.compilation import compiler_options
    from mambaout_jax.training.optimizer import decay_mask
    from mambaout_jax.training.state import init_params, init_state
    from mambaout_jax.training.step import Recipe, update_step

    ssm.selective_scan = functools.partial(ssm.selective_scan, implementation=scan)
    key = jax.random.key(0)
    network = mambaout_jax.create_model(
        model,
        dtype=jnp.dtype(dtype),
        depthwise=depthwise,
        token_mixer=token_mixer,
        drop_path_rate=_DROP_PATH[model],
    )
    network = on_device(network, jax.devices()[0])

    batch, *size = shape
    shapes = jax.eval_shape(functools.partial(init_params, model=network, size=tuple(size)), key)
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.02 * random.standard_normal(leaf.shape, np.float32)), shapes
    )
    images = jax.random.normal(key, (*shape, 3), jnp.float32)
    options = compiler_options(jax.default_backend())
    if mode == "latency":
        answer = jax.jit(
            lambda images: network.apply({"params": params}, images), compiler_options=options
        )
        return lambda: answer(images).block_until_ready(), lambda: None, peak_memory
    if mode == "infer":
        apply = jax.jit(
            lambda params, images: network.apply({"params": params}, images),
            compiler_options=options,
        )
        last = [apply(params, images)]

        def call() -> None:
            last[0] = apply(params, images)

        return call, lambda: last[0].block_until_ready(), peak_memory
    optimizer = optax.adamw(1e-3, weight_decay=0.05, mask=decay_mask)
    labels = jax.nn.one_hot(jnp.arange(batch) % 1000, 1000)
    inputs = {"image": images, "target": optax.smooth_labels(labels, 0.1)}
    recipe = Recipe(num_classes=1000, mean=(0.5,) * 3, std=(0.25,) * 3)
    step = jax.jit(
        functools.partial(update_step, model=network, optimizer=optimizer, recipe=recipe),
        donate_argnums=0,
        compiler_options=options,
    )
    state = [init_state(params, optimizer, ema=False)]

    def train() -> None:
        state[0], _ = step(state[0], inputs, key)

    return train, lambda: state[0].step.block_until_ready(), peak_memory


def peak_memory() -> int:
    """Returns the most bytes that JAX has held on its first device; 0 on a CPU."""
    import jax

    memory = jax.local_devices()[0].memory_stats() or {}
    return memory.get("peak_bytes_in_use", 0)


def theirs(
    model: str, shape: tuple[int, int, int], mode: str, compile_mode: str
) -> tuple[Callable[[], None], Callable, Callable[[], int]]:
    """Returns the same as `ours`, of timm's network."""
    import timm
    import torch

    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    network = timm.create_model(model, drop_path_rate=_DROP_PATH[model]).cuda()
    network = network.to(memory_format=torch.channels_last)
    batch, *size = shape
    images = torch.randn(batch, 3, *size, device="cuda")
    images = images.to(memory_format=torch.channels_last)
    labels = torch.arange(batch, device="cuda") % 1000
    compiled = torch.compile(network, mode=compile_mode)
    if mode != "train":
        network.eval()

        def infer() -> None:
            with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
                compiled(images)
            if mode == "latency":
                torch.cuda.synchronize()

        return infer, torch.cuda.synchronize, torch.cuda.max_memory_allocated
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0.05, fused=True)

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            logits = compiled(images)
            loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        loss.backward()
        optimizer.step()

    return train, torch.cuda.synchronize, torch.cuda.max_memory_allocated


def measure(side: str, *job: Any) -> None:
    """Prints one side's images/s, peak memory, and seconds before its first step was done."""
    started = time.perf_counter()
    _, (batch, *_), mode, *_ = job
    print_rates(started, batch, _STEPS[mode], *(ours if side == "ours" else theirs)(*job))


def print_rates(
    started: float, batch: int, steps: int, call: Callable, wait: Callable, peak: Callable[[], int]
) -> None:
    """Times rounds of calls, and prints what `run_side` reads."""
    call()
    wait()
    seconds = time.perf_counter() - started
    rates = [batch / each for each in seconds_a_call(steps, call, wait)]
    rate = statistics.median(rates)
    print(json.dumps({"rate": rate, "rates": rates, "first": seconds, "peak": peak()}))


def seconds_a_call(steps: int, call: Callable, wait: Callable) -> list[float]:
    """Returns the time of a call in each of several rounds, after one that is not counted."""
    times = []
    for _ in range(1 + _ROUNDS):
        started = time.perf_counter()
        for _ in range(steps):
            call()
        wait()
        times.append((time.perf_counter() - started) / steps)
    return times[1:]


def run_side(script: str, name: str, job: list[Any], base: float) -> float:
    """Runs a side in a process, prints its row and returns its images/s; NaN if it fails.

    The ratio is that to `base` images/s, and 1 without one.
    """
    command = [sys.executable, script, "--measure", json.dumps(job)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        print(f"{name} failed:\n{run.stderr[-3000:]}", flush=True)
        return math.nan
    result = json.loads(run.stdout.splitlines()[-1])
    spread = max(result["rates"]) / min(result["rates"]) - 1
    print(
        f"{name:67} {result['rate']:8,.0f} images/s "
        f"(spread {spread:.1%}), ratio {result['rate'] / (base or result['rate']):.2f}, "
        f"{result['peak'] / 2**30:.2f} GiB, first step after {result['first']:.0f} s",
        flush=True,
    )
    return result["rate"]


def main() -> None:
    """Parses the flags, runs each side and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(_DROP_PATH), choices=list(_DROP_PATH))
    choice = {"nargs": "+", "default": ["train", "infer"], "choices": list(_STEPS)}
    parser.add_argument("--modes", **choice)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--depthwise", nargs="+", default=["auto"], help="config.model.depthwise")
    parser.add_argument("--token_mixers", nargs="+", default=["conv"], help="of ours")
    parser.add_argument(
        "--scans", nargs="+", default=["auto"], help="implementations of ops.selective_scan"
    )
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], help="of ours")
    parser.add_argument("--timm_modes", nargs="+", default=["default"], help="of torch.compile")
    parser.add_argument("--no_timm", action="store_true", help="measure ours alone")
    parser.add_argument("--measure", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(*json.loads(args.measure))
        return
    modes = [] if args.no_timm else args.timm_modes
    sides: list[tuple[str, ...]] = [("timm", mode) for mode in modes]
    sides += [
        ("ours", depthwise, token_mixer, scan, dtype)
        for depthwise in args.depthwise
        for token_mixer in args.token_mixers
        for scan in (args.scans if "ssm" in token_mixer else ["auto"])
        for dtype in args.dtypes
    ]
    failed = False
    for model in args.models:
        for mode in args.modes:
            base = 0.0
            for number, (side, *options) in enumerate(sides):
                name = f"{model:16} {mode:5} {' '.join((side, *options))}"
                job = [side, model, (args.batch, 224, 224), mode, *options]
                rate = run_side(__file__, name, job, base)
                base = base if number else rate
                failed |= math.isnan(rate)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
