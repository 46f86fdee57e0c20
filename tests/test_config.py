"""Configurations: every file builds, every mistake is named, and a workdir keeps to its run."""

from pathlib import Path

import jax
import pytest

from configs import default
from mambaout_jax import config as configuration
from mambaout_jax.build import build_model, build_preprocessing, build_recipe
from mambaout_jax.errors import UserError
from mambaout_jax.training.optimizer import make_optimizer
from mambaout_jax.training.schedule import make_schedule
from mambaout_jax.training.state import init_params, init_state

CONFIGS = sorted(p for p in Path("configs").glob("*.py") if p.stem not in ("__init__", "default"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds(path):
    config = configuration.load_config(path)
    configuration.check(config)
    model = build_model(config)
    build_recipe(config, steps_per_epoch=10)
    build_preprocessing(config)
    optimizer = make_optimizer(config, make_schedule(config, steps_per_epoch=10))
    state = jax.eval_shape(
        lambda key: init_state(
            init_params(key, model, config.data.image_size), optimizer, ema=False
        ),
        jax.random.key(0),
    )
    assert state.params["head"]["fc2"]["bias"].shape == (config.data.num_classes,)


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
    with pytest.raises(UserError, match="is no duration"):
        configuration.duration_steps(text, steps_per_epoch=10, batch_size=16)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no configuration: expected --config=FILE"),
        (["--config=configs/tinny.py"], "no configuration file .*did you mean 'configs/tiny.py'"),
        (["--config=LICENSE"], "is no configuration"),
        (["--config=configs/__init__.py"], "defines no get_config"),
        (["--config", "configs/tiny.py", "--config.batchsize=3"], "'batchsize'.*'batch_size'"),
        (["--config=configs/tiny.py", "--config.learning_rate=1"], "'schedule.learning_rate'"),
        (["--config=configs/tiny.py", "--config.model.nam=x"], "'model.nam'.*'model.name'"),
        (["--config=configs/tiny.py", "--config.model=x"], "'model' is a section"),
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
        ("schedule.warmup", "5", "config.schedule.warmup: '5' is no duration"),
        ("batch_size", 0, "expected at least 1"),
        ("accumulate_steps", 3, "does not divide into"),
    ],
)
def test_bad_values(key, value, message):
    config = default.get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=message):
        configuration.check(config)


def test_a_workdir_keeps_to_its_run(tmp_path):
    config = default.get_config()
    assert configuration.check_workdir(tmp_path / "run", config)
    configuration.write_config(tmp_path / "run", config)
    config.log.every = "3 steps"
    config.data.workers = 2
    assert not configuration.check_workdir(tmp_path / "run", config)
    config.schedule.learning_rate = 0.5
    with pytest.raises(UserError, match=r"learning_rate is 0.004 there and 0.5 here"):
        configuration.check_workdir(tmp_path / "run", config)


def test_a_folder_of_other_files_is_no_workdir(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="other files and no run"):
        configuration.check_workdir(tmp_path, default.get_config())


def test_a_command_killed_at_its_beginning_leaves_a_workdir_that_is_free(tmp_path):
    (tmp_path / "lock").write_text("")
    (tmp_path / "config.part").write_text('{"se')
    assert configuration.check_workdir(tmp_path, default.get_config())
