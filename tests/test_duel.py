"""The comparison of two trainers: its statistics, and the faults that it must notice."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


report = load("duel_report")


def results(side, tops, fault="", dtype="bfloat16"):
    """Finished runs of two epochs that end with these top-1."""
    return [
        {
            "side": side,
            "seed": seed,
            "dtype": dtype,
            "fault": fault,
            "seconds": 10.0,
            "device": "GPU",
            "rows": [
                {"epoch": 1.0, "train_loss": 4.0, "eval_loss": 3.0, "top1": 10.0},
                {
                    "epoch": 2.0,
                    "train_loss": 2 + top / 1e4,
                    "eval_loss": 2 - top / 1e3,
                    "top1": top,
                },
            ],
        }
        for seed, top in enumerate(tops)
    ]


def test_the_standard_error_is_that_of_two_means():
    one, other = [70.0, 71.0, 72.0], [70.0, 74.0]
    expected = math.sqrt(np.var(one, ddof=1) / 3 + np.var(other, ddof=1) / 2)
    assert report.standard_error(one, other) == pytest.approx(expected)
    # A single run has the other side's deviation.
    assert report.standard_error([70.0], one) == pytest.approx(math.sqrt(1 + 1 / 3))
    assert math.isnan(report.standard_error([70.0], [71.0]))


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ([70.0, 70.4, 70.2], [70.1, 70.5, 70.3], "the same"),
        ([70.0, 70.1, 70.2], [71.0, 71.1, 71.2], "differs in top-1 %, evaluation loss, training"),
        ([68.0, 70.0, 72.0], [69.0, 71.0, 73.0], "top-1 differs by over 0.7"),
        ([70.0], [70.0], "differs in"),  # nothing shows what a run's chance is
    ],
)
def test_the_verdict(ours, theirs, verdict):
    compared = report.compare(results("ours", ours), results("timm", theirs), faulty=False)
    assert compared[1].startswith(verdict)


def test_a_fault_is_compared_with_the_reference_of_its_dtype(tmp_path):
    runs = {
        "a": results("ours", [70.0, 70.4, 70.2]),
        "b": results("timm", [70.1, 70.5, 70.3]),
        "c": results("ours", [75.0], fault="no_erasing"),
        "d": results("ours", [70.1], dtype="float32"),
    }
    for name, some in runs.items():
        for number, result in enumerate(some):
            (tmp_path / f"{name}{number}.json").write_text(json.dumps(result))
    text = report.write(tmp_path)
    assert text == (tmp_path / "table.md").read_text().strip()
    assert "| ours | bfloat16 | none | 3 | 70.20 ± 0.12 |" in text
    assert "| ours - timm, bfloat16 | -0.10 ± 0.16 |" in text
    assert "ours with no_erasing - timm, bfloat16 | +4.70 ± 0.23" in text
    assert "the fault shows in top-1 %, evaluation loss, training loss" in text
    assert "timm, float32" not in text
    assert (tmp_path / "curves.png").stat().st_size > 10_000


FAULTS = """
import sys
sys.path.insert(0, "benchmarks")
import duel_fault
import jax, numpy as np
import mambaout_jax
SMALL = {"depths": (1, 1, 1, 1), "widths": (8, 12, 16, 24), "num_classes": 10}
model = mambaout_jax.create_model("mambaout_femto", **SMALL)
images = np.random.RandomState(0).randn(2, 64, 64, 3).astype(np.float32)
params = jax.jit(model.init)(jax.random.key(0), images)
params = jax.tree.map(lambda leaf: leaf * 5, params)
maps = [np.asarray(jax.jit(model.apply)(params, images))]
for fault in (duel_fault.tanh_gelu, duel_fault.same_padding):
    fault()
    model = mambaout_jax.create_model("mambaout_femto", **SMALL)
    maps.append(np.asarray(jax.jit(model.apply)(params, images)))
    gradient = jax.jit(jax.grad(lambda params: model.apply(params, images).sum()))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
print(*[np.abs(one - other).max() / np.abs(one).max() for one, other in zip(maps, maps[1:])])
"""


@pytest.mark.slow
def test_the_faults_change_the_network():
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, cwd=BENCHMARKS.parent
    )
    assert done.returncode == 0, done.stderr
    tanh, padding = map(float, done.stdout.split())
    assert 1e-6 < tanh < 0.1
    assert padding > 1e-3
