"""Estimates the cycles of a training step on a TPU, without a TPU, from the compiler's output.

The training step of the paper's recipe, augmentation and update included, is compiled for a
topology on the CPU (`pip install -e '.[plan]'`):

  python benchmarks/tpu_static.py --model=mambaout_tiny --topology=v5e:2x2 --batch=128

- "estimate" is the compiler's own `estimated_cycles` of an operation, summed over the module, times
  the trips of the loops around it. It has none for a Pallas call.
- "counted" is, for each of our kernels, the VLIW bundles of its final schedule times the trips of
  the loops around them, all branches taken, or the time of its transfers if that is longer: the
  bytes of its arrays over the published bandwidth.
"""

import argparse
import collections
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import default
from mambaout_jax.errors import UserError
from mambaout_jax.planning.plan import Plan, describe, make_plan
from mambaout_jax.planning.topology import count_chips, load_compiler


def part_of_step(scope: str) -> str:
    """Returns the part of the network, or of the step, that an operation's scope names."""
    for pattern in (
        r"(stem|downsample|head)/",
        r"blocks_\d+/(norm|fc1|fc2|conv|ssm)",
        r"(blocks)_\d+",
    ):
        if found := re.search(pattern, scope):
            name = found.group(1).replace("blocks", "block, elsewhere")
            return name if name in ("stem", "downsample", "head") else f"block {name}".strip()
    return "augmentation, loss, optimizer"


def report(plan: Plan) -> None:
    """Prints the table."""
    parts = collections.Counter()
    for operation in plan.program.operations:
        parts[part_of_step(operation.scope)] += operation.cycles
    for part, cycles in parts.most_common():
        print(f"  {cycles / 1e6:10.2f} M  estimate  {part}")
    for kernel, calls in sorted(plan.program.kernels.items(), key=str):
        cycles = plan.kernels[kernel] * calls
        print(f"  {cycles / 1e6:10.2f} M  counted   {calls} x {kernel}")
    largest = max(
        [(operation.cycles, operation.name) for operation in plan.program.operations]
        + [(cycles, kernel.name) for kernel, cycles in plan.kernels.items()]
    )
    print(f"  {largest[0] / 1e6:10.2f} M  the largest operation, {largest[1]}")
    print(describe(plan))


def main() -> None:
    """Parses the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="mambaout_tiny")
    parser.add_argument("--topology", default="v5e:2x2", help="as libtpu names it: v4:2x2x1, …")
    parser.add_argument("--batch", type=int, default=128, help="images a chip")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels")
    parser.add_argument("--depthwise", default="auto", help="as config.model.depthwise")
    parser.add_argument("--token_mixer", default="conv", help="as config.model.token_mixer")
    args = parser.parse_args()
    config = default.get_config()
    config.model.name, config.model.depthwise = args.model, args.depthwise
    config.model.token_mixer, config.data.image_size = args.token_mixer, args.size
    try:
        config.batch_size = config.eval.batch_size = args.batch * count_chips(args.topology)
        load_compiler()
        plan = make_plan(config, args.topology, examples=1_281_167)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(
        f"{args.model}, {args.token_mixer}, depthwise {args.depthwise}, {args.topology}, "
        f"{args.batch} images of {args.size} pixels a chip"
    )
    report(plan)


if __name__ == "__main__":
    main()
