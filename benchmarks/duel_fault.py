"""main.py with one deliberate mistake in the network: `duel_fault.py FAULT FLAGS`; see duel.py."""

import functools
import os
import runpy
import sys
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = os.fspath(ROOT)  # as if main.py were started


def tanh_gelu() -> None:
    """Takes GELU's approximation by tanh for the exact one."""
    from mambaout_jax.ops import activations

    def approximate(x):
        gelu = functools.partial(jax.nn.gelu, approximate=True)
        return jax.jvp(gelu, (x,), (jax.numpy.ones_like(x),))

    activations._ACTIVATIONS["gelu"] = approximate


def same_padding() -> None:
    """Pads the convolutions of stride 2 as "SAME" does: not at all above and on the left."""
    from mambaout_jax.models import mambaout

    mambaout.Conv3x3Stride2 = functools.partial(mambaout.Conv3x3Stride2, padding="SAME")


if __name__ == "__main__":
    fault = sys.argv.pop(1)
    {"tanh_gelu": tanh_gelu, "same_padding": same_padding}[fault]()
    sys.argv[0] = os.fspath(ROOT / "main.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
