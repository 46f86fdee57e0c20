"""Plans a run on TPUs without a TPU: compiles its training step for a slice, on a CPU.

    python tools/plan_tpu.py --config=configs/base.py --topology=v5e:16x16

Prints the memory of a chip, the collectives, the estimated time of a step and of the whole run, and
with --price=1.20 the cost of the run. Keys are changed with --config.key=value. It needs libtpu:
pip install -e '.[plan]'.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from mambaout_jax.cli.flags import parse_flags
from mambaout_jax.errors import UserError
from mambaout_jax.planning.plan import describe, make_plan
from mambaout_jax.planning.topology import find_topology, load_compiler

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's configuration.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "The slice: generation and shape.")
_PRICE = flags.DEFINE_float(
    "price",
    None,
    "Price of a chip hour, in any currency: prints the cost of the run.",
    lower_bound=0,
)
_EXAMPLES = flags.DEFINE_integer("examples", 1_281_167, "Training examples of an epoch.")


def main(argv: list[str]) -> None:
    """Plans what the command line asks for."""
    del argv
    absl_logging.set_verbosity(absl_logging.WARNING)
    find_topology(_TOPOLOGY.value)
    load_compiler()
    plan = make_plan(_CONFIG.value, _TOPOLOGY.value, _EXAMPLES.value)
    print(f"{_CONFIG.value.model.name} on {_TOPOLOGY.value}")
    print(describe(plan, _PRICE.value))


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=parse_flags)
    except UserError as error:
        sys.exit(f"error: {error}")
