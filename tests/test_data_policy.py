"""Policy strings, the frequencies of operations and the distribution of magnitudes."""

import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageOps

from mambaout_jax.data import image_ops, randaugment
from mambaout_jax.data.randaugment import parse_policy
from mambaout_jax.errors import UserError

BICUBIC = (Image.Resampling.BICUBIC,)
IMAGE = Image.fromarray(np.random.RandomState(0).randint(0, 256, (24, 24, 3), np.uint8))


@pytest.fixture
def calls(monkeypatch):
    """Every operation called, as (name, level, sign, filter), instead of being done."""
    made = []

    def recorder(name):
        def record(image, level, sign, filter_):
            made.append((name, level, sign, filter_))
            return image

        return record

    recorders = {name: recorder(name) for name in image_ops.OPERATIONS}
    monkeypatch.setattr(randaugment.image_ops, "OPERATIONS", recorders)
    return made


def run(text, count, filters=BICUBIC):
    policy, rng = parse_policy(text, filters, image_ops.OPERATIONS), np.random.default_rng(0)
    for _ in range(count):
        policy(IMAGE, rng)


def assert_frequencies(counts, odds, total):
    """Each count within 3.5 standard deviations of its expectation."""
    assert set(counts) <= set(odds)
    for name, part in odds.items():
        deviation = math.sqrt(total * part * (1 - part))
        assert abs(counts[name] - total * part) < 3.5 * deviation, name


def test_the_papers_policy(calls):
    filters = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)
    run("rand-m9-mstd0.5-inc1", 4000, filters)
    assert abs(len(calls) - 4000) < 3.5 * math.sqrt(8000 / 4)  # two draws, each done half the time
    names, levels, signs, drawn = zip(*calls, strict=True)
    assert_frequencies(Counter(names), dict.fromkeys(randaugment._INCREASING, 1 / 15), len(calls))
    assert_frequencies(Counter(signs), {1: 0.5, -1: 0.5}, len(calls))
    assert_frequencies(Counter(drawn), dict.fromkeys(filters, 0.5), len(calls))
    clipped = 0.5 * math.erfc(2 / math.sqrt(2))  # of N(9, 0.5), what lies above 10
    share = np.mean(np.array(levels) == 10)
    assert abs(share - clipped) < 3.5 * math.sqrt(clipped / len(calls))
    assert np.median(levels) == pytest.approx(9, abs=0.05)
    below = np.mean(np.array(levels) < 8.5)  # one standard deviation
    assert below == pytest.approx(0.1587, abs=3.5 * math.sqrt(0.16 * 0.84 / len(calls)))


def test_sections_act(calls):
    run("rand-m7-n3-p1", 100)
    assert len(calls) == 300
    assert {level for _, level, _, _ in calls} == {7.0}
    assert {name for name, *_ in calls} == set(randaugment._PLAIN)
    calls.clear()
    run("rand-m20-mmax30-p1", 10)
    assert {level for _, level, _, _ in calls} == {20.0}
    calls.clear()
    run("rand-m20-p1", 10)
    assert {level for _, level, _, _ in calls} == {10.0}


def test_a_great_deviation_means_uniform(calls):
    run("rand-m8-mstd101-p1", 1000)
    levels = np.sort([level for _, level, _, _ in calls]) / 8
    ranks = np.arange(1, 2001) / 2000
    assert np.abs(levels - ranks).max() < 1.63 / math.sqrt(2000)


def test_weighted_sets_draw_without_replacement(calls):
    run("rand-tweights-n1-p1", 3000)
    weights = randaugment._WEIGHTS
    odds = {name: weight / sum(weights.values()) for name, weight in weights.items()}
    assert_frequencies(Counter(name for name, *_ in calls), odds, 3000)
    calls.clear()
    run("rand-w0-inc1-n1-p1", 3000)
    counts = Counter(name.replace("Increasing", "") for name, *_ in calls)
    assert_frequencies(counts, randaugment._WEIGHTS_OLD, 3000)
    assert "ColorIncreasing" in {name for name, *_ in calls}
    calls.clear()
    run("rand-t3a-n3-p1", 300)
    assert {name for name, *_ in calls} == {"SolarizeIncreasing", "Desaturate", "GaussianBlur"}
    calls.clear()
    run("rand-t3aw-n2-p1", 300)
    names = [name for name, *_ in calls]
    assert all(a != b for a, b in zip(names[::2], names[1::2], strict=True))


def test_three_augment_takes_one_of_three_with_even_odds():
    policy, rng = parse_policy("3a", BICUBIC), np.random.default_rng(0)
    solarized = ImageOps.solarize(IMAGE, 128).tobytes()
    grey = IMAGE.convert("L").convert("RGB").tobytes()
    forms = {solarized: "solarized", grey: "grey"}
    counts = Counter(forms.get(policy(IMAGE, rng).tobytes(), "blurred") for _ in range(600))
    assert_frequencies(counts, dict.fromkeys(("solarized", "grey", "blurred"), 1 / 3), 600)


def test_no_policy_leaves_the_image():
    assert parse_policy("", BICUBIC)(IMAGE, np.random.default_rng(0)) is IMAGE


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("rand-m9-w1", "'w1'"),
        ("rand-m", "'m'"),
        ("rand-mstd-inc1", "'mstd'"),
        ("rand-tother", "'tother'"),
        ("augmix-m5", "expected .rand-"),
        ("rand-m9-n20-tweights", "n20 is more than the 15 operations"),
    ],
)
def test_unknown_sections_are_named(text, part):
    with pytest.raises(UserError, match=part):
        parse_policy(text, BICUBIC)
