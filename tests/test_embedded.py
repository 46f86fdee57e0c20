"""test_mambaout.digits, the weights in the package: what the documentation says of them."""

import re
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

import mambaout_jax
from configs import quickstart
from mambaout_jax import build_data
from mambaout_jax.__main__ import main
from mambaout_jax.data.sources import open_source
from mambaout_jax.models.pretrained import EMBEDDED
from mambaout_jax.weights.load import locate


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def digits():
    """Returns the images and the labels of the evaluation split."""
    dataset = build_data.build_dataset(quickstart.get_config())
    source = open_source(dataset, "validation")
    examples = [source[index] for index in range(len(source))]
    return [example["image"] for example in examples], [example["label"] for example in examples]


def test_the_file_is_small_and_of_this_package():
    path, name = locate(EMBEDDED)
    assert name == EMBEDDED
    assert Path(mambaout_jax.__file__).parent in path.parents
    assert path.stat().st_size < 2**20


def test_the_accuracy_is_the_documented_one():
    page = Path("docs/weights.md").read_text()
    (documented,) = re.findall(rf"{EMBEDDED}: top-1 ([\d.]+)%", page)
    images, labels = digits()
    record = mambaout_jax.preprocessing(EMBEDDED)
    pixels = np.stack([mambaout_jax.preprocess_image(image, record) for image in images])
    model, params = mambaout_jax.load_pretrained(EMBEDDED)
    logits = model.apply(
        {"params": params}, mambaout_jax.normalize(pixels, record.mean, record.std)
    )
    correct = np.argmax(logits, axis=1) == np.array(labels)
    assert 100 * correct.mean() == pytest.approx(float(documented), abs=0.3), "one image of 360"


def test_it_names_the_digits(tmp_path, capsys):
    images, labels = digits()
    index = labels.index(2)
    (tmp_path / "two.png").write_bytes(images[index])
    assert main(["predict", f"--weights={EMBEDDED}", "--top=1", str(tmp_path / "two.png")]) == 0
    assert capsys.readouterr().out.split()[-1] == "2"


def test_a_message_that_misses_the_network_names_it():
    with pytest.raises(mambaout_jax.UserError, match=rf"not in the cache.*{EMBEDDED}.*no network"):
        mambaout_jax.load_pretrained("mambaout_tiny")
    assert EMBEDDED in mambaout_jax.list_pretrained()
