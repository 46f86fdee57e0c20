"""The checkpoints of tests/checkpoints, which earlier versions wrote, are read from now on."""

import json
import shutil
from pathlib import Path

import jax
import make_checkpoints
import numpy as np
import pytest
from etils import epath

from mambaout_jax.training import checkpoint, restore
from mambaout_jax.weights.info import FORMAT
from mambaout_jax.weights.store import load_weights

FOLDER = Path(__file__).parent / "checkpoints"
FORMATS = range(FORMAT + 1)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def record(directory):
    return json.loads((directory / "meta" / "metadata").read_text())


def test_every_format_has_its_checkpoints():
    names = {f"{kind}-{version}" for kind in ("converted", "run") for version in FORMATS}
    assert {path.name for path in FOLDER.iterdir()} == names
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < 1_200_000


@pytest.mark.parametrize("version", FORMATS)
def test_a_converted_checkpoint(version):
    params, info = load_weights(FOLDER / f"converted-{version}")
    assert_equal(params, make_checkpoints.params(0))
    assert info.create_model() == make_checkpoints.INFO.create_model()
    assert info.preprocessing == make_checkpoints.INFO.preprocessing
    assert info.class_names == make_checkpoints.INFO.class_names
    assert len(info.digest) == 64


@pytest.mark.parametrize("version", FORMATS)
def test_the_weights_of_a_run(version):
    params, info = load_weights(FOLDER / f"run-{version}")
    assert_equal(params, make_checkpoints.params(1))
    assert info.averaged
    assert info.metrics == make_checkpoints.INFO.metrics
    items = {"params", "ema_params", "optimizer"}
    assert set(info.fingerprints) == (set() if version == 0 else items)


@pytest.mark.parametrize("version", FORMATS)
def test_the_state_of_a_run(version, tmp_path):
    shutil.copytree(FOLDER / f"run-{version}", tmp_path / "run")  # a manager may clean up
    state = make_checkpoints.state()
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    with checkpoint.open_checkpoints(epath.Path(tmp_path / "run"), keep=1) as manager:
        found = restore.restore_newest(manager, abstract)
    assert found is not None
    restored, data = found
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), restored, state)
    assert_equal(restored.params, state.params)
    assert data["batches"] == {"step": make_checkpoints.STEP}


def test_today_the_newest_format_is_written(tmp_path):
    """A change of what is written needs a new format, and its checkpoints here."""
    make_checkpoints.main(tmp_path)
    for name, step in ((f"converted-{FORMAT}", "."), (f"run-{FORMAT}", "checkpoints/3")):
        assert record(tmp_path / name / step) == record(FOLDER / name / step)
