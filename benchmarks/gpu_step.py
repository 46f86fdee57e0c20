"""Compares training and inference on one GPU with timm under torch.compile, in images/s.

Each side runs in its own process with the GPU to itself. The two sides of a model run one after
the other in the same run of this script:

  python benchmarks/gpu_step.py --models mambaout_femto mambaout_tiny --batch=256

Both compute in bfloat16 at 224 pixels from images and labels that lie on the GPU, with random
weights, label smoothing 0.1, the paper's drop path and AdamW. timm runs with channels_last,
autocast, fused AdamW and torch.compile. Median of several rounds. A ratio above 1 means that
this package is faster.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

_SIZE = 224  # pixels
_ROUNDS, _STEPS = 7, 10
_DROP_PATH = {
    "mambaout_femto": 0.025,
    "mambaout_kobe": 0.025,
    "mambaout_tiny": 0.2,
    "mambaout_small": 0.4,
    "mambaout_base": 0.6,
}


def ours(model: str, batch: int, mode: str, depthwise: str) -> tuple[Callable[[], None], Callable]:
    """Returns a call that starts one step, and one that waits for all."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import mambaout_jax
    from mambaout_jax.runtime.compilation import compiler_options
    from mambaout_jax.training.optimizer import decay_mask
    from mambaout_jax.training.state import init_params, init_state
    from mambaout_jax.training.step import Recipe, update_step

    key = jax.random.key(0)
    network = mambaout_jax.create_model(
        model, dtype=jnp.bfloat16, depthwise=depthwise, drop_path_rate=_DROP_PATH[model]
    )
    shapes = jax.eval_shape(functools.partial(init_params, model=network, size=(_SIZE, _SIZE)), key)
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.02 * random.standard_normal(leaf.shape, np.float32)), shapes
    )
    images = jax.random.normal(key, (batch, _SIZE, _SIZE, 3), jnp.float32)
    if mode == "infer":
        apply = jax.jit(
            lambda params, images: network.apply({"params": params}, images),
            compiler_options=compiler_options("gpu"),
        )
        answer = [apply(params, images)]

        def call() -> None:
            answer[0] = apply(params, images)

        return call, lambda: answer[0].block_until_ready()
    optimizer = optax.adamw(1e-3, weight_decay=0.05, mask=decay_mask)
    labels = jax.nn.one_hot(jnp.arange(batch) % 1000, 1000)
    inputs = {"image": images, "target": optax.smooth_labels(labels, 0.1)}
    recipe = Recipe(num_classes=1000, mean=(0.5,) * 3, std=(0.25,) * 3)
    step = jax.jit(
        functools.partial(update_step, model=network, optimizer=optimizer, recipe=recipe),
        donate_argnums=0,
        compiler_options=compiler_options("gpu"),
    )
    state = [init_state(params, optimizer, ema=False)]

    def train() -> None:
        state[0], _ = step(state[0], inputs, key)

    return train, lambda: state[0].step.block_until_ready()


def theirs(model: str, batch: int, mode: str) -> tuple[Callable[[], None], Callable]:
    """Returns a call that starts one step of timm's network, and one that waits for all."""
    import timm
    import torch

    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    network = timm.create_model(model, drop_path_rate=_DROP_PATH[model]).cuda()
    network = network.to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, _SIZE, _SIZE, device="cuda")
    images = images.to(memory_format=torch.channels_last)
    labels = torch.arange(batch, device="cuda") % 1000
    compiled = torch.compile(network)
    if mode == "infer":
        network.eval()

        def infer() -> None:
            with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
                compiled(images)

        return infer, torch.cuda.synchronize
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0.05, fused=True)

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            logits = compiled(images)
            loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        loss.backward()
        optimizer.step()

    return train, torch.cuda.synchronize


def measure(side: str, model: str, batch: int, mode: str, depthwise: str) -> None:
    """Prints the images a second of one side, and the seconds before its first step was done."""
    started = time.perf_counter()
    if side == "ours":
        call, wait = ours(model, batch, mode, depthwise)
    else:
        call, wait = theirs(model, batch, mode)
    call()
    wait()
    seconds = time.perf_counter() - started
    for _ in range(_STEPS):
        call()
    wait()
    rates = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        for _ in range(_STEPS):
            call()
        wait()
        rates.append(batch * _STEPS / (time.perf_counter() - started))
    print(json.dumps({"rate": statistics.median(rates), "rates": rates, "first": seconds}))


def main() -> None:
    """Parses the flags, runs each side and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(_DROP_PATH), choices=list(_DROP_PATH))
    parser.add_argument("--modes", nargs="+", default=["train", "infer"])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--depthwise", nargs="+", default=["auto"], help="config.model.depthwise")
    parser.add_argument("--no_timm", action="store_true", help="measure ours alone")
    parser.add_argument("--measure", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return measure(*json.loads(args.measure))
    sides = [] if args.no_timm else [("timm", "")]
    sides += [("ours", depthwise) for depthwise in args.depthwise]
    for model in args.models:
        for mode in args.modes:
            results = {}
            for side, depthwise in sides:
                job = json.dumps([side, model, args.batch, mode, depthwise])
                command = [sys.executable, __file__, "--measure", job]
                run = subprocess.run(command, capture_output=True, text=True, check=False)
                if run.returncode:
                    sys.exit(f"{side} {depthwise} {model} {mode} failed:\n{run.stderr[-3000:]}")
                result = json.loads(run.stdout.splitlines()[-1])
                results[side, depthwise] = result
                base = results.get(("timm", ""), result)["rate"]
                spread = max(result["rates"]) / min(result["rates"]) - 1
                print(
                    f"{model:16} {mode:5} {side} {depthwise:10} {result['rate']:8,.0f} images/s "
                    f"(spread {spread:.1%}), ratio {result['rate'] / base:.2f}, "
                    f"first step after {result['first']:.0f} s",
                    flush=True,
                )
    return None


if __name__ == "__main__":
    main()
