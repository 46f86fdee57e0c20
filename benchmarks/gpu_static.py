"""Counts what XLA makes of a network for NVIDIA GPUs, on a machine without any.

Programs are compiled for H200s, without timing alternatives, by the plugin that the extra `cuda`
installs:

  python benchmarks/gpu_static.py --model=mambaout_femto --batch=1
  python benchmarks/gpu_static.py --model=mambaout_base --batch=512 --gpus=2 --fsdp=2

One GPU: inference in bfloat16 with the weights as constants, as `gpu_step.py --modes latency` runs
it. Several: the training step of the model's recipe; --batch is that of all GPUs. Prints the
seconds of compilation, the operations of the program by kind, and its collectives with their bytes.
Each operation starts at least one kernel.
"""

import argparse
import collections
import functools
import re
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

import mambaout_jax
from mambaout_jax.config import load_config
from mambaout_jax.models.mambaout import on_device
from mambaout_jax.planning.program import lower_step, read_program
from mambaout_jax.runtime.compilation import compiler_options
from mambaout_jax.runtime.sharding import make_mesh
from mambaout_jax.training.state import init_params

_H200 = """
platform_name: "CUDA" device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 memory_bandwidth: 4800000000000 l2_cache_size: 52428800
  device_memory_size: 150000000000
}
"""
_NO_KERNEL = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "call")


class _Gpu:
    compute_capability = "9.0"


def lower_inference(model: str, batch: int, device: Any) -> jax.stages.Lowered:
    """Lowers the inference of a batch of images of 224 pixels, with random weights."""
    network = on_device(mambaout_jax.create_model(model, dtype=jnp.bfloat16), device)
    initial = functools.partial(init_params, model=network, size=(224, 224))
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: random.standard_normal(leaf.shape, np.float32),
        jax.eval_shape(initial, jax.random.key(0)),
    )
    sharding = NamedSharding(make_mesh(devices=[device]), PartitionSpec())
    images = jax.ShapeDtypeStruct((batch, 224, 224, 3), jnp.float32, sharding=sharding)
    answer = jax.jit(lambda images: network.apply({"params": params}, images))
    return answer.trace(images).lower()


def operations(text: str) -> collections.Counter[str]:
    """Counts the operations of a compiled module by kind; a fusion is one operation."""
    inside = set(re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", text))
    called = set(re.findall(r" call\(.*to_apply=%?([\w.-]+)", text))
    found, counts = collections.Counter[str](), False
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            counts = start[1] in called or start[1] not in inside
        elif counts and (operation := re.match(r"\s+(?:ROOT )?%?[\w.-]+ = .*? ([a-z-]+)\(", line)):
            target = re.search(r'custom_call_target="([^"]*)"', line)
            found[target[1] if target else operation[1]] += operation[1] not in _NO_KERNEL
    return +found


def main() -> None:
    """Compiles a program and prints what it has."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mambaout_femto")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--fsdp", type=int, default=1, help="GPUs that share the parameters")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    local_devices = jax.local_devices
    jax.local_devices = lambda *names, **options: (  # for the kernels
        [_Gpu()] if options.get("backend") == "cuda" else local_devices(*names, **options)
    )
    shape = f"1x1x{args.gpus}"
    topology = topologies.get_topology_desc(
        shape, platform="cuda", target_config=_H200, topology=shape
    )
    if args.gpus == 1:
        lowered = lower_inference(args.model, args.batch, topology.devices[0])
    else:
        config = load_config(f"configs/{args.model.removeprefix('mambaout_')}.py")
        config.batch_size, config.mesh.fsdp = args.batch, args.fsdp
        lowered = lower_step(config, make_mesh(args.fsdp, topology.devices), 1000)
    options = compiler_options("gpu") | {"xla_gpu_autotune_level": 0}
    started = time.process_time()
    text = lowered.compile(compiler_options=options).as_text()
    print(f"{args.model}, batch {args.batch}, {args.gpus} x {topology.devices[0].device_kind}")
    print(f"compiled in {time.process_time() - started:.1f} s of a core")
    kinds = operations(text)
    print(f"{kinds.total()} operations:", ", ".join(f"{n} {k}" for k, n in kinds.most_common()))
    for kind, (number, size) in read_program(text).collectives.items():
        print(f"{number} {kind}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
