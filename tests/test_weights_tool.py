"""The command line of the converter: its report, its outputs, its errors."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import golden
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mambaout_jax.weights import torch_file, verify
from mambaout_jax.weights.store import digest, load_weights
from mambaout_jax.weights.torch_layout import from_torch
from tools import convert_torch_weights as tool

ROOT = Path(__file__).parents[1]
NAME = "test_mambaout"
installed = {name: importlib.util.find_spec(name) is not None for name in ("torch", "timm")}
needs_timm = pytest.mark.skipif(
    not all(installed.values()), reason="torch and timm are not installed"
)


@pytest.fixture(scope="module")
def tensors():
    meta, _ = golden.load("test_mambaout-timm-160")
    return golden.weights(meta["state_dict"], meta["seed"])


@pytest.fixture
def source(tensors, tmp_path):
    save_file(tensors, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def refused(capsys, *args):
    """Runs the tool, which must fail, and returns what it said."""
    with pytest.raises(SystemExit) as exit_:
        tool.main([str(arg) for arg in args])
    assert isinstance(exit_.value.code, str), "the interpreter prints a string and exits with 1"
    assert exit_.value.code.startswith("error: ")
    assert "\n" not in exit_.value.code
    assert "written" not in capsys.readouterr().out
    return exit_.value.code


def test_the_script_converts_there_and_back(source, tensors, tmp_path):
    def run(*args):
        command = [sys.executable, "tools/convert_torch_weights.py", *map(str, args)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = run(f"--model={NAME}", f"--input={source}", f"--output={tmp_path / 'dir'}")
    assert done.returncode == 0, done.stderr
    params = from_torch(tensors, NAME)
    assert done.stdout.splitlines() == [
        f"input: {source}, timm layout, 78 float32",
        f"model: {NAME}",
        "mapped: 78 tensors, 447,560 parameters, 1,000 classes",
        f"digest: sha256 {digest(params)}",
        f"written: {tmp_path / 'dir'}",
    ]
    assert load_weights(tmp_path / "dir")[1].digest == digest(params)
    done = run(f"--input={source}", f"--output={tmp_path / 'dir'}")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the output")
    assert done.stderr.count("\n") == 1


def test_back_to_torch_in_both_layouts(tmp_path, capsys):
    meta, _ = golden.load("mambaout_femto-original-224")
    original = golden.weights(meta["state_dict"], meta["seed"])
    save_file(original, tmp_path / "w.safetensors")
    tool.main([f"--input={tmp_path / 'w.safetensors'}", f"--output={tmp_path / 'dir'}"])
    assert "original layout" in capsys.readouterr().out
    meta, _ = golden.load("mambaout_femto-timm-224")
    timm_names = {name for name, _ in meta["state_dict"]}
    for layout, names in (("original", original.keys()), ("timm", timm_names)):
        path = tmp_path / f"{layout}.safetensors"
        tool.main(
            ["--to-torch", f"--layout={layout}", f"--input={tmp_path / 'dir'}", f"--output={path}"]
        )
        assert load_file(path).keys() == names
    for name, array in load_file(tmp_path / "original.safetensors").items():
        assert array.tobytes() == original[name].tobytes()


def test_refusals_leave_nothing(source, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "dir"
    message = refused(capsys, f"--input={source}", f"--output={out}", "--model=mambaout_tiny")
    assert "they fit test_mambaout with num_classes=1000" in message
    message = refused(capsys, f"--input={source}", f"--output={out}", "--model=mambaout_tinny")
    assert "did you mean 'mambaout_tiny'" in message
    message = refused(capsys, f"--input={tmp_path}", f"--output={out}")
    assert "expected a file" in message
    source.write_bytes(source.read_bytes()[:-1])
    assert "truncated" in refused(capsys, f"--input={source}", f"--output={out}")
    assert sorted(tmp_path.iterdir()) == before


def test_an_output_below_a_file_is_refused(source, capsys):
    message = refused(capsys, f"--input={source}", f"--output={source / 'dir'}")
    assert "cannot write" in message
    back = ["--to-torch", f"--input={source}", f"--output={source / 'w.safetensors'}"]
    assert "cannot write" in refused(capsys, *back)


def test_layout_is_for_to_torch(source, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        tool.main([f"--input={source}", f"--output={tmp_path / 'dir'}", "--layout=timm"])
    assert exit_.value.code == 2
    assert "--layout is for --to-torch" in capsys.readouterr().err


def test_verify_says_what_is_missing(source, tmp_path, capsys, monkeypatch):
    args = (f"--input={source}", f"--output={tmp_path / 'dir'}", "--verify")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "needs torch, which is not installed: pip install 'mambaout_jax[verify]'" in refused(
        capsys, *args
    )
    monkeypatch.setattr(verify, "import_torch", lambda what, extra: None)
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.models", None)
    assert "needs timm, which is not installed: pip install 'mambaout_jax[verify]'" in refused(
        capsys, *args
    )
    assert not (tmp_path / "dir").exists()


def test_a_difference_stops_the_conversion(source, tmp_path, capsys, monkeypatch):
    args = [f"--input={source}", f"--output={tmp_path / 'dir'}", "--verify"]
    for difference in (0.01, np.nan):
        monkeypatch.setattr(tool, "largest_difference", lambda *_, d=difference: (d, 2.0))
        assert "larger than rounding errors" in refused(capsys, *args)
    assert not (tmp_path / "dir").exists()
    monkeypatch.setattr(tool, "largest_difference", lambda *_: (1e-5, 2.0))
    tool.main(args)
    assert "differ from timm's by at most 1.00e-05" in capsys.readouterr().out


@needs_timm
@pytest.mark.parametrize("case", ["mambaout_femto-original-224", "test_mambaout-timm-160"])
def test_verify_runs_both_networks(tmp_path, case):
    import torch

    meta, _ = golden.load(case)
    tensors = golden.weights(meta["state_dict"], meta["seed"])
    save_file(tensors, tmp_path / "w.safetensors")
    tool.main([f"--input={tmp_path / 'w.safetensors'}", f"--output={tmp_path / 'd'}", "--verify"])
    tool.main(["--to-torch", f"--input={tmp_path / 'd'}", f"--output={tmp_path / 'w.pth'}"])
    params, info = load_weights(tmp_path / "d")
    params["head"]["fc2"]["bias"][3] += 1
    difference, _ = verify.largest_difference(tensors, params, info)
    np.testing.assert_allclose(difference, 1, atol=1e-3)

    from timm.models import create_model

    create_model(meta["variant"]).load_state_dict(torch.load(tmp_path / "w.pth"), strict=True)
    file = torch_file.read_state_dict(tmp_path / "w.pth")
    difference, largest = verify.largest_difference(
        file.tensors, load_weights(tmp_path / "d")[0], info
    )
    assert difference < 1e-4 * max(1, largest)
