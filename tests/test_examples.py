"""The examples are better than chance on images that they were not trained on."""

import runpy
import sys
from pathlib import Path

import pytest
import small_weights
from PIL import Image

pytest.importorskip("skimage", reason="the examples' images come with scikit-image")

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return small_weights.write(tmp_path_factory.mktemp("weights") / "w", num_classes=0)


def load(name):
    return runpy.run_path(str(EXAMPLES / name))


def test_a_linear_probe_finds_faces(weights, capsys):
    accuracy = load("linear_probe.py")["main"]([f"--weights={weights}"])
    assert accuracy > 0.8, "half of the images are faces"
    assert f"on the 50 evaluation images: {accuracy:.1%}" in capsys.readouterr().out


def test_a_head_on_all_four_levels_finds_coins(weights, tmp_path, capsys):
    example = load("segmentation.py")
    _, mask = example["coins"]()
    everything = mask[:, example["CUT"] :].mean()  # the score of calling every pixel a coin
    output = tmp_path / "coins.png"
    score = example["main"]([f"--weights={weights}", f"--output={output}", "--steps=60"])
    assert score > max(0.6, 1.5 * everything)
    assert f"{score:.1%}" in capsys.readouterr().out
    with Image.open(output) as image:
        assert image.size == (384 - example["CUT"], 303)


@pytest.mark.parametrize("name", ["linear_probe.py", "segmentation.py"])
def test_a_mistake_is_one_line(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, "--weights=nope.pth"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert str(stopped.value.code).startswith("error: ")
    assert "nope.pth" in stopped.value.code
