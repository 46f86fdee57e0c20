"""The learning rate against the reference's, epoch by epoch, and at the boundaries by hand."""

import json

import golden
import jax
import numpy as np
import pytest

from configs import default
from mambaout_jax.build import build_schedule, build_steps
from mambaout_jax.errors import UserError

STEPS_PER_EPOCH = 5


def cosine(progress):
    return 0.5 * (1 + np.cos(np.pi * progress))


def rates(config, steps):
    return np.asarray(jax.vmap(build_schedule(config, STEPS_PER_EPOCH))(np.arange(steps)))


def test_equals_the_reference_in_each_epoch():
    meta = json.loads((golden.DIR / "schedule-mambaout.json").read_text())
    expected = np.repeat(meta["lr_of_epoch"], STEPS_PER_EPOCH)
    config = default.get_config()
    assert build_steps(config, STEPS_PER_EPOCH).total == len(expected)
    np.testing.assert_allclose(rates(config, len(expected)), expected, rtol=0, atol=1e-9)


def test_per_step_moves_within_the_epoch_and_equals_per_epoch_at_its_start():
    per_epoch, config = default.get_config(), default.get_config()
    config.schedule.per = "step"
    steps = np.arange(0, 310 * STEPS_PER_EPOCH, STEPS_PER_EPOCH)
    fine = rates(config, 310 * STEPS_PER_EPOCH)
    coarse = rates(per_epoch, 310 * STEPS_PER_EPOCH)
    np.testing.assert_allclose(fine[steps], coarse[steps], rtol=1e-5)
    assert len(np.unique(fine[:STEPS_PER_EPOCH])) == STEPS_PER_EPOCH


@pytest.mark.parametrize(
    ("key", "value", "step", "expected"),
    [
        ("learning_rate", 1e-3, 20 * STEPS_PER_EPOCH, 1e-5 + 9.9e-4 * cosine(1 / 15)),
        ("warmup_learning_rate", 1e-4, 0, 1e-4),
        ("min_learning_rate", 1e-3, 305 * STEPS_PER_EPOCH, 1e-3),
        ("warmup", "", 0, 4e-3),
        ("duration", "40 epochs", 30 * STEPS_PER_EPOCH, 1e-5 + 3.99e-3 * cosine(3 / 4)),
    ],
)
def test_options_act(key, value, step, expected):
    config = default.get_config()
    config.schedule[key] = value
    np.testing.assert_allclose(rates(config, step + 1)[step], expected, rtol=1e-6)


def test_cooldown_lengthens_the_run():
    config = default.get_config()
    config.schedule.cooldown = "2 steps"
    assert build_steps(config, STEPS_PER_EPOCH).total == 300 * STEPS_PER_EPOCH + 2


@pytest.mark.parametrize("per", ["epoch", "step"])
def test_the_host_computes_the_same_rate_for_the_log(per):
    config = default.get_config()
    config.schedule.per = per
    steps = np.arange(0, 310 * STEPS_PER_EPOCH, 7)
    schedule = build_schedule(config, STEPS_PER_EPOCH)
    on_host = [schedule(step, np) for step in steps]
    np.testing.assert_allclose(on_host, jax.vmap(schedule)(steps), rtol=1e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"duration": "20 epochs"}, "warmup is '20 epochs' and .*duration '20 epochs'"),
        ({"duration": "100 steps"}, "expected a shorter warmup, such as .*warmup=''"),
        ({"warmup": "7 steps"}, "1.40 epochs, and the learning rate moves once an epoch"),
    ],
)
def test_a_warmup_that_does_not_fit_is_refused(keys, message):
    config = default.get_config()
    config.schedule.update(keys)
    with pytest.raises(UserError, match=message):
        build_schedule(config, STEPS_PER_EPOCH)
    config.schedule.update({"warmup": ""})
    build_schedule(config, STEPS_PER_EPOCH)
