"""Damage to the files of a run's checkpoint beside its arrays, as a resumed run finds it."""

import collections
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import make_checkpoints
import numpy as np
import pytest
from etils import epath

from mambaout_jax.errors import UserError
from mambaout_jax.training import checkpoint
from mambaout_jax.training.restore import check_model, restore_newest
from mambaout_jax.weights.store import load_weights

INFO = dataclasses.replace(make_checkpoints.INFO, averaged=True)
STATE = make_checkpoints.state()


def data(step):
    losses = {"total": 1.25, "count": 3, "bad": 0}
    rows = [{"step": 2, "top1": 12.5}]
    return {"batches": {"step": step}, "losses": losses, "rows": rows, "evaluated": True}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A workdir with the checkpoints 2 and 3."""
    workdir = epath.Path(tmp_path_factory.mktemp("whole"))
    with checkpoint.open_checkpoints(workdir, keep=5) as manager:
        for step in (2, 3):
            state = dataclasses.replace(STATE, step=jnp.asarray(step, jnp.int32))
            metrics = {"top1": float(step)}
            info = dataclasses.replace(INFO, metrics=metrics)
            checkpoint.save(manager, state, data(step), info, metrics)
    return workdir


@pytest.fixture
def workdir(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    return epath.Path(tmp_path / "run")


def resume(workdir):
    """Returns the step that a run resumes at; its arrays and data must be those saved."""
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), STATE
    )
    with checkpoint.open_checkpoints(workdir, keep=5) as manager:
        check_model(manager, INFO)
        state, found = restore_newest(manager, abstract)
        manager.best_step()
    step = int(state.step)
    expected = dataclasses.replace(STATE, step=jnp.asarray(step, jnp.int32))
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert found == data(step)
    return step


def names(workdir):
    return {path.name for path in (workdir / "checkpoints").iterdir()}


def test_a_step_that_is_damaged_again_is_set_aside_beside_the_first(whole, workdir):
    steps = workdir / "checkpoints"
    for count in (1, 2, 3):
        (steps / "3/data/metadata").write_text("")
        assert resume(workdir) == 2
        assert len(names(workdir)) == 1 + count
        shutil.copytree(whole / "checkpoints/3", steps / "3")
    assert names(workdir) == {"2", "3", "3.damaged", "3.2.damaged", "3.3.damaged"}
    assert resume(workdir) == 3


@pytest.mark.parametrize(
    "content", ["{}", "[]", "3", "null", '{"top1": "x"}', '{"top1": null}', '{"top1": 9}']
)
def test_metrics_that_are_not_those_of_the_description(workdir, content):
    (workdir / "checkpoints/3/metrics/metrics").write_text(content)
    assert resume(workdir) == 2
    assert names(workdir) == {"2", "3.damaged"}


DEEP = "[" * 100_000


@pytest.mark.parametrize("content", ["{}", "[]", "null", DEEP], ids=["{}", "[]", "null", "deep"])
@pytest.mark.parametrize("item", ["data", "meta", "params/_METADATA"])
def test_valid_json_of_another_kind(workdir, item, content):
    path = workdir / "checkpoints/3" / item
    (path / "metadata" if path.is_dir() else path).write_text(content)
    assert resume(workdir) == 2


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "3", '{"item_handlers": 3}', '{"commit_timestamp_nsecs": "x"}', DEEP),
        '{"commit_timestamp_nsecs": 1000000000000000000000000000000}',
    ],
    ids=["[]", "3", "handlers", "time", "deep", "late"],
)
def test_orbax_own_record_of_another_kind(workdir, content, caplog):
    (workdir / "checkpoints/3/_CHECKPOINT_METADATA").write_text(content)
    assert resume(workdir) == 2
    assert names(workdir) == {"2", "3.damaged"}
    assert "checkpoint 3 is damaged: _CHECKPOINT_METADATA cannot be read" in caplog.text


@pytest.mark.parametrize("content", ["", "{}", "null", "\x00"])
def test_orbax_own_record_is_not_needed(workdir, content):
    (workdir / "checkpoints/3/_CHECKPOINT_METADATA").write_text(content)
    assert resume(workdir) == 3


@pytest.mark.parametrize(
    ("key", "value"), [("batches", {"step": 2}), ("rows", []), ("losses", {}), ("evaluated", False)]
)
def test_a_position_that_changed_is_damage(workdir, key, value):
    path = workdir / "checkpoints/3/data/metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert resume(workdir) == 2


def test_a_copy_under_another_number_is_damage(workdir):
    shutil.copytree(workdir / "checkpoints/3", workdir / "checkpoints/4")
    assert resume(workdir) == 3
    assert names(workdir) == {"2", "3", "4.damaged"}


def test_stray_files_and_folders_are_no_checkpoints(workdir):
    """Only files that have the name of a step are renamed: a later save would fail."""
    steps = Path(workdir / "checkpoints")
    for name in ("notes.txt", "004", "9"):
        (steps / name).write_text("")
    for name in ("\N{SUPERSCRIPT TWO}", "notes"):
        (steps / name).mkdir()
    (steps / "12").symlink_to("missing")
    assert load_weights(workdir)[1].metrics == {"top1": 3.0}
    assert resume(workdir) == 3
    stray = {"notes.txt", "004", "9.damaged", "\N{SUPERSCRIPT TWO}", "notes", "12.damaged"}
    assert names(workdir) == {"2", "3"} | stray


def test_a_file_in_place_of_the_folder_is_named(workdir):
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints").write_text("")
    with pytest.raises(UserError, match=r"/checkpoints is a file, not a folder"):
        resume(workdir)


@pytest.mark.parametrize("flips", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_flipped_bits(whole, tmp_path, flips):
    """Of any file of the newest checkpoint; half of the time each file is as likely."""
    found = sorted(path for path in Path(whole / "checkpoints/3").rglob("*") if path.is_file())
    files = [path for path in found if path.stat().st_size]
    sizes = np.array([path.stat().st_size for path in files])
    outcomes: collections.Counter[int] = collections.Counter()
    for seed in range(flips):
        random = np.random.default_rng(seed)
        file = files[random.choice(len(files), p=None if seed % 2 else sizes / sizes.sum())]
        workdir = epath.Path(tmp_path / str(seed))
        shutil.copytree(whole, workdir)
        content = bytearray(file.read_bytes())
        content[random.integers(len(content))] ^= 1 << int(random.integers(8))
        (workdir / file.relative_to(whole)).write_bytes(content)
        outcomes[resume(workdir)] += 1
        shutil.rmtree(workdir)
    print(f"\n| resumed from step 3, equal | {outcomes[3]} |")
    print(f"| set aside, resumed from step 2 | {outcomes[2]} |")
    assert sum(outcomes.values()) == flips
