"""Configurations: every file builds, every mistake is named, and a workdir keeps to its run."""

from pathlib import Path

import jax
import pytest
from test_finetune import write_classes

from configs import default
from mambaout_jax import config as configuration
from mambaout_jax.build import (
    build_model,
    build_optimizer,
    build_recipe,
    build_schedule,
    build_steps,
)
from mambaout_jax.build_data import build_preprocessing, fill_in
from mambaout_jax.errors import UserError
from mambaout_jax.runtime.workdir import RECORD, check_workdir, keep_record
from mambaout_jax.training.state import init_params, init_state

CONFIGS = sorted(p for p in Path("configs").glob("*.py") if p.stem not in ("__init__", "default"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds(path, tmp_path):
    config = configuration.load_config(path)
    if not config.data.num_classes:  # found in the data
        write_classes(tmp_path, cat=2, dog=2)
        config.data.dir = str(tmp_path)
    fill_in(config)
    configuration.check(config)
    model = build_model(config)
    build_recipe(config, steps_per_epoch=10)
    build_steps(config, steps_per_epoch=10)
    size = build_preprocessing(config).shape
    optimizer = build_optimizer(config, build_schedule(config, steps_per_epoch=10))
    state = jax.eval_shape(
        lambda key: init_state(init_params(key, model, size), optimizer, ema=False),
        jax.random.key(0),
    )
    path = ("head", "fc2") if config.task == "classification" else ("decode_head", "conv_seg")
    assert state.params[path[0]][path[1]]["bias"].shape == (config.data.num_classes,)


def test_the_papers_five_differ_in_model_and_drop_path_alone():
    base = configuration.flatten(default.get_config())
    rates = {"femto": 0.025, "kobe": 0.025, "tiny": 0.2, "small": 0.4, "base": 0.6}
    for name, rate in rates.items():
        flat = configuration.flatten(configuration.load_config(f"configs/{name}.py"))
        expected = {"model.name": f"mambaout_{name}", "model.drop_path_rate": rate}
        assert flat == base | expected


@pytest.mark.parametrize(
    ("text", "steps"),
    [("", 0), ("20 steps", 20), ("1 step", 1), ("2 epochs", 20), ("0.25 epochs", 3),
     ("1_000 examples", 63), ("16 examples", 1)],
)  # fmt: skip
def test_durations(text, steps):
    assert configuration.duration_steps(text, steps_per_epoch=10, batch_size=16) == steps


@pytest.mark.parametrize("text", ["20", "steps", "-1 steps", "3 hours", "1e3 steps"])
def test_bad_durations(text):
    with pytest.raises(UserError, match="is not a duration"):
        configuration.duration_steps(text, steps_per_epoch=10, batch_size=16)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no config: expected --config=FILE"),
        (["--config=configs/tinny.py"], "no config file .*did you mean 'configs/tiny.py'"),
        (["--config=LICENSE"], "is not a config"),
        (["--config=configs/__init__.py"], "defines no get_config"),
        (["--config", "configs/tiny.py", "--config.batchsize=3"], "'batchsize'.*'batch_size'"),
        (["--config=configs/tiny.py", "--config.learning_rate=1"], "'schedule.learning_rate'"),
        (["--config=configs/tiny.py", "--config.model.nam=x"], "'model.nam'.*'model.name'"),
        (["--config=configs/tiny.py", "--config.model=x"], "'model' is a section"),
        (
            ["--config.seed=1", "--config=configs/tiny.py"],
            "--config.seed stands before --config=FILE: put the file first",
        ),
    ],
)
def test_bad_command_lines(argv, message):
    with pytest.raises(UserError, match=message):
        configuration.check_command_line(argv)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.dtype", "bfloat61", "did you mean 'bfloat16'"),
        ("eval.every", "", "expected a duration above zero"),
        ("schedule.warmup", "5", "config.schedule.warmup: '5' is not a duration"),
        ("batch_size", 0, "config.batch_size is 0: expected at least 1"),
        ("accumulate_steps", 3, "does not divide into"),
        ("label_smoothing", 5.0, "config.label_smoothing is 5.0: expected at least 0 and below 1"),
        ("augment.hflip", 7.0, "config.augment.hflip is 7.0: expected at least 0 and at most 1"),
        ("model.drop_path_rate", 1.5, "config.model.drop_path_rate is 1.5"),
        ("optimizer.ema_decay", 1.5, "config.optimizer.ema_decay is 1.5"),
        ("optimizer.eps", 0.0, "expected above 0"),
        ("schedule.learning_rate", -1.0, "config.schedule.learning_rate is -1.0"),
        ("schedule.learning_rate", float("nan"), "config.schedule.learning_rate is nan"),
        ("data.image_size", 0, "config.data.image_size is 0: expected at least 32"),
        ("augment.crop_scale", (0.5, 0.1), "config.augment.crop_scale .* two rising numbers"),
    ],
)
def test_bad_values(key, value, message):
    config = default.get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        configuration.check(config)


def test_every_number_of_the_config_has_a_range():
    flat = configuration.flatten(default.get_config())
    numbers = {key for key, value in flat.items() if type(value) in (int, float)}
    assert numbers == set(configuration.RANGES)
    assert set(configuration.DURATIONS) <= set(flat)
    assert set(configuration.CHOICES) <= set(flat)


def workdir_check(path, **changes):
    record = configuration.flatten(default.get_config()) | changes
    added = {"added": 0} if "added" in changes else {}
    return check_workdir(path, record, configuration.FREE_KEYS, added)


def test_a_workdir_keeps_to_its_run(tmp_path):
    run = tmp_path / "run"
    assert workdir_check(run)
    keep_record(run, configuration.flatten(default.get_config()))
    assert not workdir_check(run, **{"log.every": "3 steps", "data.workers": 2})
    faster = {"accumulate_steps": 4, "model.remat": True, "model.depthwise": "xla"}
    assert not workdir_check(run, **faster, **{"data.backend": "pillow"})
    with pytest.raises(UserError, match=r"learning_rate is 0.004 there and 0.5 here"):
        workdir_check(run, **{"schedule.learning_rate": 0.5})


def test_a_key_that_an_older_run_lacks_has_the_value_that_it_ran_with(tmp_path):
    keep_record(tmp_path, configuration.flatten(default.get_config()))
    assert not workdir_check(tmp_path, added=0)
    with pytest.raises(UserError, match="added is 0 there and 1 here"):
        workdir_check(tmp_path, added=1)


def test_a_folder_of_other_files_is_no_workdir(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="other files and no run"):
        workdir_check(tmp_path)
    with pytest.raises(UserError, match="is a file: choose"):
        workdir_check(tmp_path / "thesis.tex")


@pytest.mark.parametrize(
    "content",
    [b"", b'{"se', b"\x00\xff\xfe", b"[1]", b"[" * 100_000],
    ids=["empty", "cut", "binary", "list", "deep"],
)
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / RECORD).write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json is damaged: restore it"):
        workdir_check(tmp_path)


def test_a_command_killed_while_it_starts_leaves_an_unused_workdir(tmp_path):
    (tmp_path / "lock").write_text("")
    (tmp_path / ".config.json.abc.json").write_text('{"se')
    assert workdir_check(tmp_path)


def test_the_kernels_former_name_in_an_older_run_is_the_one_now():
    config = default.get_config()
    configuration.overlay(config, {"model.depthwise": "pallas_gpu"}, ())
    assert config.model.depthwise == "triton"
    configuration.check(config)
