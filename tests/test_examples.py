"""The examples are better than chance on images that they were not trained on."""

import runpy
import sys
from pathlib import Path

import pytest
import small_weights

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


@pytest.mark.parametrize("name", ["linear_probe.py"])
def test_a_mistake_is_one_line(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, "--weights=nope.pth"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert str(stopped.value.code).startswith("error: ")
    assert "nope.pth" in stopped.value.code
