r"""main.py with the backbone of a segmentation network kept as it was initialised.

    python -m mambaout_jax.data.shapes --output=DIR
    python benchmarks/frozen_backbone.py --config=configs/shapes.py --workdir=runs/frozen \
        --config.data.dir=DIR --config.init_from=

What heads alone can learn from an untrained network, for comparison.
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import optax

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = os.fspath(ROOT)  # as if main.py were started


def labels(params: Any) -> dict[str, str]:
    """Labels each part of the parameters."""
    return {name: "kept" if name == "backbone" else "trained" for name in params}


def freeze(make_optimizer: Any) -> Any:
    """Returns a `make_optimizer` whose optimizers leave the backbone as it is."""

    def make(*args: Any, **keys: Any) -> optax.GradientTransformation:
        parts = {"trained": make_optimizer(*args, **keys), "kept": optax.set_to_zero()}
        return optax.partition(parts, labels)

    return make


if __name__ == "__main__":
    from mambaout_jax import build

    build.make_optimizer = freeze(build.make_optimizer)
    sys.argv[0] = os.fspath(ROOT / "main.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
