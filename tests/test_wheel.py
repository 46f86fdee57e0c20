"""The wheel alone, without the checkout: its files, its metadata, its command."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from mambaout_jax import cli, config
from mambaout_jax.__main__ import main
from mambaout_jax.cli import train
from mambaout_jax.errors import UserError

ROOT = Path(__file__).parents[1]
SOURCES = ("mambaout_jax", "configs", "main.py", "setup.py", "pyproject.toml", "README.md",
           "LICENSE", "MANIFEST.in", "CHANGELOG.md", "CITATION.cff")  # fmt: skip
BUILD = """
from setuptools import build_meta
print(build_meta.build_sdist("dist"))
print(build_meta.build_wheel("dist"))
"""


def test_a_config_goes_by_its_name_or_its_path():
    path = str(ROOT / "configs" / "tiny.py")
    rest = ["--workdir=w", "--config.seed=1"]
    for arguments in (["--config=tiny"], ["-config=tiny"]):
        assert train.resolve_configs([*arguments, *rest]) == [
            arguments[0].replace("tiny", path),
            *rest,
        ]
    assert train.resolve_configs(["--config", "tiny", *rest]) == ["--config", path, *rest]
    for argument in ("--config=configs/tiny.py", "--config=own.py", "--config=", "--mode=eval"):
        assert train.resolve_configs([argument]) == [argument]
    assert config.load_config(path).model.name == "mambaout_tiny"


def test_an_unknown_config_is_one_sentence(capsys):
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        train.resolve_config("tinny")
    assert main(["train", "--config=tinny"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: unknown config 'tinny'")
    assert "quickstart" in error
    assert error.count("\n") == 1
    for arguments in (["train"], ["eval", "--workdir=w"], ["train", "--config.seed=1"]):
        assert main(arguments) == 1
        message = "no config: expected --config=NAME or a .py file, such as quickstart"
        assert capsys.readouterr().err == f"error: {message}\n"


def run(command, folder, **environment):
    """Runs a command without this checkout's PYTHONPATH; returns what it printed."""
    kept = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "XLA_FLAGS")
    }
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The sdist and the wheel, built from copies of the tracked files."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("source")
    command = ["git", "ls-files", "-z", "--", *SOURCES]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in files.split("\0")[:-1]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    run([sys.executable, "-c", BUILD], folder)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    # The wheel of a release is built from the sdist.
    run(["tar", "xzf", sdist], folder)
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    run([sys.executable, "-c", BUILD], unpacked)
    (wheel,) = (unpacked / "dist").glob("*.whl")
    (direct,) = (folder / "dist").glob("*.whl")
    names = [sorted(zipfile.ZipFile(path).namelist()) for path in (wheel, direct)]
    assert names[0] == names[1], "the sdist lacks files of the wheel"
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(archives, tmp_path_factory):
    """The bin folder of a fresh environment with the wheel, and the dependencies of this one."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth file: the .pth files in that folder, such as an editable install's, are not
    # read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    run([*pip, "install", "-q", "--no-deps", "--no-index", archives[1]], folder)
    return python.parent


@pytest.mark.slow
def test_the_archives_pass_twine(archives):
    pytest.importorskip("twine", reason="twine is not installed (extra: release)")
    out = run([sys.executable, "-m", "twine", "check", "--strict", *archives], ROOT)
    assert out.count("PASSED") == 2


@pytest.mark.slow
def test_the_wheel_has_configs_main_and_weights(archives):
    names = set(zipfile.ZipFile(archives[1]).namelist())
    for path in (ROOT / "configs").glob("*.py"):
        assert f"mambaout_jax/shipped/configs/{path.name}" in names
    assert {"mambaout_jax/shipped/main.py", "mambaout_jax/weights/digits.safetensors"} <= names
    assert not [name for name in names if name.startswith(("configs/", "tests/", "main.py"))]
    assert cli.__name__.replace(".", "/") + "/train.py" in names


@pytest.mark.slow
def test_the_wheel_alone_trains_evaluates_and_predicts(installed, tmp_path):
    command = installed / "mambaout-jax"
    where = "import mambaout_jax; print(mambaout_jax.__file__)"
    assert str(installed.parent) in run([installed / "python", "-c", where], tmp_path)
    keys = ["--config.schedule.duration=4 steps", "--config.schedule.warmup=", "--workdir=w"]
    keys += ["--config.eval.every=4 steps", "--config.data.workers=1"]
    out = run([command, "train", "--config=quickstart", *keys], tmp_path, JAX_PLATFORMS="cpu")
    assert "finished: 4 steps" in out
    (tmp_path / "own.py").write_text("from configs.quickstart import get_config as get_config\n")
    out = run([command, "eval", "--config=own.py", "--workdir=w"], tmp_path)
    assert "w on digits/1.0.0/validation: top-1" in out
    image = ROOT / "docs" / "images" / "curves.png"
    out = run([command, "predict", "--weights=test_mambaout.digits", image], tmp_path)
    assert len(out.splitlines()) == 6
