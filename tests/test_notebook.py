"""The notebook: its first cell, and all of it run on a CPU, without a network and with the hub."""

import base64
import copy
import functools
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import golden
import jax
import numpy as np
import pytest
import small_weights
from compiler_flags import FAST_COMPILATION
from hub_server import HubServer, serving
from PIL import Image
from safetensors.numpy import save_file

from mambaout_jax.inference.heatmap import class_activation_map
from mambaout_jax.inference.predictor import forward

nbclient = pytest.importorskip("nbclient", reason="the notebook is run by nbclient (extra: test)")
nbformat = pytest.importorskip("nbformat", reason="the notebook is read by nbformat (extra: test)")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "inference.ipynb"
NAME = "mambaout_femto"
NOTE = """*Run by the tests on two CPU devices, without a network: with the model of handwritten
digits that ships with the package.*"""
CHECK = 'import sys; assert not {"tensorflow", "torch"} & sys.modules.keys()'


def printed(cell):
    return "".join(o.get("text", "") for o in cell.outputs if o.get("name") == "stdout")


def keep(notebook, path):
    """Writes the executed notebook with a note, without warnings, and with images only as JPEG."""
    shown = copy.deepcopy(notebook)
    shown.cells.insert(0, nbformat.v4.new_markdown_cell(NOTE, id="note"))
    for cell in shown.cells[1:]:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                png = io.BytesIO(base64.b64decode(output.data.pop("image/png")))
                jpeg = io.BytesIO()
                Image.open(png).convert("RGB").save(jpeg, "JPEG", quality=80)
                output.data["image/jpeg"] = base64.b64encode(jpeg.getvalue()).decode()
    nbformat.write(shown, path)


def code_cells():
    """Returns the cells of code by their names."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    return {cell.id: cell.source for cell in cells if cell.cell_type == "code"}


def execute(notebook, folder, **variables):
    """Runs the cells with two CPU devices, in a folder."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {
        "HF_HOME": str(folder / "hub"),
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {FAST_COMPILATION}",
    }
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=environment | variables)
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What a clone of the repository has, for pip."""
    clone = tmp_path_factory.mktemp("clone") / "clone"
    clone.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "main.py", "MANIFEST.in"):
        shutil.copy(ROOT / name, clone)
    for name in ("mambaout_jax", "configs", "notebooks"):
        shutil.copytree(ROOT / name, clone / name)
    return clone


def requirement(folder, monkeypatch, source=""):
    """Returns what the first cell passes to pip, in a folder with this SOURCE."""
    cell = code_cells()["install"].replace('SOURCE = ""', f"SOURCE = {source!r}")
    cell = cell.replace('%pip install -q "{requirement}"', "pass")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    variables = {}
    exec(cell, variables)
    monkeypatch.undo()
    return variables["requirement"]


PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
# Where setuptools is installed, nothing is downloaded.
ISOLATION = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []


def install(requirement, folder):
    """Installs what the first cell does, without dependencies, and uses it."""
    command = [*PIP, "install", "--no-deps", *ISOLATION, "--target", folder / "site", requirement]
    subprocess.run(command, check=True)
    code = (
        "import mambaout_jax.labels as l; print(l.__file__, len(l.imagenet_subset('imagenet_a')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(folder / "site")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"{folder}/site/mambaout_jax/labels/__init__.py 200\n"


def test_the_first_cell_installs_a_wheel_beside_the_notebook(clone, tmp_path, monkeypatch):
    wheel = [*PIP, "wheel", "--no-deps", *ISOLATION, f"--wheel-dir={tmp_path}", str(clone)]
    subprocess.run(wheel, check=True)
    (file,) = tmp_path.glob("*.whl")
    assert requirement(tmp_path, monkeypatch) == f"mambaout_jax[fast] @ file://{file}"
    install(requirement(tmp_path, monkeypatch), tmp_path)


def test_the_first_cell_installs_the_clone_or_a_repository(clone, tmp_path, monkeypatch):
    around = requirement(clone / "notebooks", monkeypatch)
    assert around == f"mambaout_jax[fast] @ file://{clone}"
    given = requirement(tmp_path, monkeypatch, "git+https://example.org/mambaout_jax")
    assert given == "mambaout_jax[fast] @ git+https://example.org/mambaout_jax"


@pytest.mark.slow
def test_pip_takes_the_clone_and_a_git_repository(clone, tmp_path, monkeypatch):
    for name in ("clone", "git"):
        (tmp_path / name).mkdir()
    install(requirement(clone / "notebooks", monkeypatch), tmp_path / "clone")
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "all"]):
        subprocess.run(["git", "-C", clone, *command], check=True)
    install(requirement(tmp_path, monkeypatch, f"git+file://localhost{clone}"), tmp_path / "git")


@pytest.mark.parametrize("top", ["", "pets/"])
def test_an_uploaded_zip_may_have_a_folder_around_its_classes(top, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("pets.zip", "w") as archive:
        for name in ("cats/1.jpg", "dogs/2.jpg", "dogs/3.jpg"):
            archive.writestr(f"{top}{name}", b"image")
            archive.writestr(f"__MACOSX/{top}{name}", b"notes of macOS")
    colab = types.ModuleType("google.colab")
    colab.files = types.SimpleNamespace(upload=lambda: {"pets.zip": b""})
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    variables = {"Path": Path, "sys": sys, "zipfile": zipfile}
    exec(code_cells()["upload"], variables)
    assert variables["folder"] == Path("pictures") / top
    classes = {path.name: len(list(path.iterdir())) for path in variables["folder"].iterdir()}
    assert classes == {"cats": 1, "dogs": 2}


@pytest.mark.slow
def test_it_runs_without_a_network(tmp_path):
    """From top to bottom, fine-tuning and all."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = execute(notebook, tmp_path, HF_HUB_OFFLINE="1")
    assert all(cell.execution_count for cell in cells.values())
    assert "needs no network" in printed(cells["load"])
    assert printed(cells["load"]).endswith("test_mambaout on 2 x cpu\n")
    for name in ("show", "result"):
        assert any("image/png" in output.get("data", {}) for output in cells[name].outputs), name
    counts = re.findall(r"'([38])': (\d+)", printed(cells["upload"]))
    assert [name for name, _ in counts] == ["3", "8"]
    log = printed(cells["train"])
    assert "2 classes, batches of" in log
    assert "epoch 10/10" in log
    assert float(re.findall(r"best ([\d.]+)%", log)[-1]) > 90
    if "EXECUTED_NOTEBOOK" in os.environ:
        keep(notebook, os.environ["EXECUTED_NOTEBOOK"])


