"""What a training step costs on a TPU, with no TPU at hand: the compiler's answers, in a table.

The project's own training step of the paper's recipe is compiled for a topology on the CPU, with
libtpu from the package index (`pip install "jax[tpu]"`):

  python benchmarks/tpu_static.py --model=mambaout_tiny --topology=v5e:2x2 --batch=128

- "estimate" is the compiler's own `estimated_cycles` of an operation, summed over the module. It
  has none for a Pallas call.
- "counted" is, for each of our kernels, the VLIW bundles of its final schedule times the trips of
  the loops around them, from a compilation of that kernel alone. Branches count as always taken;
  waiting for memory counts nothing.
- Memory is the compiler's `memory_analysis`, a chip; compilation is timed as wall time and as
  processor time of all threads.
"""

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Before libtpu starts: there is no metadata server to ask, and the kernels' process loads it too.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

from configs import default
from mambaout_jax.ops import depthwise_pallas_tpu
from mambaout_jax.training.build import build_model, build_recipe
from mambaout_jax.training.optimizer import make_optimizer
from mambaout_jax.training.sharding import state_shardings
from mambaout_jax.training.state import init_params, init_state
from mambaout_jax.training.step import compile_train_step

_BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+(?P<label>[A-Z]{2})?\s*:\s*[> ]*\{")
_LOOP_TEST = re.compile(
    r"%(\w+) = scmp\.ge\.s32\.totalorder (?:\(!?%\w+\), )?%\w+, (\d+) /\* loop exit test"
)
_DELAY = 4  # bundles that a branch still runs after its own


def lower_step(model: str, devices: list, batch: int, implementation: str) -> jax.stages.Lowered:
    """Lowers the training step of the paper's recipe, `batch` images a device, data-parallel."""
    config = default.get_config().unlock()
    config.model.name, config.model.depthwise = model, implementation
    config.batch_size = batch * len(devices)
    network, recipe = build_model(config), build_recipe(config, steps_per_epoch=1000)
    optimizer = make_optimizer(config, lambda step: 1e-3)
    mesh = Mesh(np.array(devices).reshape(-1, 1), ("data", "fsdp"))
    size = config.data.image_size
    state = jax.eval_shape(
        lambda key: init_state(init_params(key, network, size), optimizer, ema=False),
        jax.random.key(0),
    )
    images = {
        "image": jax.ShapeDtypeStruct((config.batch_size, size, size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
    }
    step = compile_train_step(network, optimizer, recipe, state_shardings(state, mesh), mesh)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return step.lower(state, images, jax.eval_shape(lambda: jax.random.key(0)))


def part_of_step(scope: str) -> str:
    """Returns the part of the network, or of the step, that an operation's scope names."""
    for pattern in (
        r"(stem|downsample|head)/",
        r"blocks_\d+/(norm|fc1|fc2|conv)/",
        r"(blocks)_\d+",
    ):
        if found := re.search(pattern, scope):
            name = found.group(1).replace("blocks", "block, elsewhere")
            return name if name in ("stem", "downsample", "head") else f"block {name}".strip()
    return "augmentation, loss, optimizer"


def read_module(text: str) -> tuple[list[tuple[int, str, str]], collections.Counter]:
    """Returns the (estimate, name, scope) of the operations, and how often each kernel is called.

    A kernel is the (name, shape, dtype) of its first map [H, W, N, C].
    """
    operations, kernels = [], collections.Counter()
    for line in text[text.index("\nENTRY") :].splitlines():
        name = re.match(r"\s+(?:ROOT )?%([\w.-]+) = ", line)
        scope = re.search(r'op_name="([^"]*)"', line)
        if "tpu_custom_call" in line and name:
            constraints = line[line.index("operand_layout_constraints") :]
            dtype, shape = re.search(r"(bf16|f32)\[([\d,]+)\]", constraints).groups()
            kernel = re.sub(r"[.\d]+$", "", name.group(1))
            kernels[kernel, tuple(int(size) for size in shape.split(",")), dtype] += 1
        elif (cycles := re.search(r'"estimated_cycles":"(\d+)"', line)) and name:
            operations.append(
                (int(cycles.group(1)), name.group(1), scope.group(1) if scope else "")
            )
    return operations, kernels


def count_cycles(bundles: str) -> int:
    """Returns bundles times trips of a final schedule, in libtpu's text form.

    Raises:
        ValueError: when a loop's trips are not constant.
    """
    count, open_loops, loops = 0, [], []
    for line in bundles.splitlines():
        if bundle := _BUNDLE.match(line):
            if bundle["label"] == "LB":
                open_loops.append({"start": count, "test": None, "trips": 0})
            count += 1
        if test := _LOOP_TEST.search(line):
            innermost = [loop for loop in open_loops if loop["test"] is None][-1]
            innermost |= {"test": test.group(1), "trips": int(test.group(2))}
        for loop in list(open_loops):
            if loop["test"] and re.search(rf"sbr\.rel \(!%{loop['test']}\)", line):
                open_loops.remove(loop)
                loops.append((loop["start"], count + _DELAY, loop["trips"]))
    if open_loops:
        raise ValueError(f"{len(open_loops)} loops of the schedule have no constant trips")
    trips = np.ones(count, np.int64)
    for start, stop, times in loops:
        trips[start:stop] *= times
    return int(trips.sum())


def compile_kernel(topology: str, name: str, shape: list[int], dtype: str) -> None:
    """Compiles one kernel alone: libtpu dumps it where LIBTPU_INIT_ARGS says."""
    device = topologies.get_topology_desc(topology, platform="tpu").devices[0]
    sharding = SingleDeviceSharding(device)
    maps = jax.ShapeDtypeStruct(
        shape, {"bf16": jnp.bfloat16, "f32": jnp.float32}[dtype], sharding=sharding
    )
    filters = jax.ShapeDtypeStruct((7, 7, 1, shape[-1]), jnp.float32, sharding=sharding)
    if name == "depthwise_convolution":
        jax.jit(depthwise_pallas_tpu.convolve).lower(maps, filters).compile()
    else:
        gradient = jax.jit(lambda x, dy: depthwise_pallas_tpu.filter_gradient(x, dy, 7))
        gradient.lower(maps, maps).compile()


def count_kernel(topology: str, kernel: tuple) -> int:
    """Returns the counted cycles of one call of a kernel, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        subprocess.run(
            [sys.executable, __file__, "--kernel", json.dumps([topology, *kernel])],
            env=os.environ | {"LIBTPU_INIT_ARGS": dump},
            check=True,
            stderr=subprocess.DEVNULL,
        )
        found = Path(folder).glob(f"*-{kernel[0]}*-final_bundles.txt")
        (final,) = [path for path in found if "schedule-analysis" not in path.name]
        return count_cycles(final.read_text(errors="replace"))


def report(args: argparse.Namespace) -> None:
    """Compiles the step, counts its kernels and prints the table."""
    devices = topologies.get_topology_desc(args.topology, platform="tpu").devices
    started = time.perf_counter()
    lowered = lower_step(args.model, list(devices), args.batch, args.depthwise)
    lowering = time.perf_counter() - started
    started, processor = time.perf_counter(), time.process_time()
    compiled = lowered.compile()
    seconds, processor = time.perf_counter() - started, time.process_time() - processor
    if args.module:
        Path(args.module).write_text(compiled.as_text())
    operations, kernels = read_module(compiled.as_text())
    memory = compiled.memory_analysis()
    used = memory.temp_size_in_bytes + memory.argument_size_in_bytes - memory.alias_size_in_bytes
    used += memory.output_size_in_bytes + memory.generated_code_size_in_bytes

    print(f"{args.model}, depthwise {args.depthwise}, {args.topology}, {args.batch} images a chip")
    parts = collections.Counter()
    for cycles, _, scope in operations:
        parts[part_of_step(scope)] += cycles
    for part, cycles in parts.most_common():
        print(f"  {cycles / 1e6:10.2f} M  estimate  {part}")
    counted, largest = 0, max(operations)[:2]
    for kernel, calls in sorted(kernels.items()):
        cycles = count_kernel(args.topology, kernel)
        counted += cycles * calls
        largest = max(largest, (cycles, kernel[0]))
        print(f"  {cycles * calls / 1e6:10.2f} M  counted   {calls} x {kernel[0]} {kernel[1]}")
    estimate = sum(parts.values())
    print(f"  {estimate / 1e6:10.2f} M  estimate, {counted / 1e6:.2f} M counted:", end=" ")
    print(f"{(estimate + counted) / 1e6:.2f} M cycles a step")
    print(f"  {largest[0] / 1e6:10.2f} M  the largest operation, {largest[1]}")
    print(f"  {used / 2**30:10.2f} GiB of a chip's memory")
    gathers = len(re.findall(r" all-gather(?:-start)?\(", compiled.as_text()))
    print(f"  {gathers:10d} all-gathers")
    print(
        f"  {seconds:10.0f} s to compile ({processor:.0f} s of processor), {lowering:.0f} to lower"
    )


def main() -> None:
    """Parses the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mambaout_tiny")
    parser.add_argument("--topology", default="v5e:2x2", help="as libtpu names it: v4:2x2x1, …")
    parser.add_argument("--batch", type=int, default=128, help="images a chip")
    parser.add_argument("--depthwise", default="auto", help="as config.model.depthwise")
    parser.add_argument("--module", default="", help="file to write the compiled module to")
    parser.add_argument("--kernel", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kernel:
        compile_kernel(*json.loads(args.kernel))
    else:
        report(args)


if __name__ == "__main__":
    main()
