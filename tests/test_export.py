"""The exported network runs without this package, at any batch size, with the model's logits."""

import json
import re
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
import small_weights

from mambaout_jax import load_pretrained
from mambaout_jax.__main__ import main
from mambaout_jax.data.preprocess import normalize
from mambaout_jax.inference.export import export_program
from mambaout_jax.labels import imagenet_names

pytest.importorskip("flatbuffers", reason="jax.export writes with flatbuffers (extra: export)")

GROUPED = r"feature_group_count = (?!1 )\d+"  # of XLA's depthwise convolutions
LOADER = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[4:]:
            raise ImportError(f"{name} is not needed")
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, "examples")
import numpy as np, run_exported
network, labels = run_exported.load(sys.argv[1])
images = np.load(sys.argv[2])
np.savez(sys.argv[3], *[network(images[:batch]) for batch in (1, 3)])
print(len(labels), labels[1])
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return small_weights.write(tmp_path_factory.mktemp("weights") / "w")


@pytest.fixture(scope="module")
def exported(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "network.zip"
    assert main(["export", "--weights", str(weights), str(path)]) == 0
    return path


def test_the_logits_without_this_package_are_the_models(weights, exported, tmp_path):
    images = np.random.RandomState(0).randint(0, 256, (3, 32, 32, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    files = [str(exported), str(tmp_path / "images.npy"), str(tmp_path / "logits.npz")]
    blocked = ["mambaout_jax", "flax", "PIL", "optax", "orbax", "flatbuffers"]
    result = subprocess.run(
        [sys.executable, "-c", LOADER, *files, *blocked],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == "1000 goldfish, Carassius auratus\n"
    model, params = load_pretrained(weights)
    p = small_weights.INFO.preprocessing
    want = jax.jit(model.apply)({"params": params}, normalize(images, p.mean, p.std))
    with np.load(tmp_path / "logits.npz") as logits:
        for name, batch in (("arr_0", 1), ("arr_1", 3)):
            assert logits[name].shape == (batch, 1000)
            np.testing.assert_allclose(logits[name], want[:batch], rtol=1e-4, atol=1e-5)


def test_a_program_for_cpus_has_their_depthwise_convolution(weights):
    model, params = load_pretrained(weights)
    programs = {
        platform: export_program(model, params, small_weights.INFO, platforms=(platform,))
        for platform in ("cpu", "tpu")
    }
    grouped = {name: re.findall(GROUPED, text.mlir_module()) for name, text in programs.items()}
    assert not grouped["cpu"]
    assert grouped["tpu"]


def test_what_is_beside_the_network(exported):
    with zipfile.ZipFile(exported) as archive:
        serialized = archive.read("network.jax")
        about = json.loads(archive.read("network.json"))
        assert archive.read("labels.txt").decode().splitlines() == list(imagenet_names())
        record = json.loads(archive.read("preprocessing.json"))
    program = jax.export.deserialize(bytearray(serialized))
    assert program.platforms == ("cpu", "cuda", "tpu") == tuple(about["platforms"])
    assert program.mlir_module_serialized == serialized[slice(*about["stablehlo"])]
    assert program.calling_convention_version == about["version"]
    assert program.in_avals[-1].shape[1:] == tuple(about["shape"]) == (32, 32, 3)
    assert record["size"] == 32
    assert record["crop_pct"] == 0.9
    assert record["mean"] == [0.485, 0.456, 0.406]


def test_one_platform(weights, tmp_path):
    path = tmp_path / "network.zip"
    assert main(["export", "--weights", str(weights), "--platforms", "tpu", "--", str(path)]) == 0
    with zipfile.ZipFile(path) as archive:
        program = jax.export.deserialize(bytearray(archive.read("network.jax")))
    assert program.platforms == ("tpu",)


def test_mistakes(weights, exported, tmp_path, capsys):
    assert main(["export", "--weights", str(weights), str(exported)]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["export", "--weights", str(tmp_path / "no.pth"), str(tmp_path / "x.zip")]) == 1
    assert "no.pth" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["export", "--weights", str(weights), str(tmp_path / "file" / "x.zip")]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_flatbuffers_is_asked_for(weights, tmp_path, monkeypatch, capsys):
    def missing(*_, **__):
        raise ImportError("flatbuffers")

    monkeypatch.setattr(jax.export.Exported, "serialize", missing)
    assert main(["export", "--weights", str(weights), str(tmp_path / "x.zip")]) == 1
    assert "pip install 'mambaout_jax[export]'" in capsys.readouterr().err
    assert not (tmp_path / "x.zip").exists()