@pytest.mark.slow
def test_it_shows_photographs_with_weights_from_the_hub(tmp_path):
    meta, _ = golden.load("mambaout_femto-timm-224")
    tensors = golden.weights(meta["state_dict"], meta["seed"])
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    repository = {f"timm/{NAME}.in1k": {"model.safetensors": tmp_path / "model.safetensors"}}
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    last = [cell.get("id") for cell in notebook.cells].index("show")
    notebook.cells[last + 1 :] = [nbformat.v4.new_code_cell(CHECK)]
    for cell in notebook.cells:
        cell.source = cell.source.replace('NAME = "mambaout_tiny"', f'NAME = "{NAME}"')
    with serving(HubServer(repository)) as server:
        cells = execute(notebook, tmp_path, HF_ENDPOINT=server.url)
    assert printed(cells["load"]) == f"{NAME} on 2 x cpu\n"
    assert any("image/png" in output.get("data", {}) for output in cells["show"].outputs)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_its_programs_are_lowered_for_each_platform(platform, tmp_path):
    """What the cells compute, the classes and the heat map, for GPUs and TPUs."""
    info = small_weights.INFO
    model, images = info.create_model(depthwise="auto"), np.zeros((1, 32, 32, 3), np.float32)
    params = golden.params(model)
    classify = functools.partial(forward, model=model, preprocessing=info.preprocessing)
    explain = functools.partial(class_activation_map, model=model)
    for traced in (
        jax.jit(classify).trace(params, images.astype(np.uint8)),
        jax.jit(explain).trace(params, images, np.zeros(1, np.int32)),
    ):
        assert traced.lower(lowering_platforms=(platform,)).as_text()


def test_the_notebook_has_no_outputs():
    """None of those of the tests would be of trained weights."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
