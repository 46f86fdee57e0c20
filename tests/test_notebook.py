"""The notebook runs from top to bottom on a CPU, with a local server for the hub."""

import copy
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import golden
import jax
import numpy as np
import pytest
from hub_server import HubServer, serving
from safetensors.numpy import save_file

import mambaout_jax
from mambaout_jax.data.preprocess import normalize
from mambaout_jax.labels import imagenet_names

nbclient = pytest.importorskip("nbclient", reason="the notebook is run by nbclient (extra: test)")
nbformat = pytest.importorskip("nbformat", reason="the notebook is read by nbformat (extra: test)")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "inference.ipynb"
NAME = "mambaout_femto.in1k"
NOTE = """*Run by the tests on two CPU devices, with a local server for the hub and random weights:
labels, probabilities and times mean nothing.*"""
CHECK = 'import sys; assert not {"tensorflow", "torch"} & sys.modules.keys()'


def printed(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def keep(notebook, path):
    """Writes the executed notebook with a note, without warnings, and with images only as JPEG."""
    shown = copy.deepcopy(notebook)
    shown.cells[-1:] = []
    shown.cells.insert(0, nbformat.v4.new_markdown_cell(NOTE, id="note"))
    for cell in shown.cells[1:]:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        for output in cell.get("outputs", []):
            if "image/jpeg" in output.get("data", {}):
                output.data.pop("image/png")
    nbformat.write(shown, path)


@pytest.fixture(scope="module")
def tensors():
    meta, _ = golden.load("mambaout_femto-timm-224")
    return golden.weights(meta["state_dict"], meta["seed"])


@pytest.fixture(scope="module")
def executed(tensors, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    save_file(tensors, home / "model.safetensors", metadata={"format": "pt"})
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(CHECK))
    server = HubServer({f"timm/{NAME}": {"model.safetensors": home / "model.safetensors"}})
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    with serving(server):
        environment |= {
            "HF_HOME": str(home / "hub"),
            "HF_ENDPOINT": server.url,
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        }
        client = nbclient.NotebookClient(
            notebook, timeout=300, resources={"metadata": {"path": str(home)}}
        )
        client.execute(env=environment)
    assert any(path.endswith("model.safetensors") for _, path, *_ in server.requests)
    if "EXECUTED_NOTEBOOK" in os.environ:
        keep(notebook, os.environ["EXECUTED_NOTEBOOK"])
    return notebook


def test_the_first_cell_installs_a_wheel_of_a_clone_that_works(tmp_path):
    """It looks for a wheel in its folder, or takes the clone around it."""
    first = nbformat.read(NOTEBOOK, as_version=4).cells[1].source
    pattern = re.search(r'glob\("(.+?)"\), default="(.+?)"', first)
    assert (NOTEBOOK.parent / pattern[2]).resolve() == ROOT
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "main.py"):
        shutil.copy(ROOT / name, clone)
    for name in ("mambaout_jax", "configs"):
        shutil.copytree(ROOT / name, clone / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
    wheel = [*pip, "wheel", "--no-deps", *isolation, f"--wheel-dir={tmp_path}", str(clone)]
    subprocess.run(wheel, check=True)
    (file,) = tmp_path.glob(pattern[1])
    subprocess.run([*pip, "install", "--no-deps", "--target", tmp_path / "site", file], check=True)
    code = (
        "import mambaout_jax.labels as labels; print(labels.__file__, labels.imagenet_names()[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"{tmp_path}/site/mambaout_jax/labels/__init__.py tench, Tinca tinca\n"


@pytest.mark.slow
def test_every_cell_ran_over_both_devices(executed):
    cells = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    assert printed(cells[1]).startswith("2 cpu")
    assert "images/s on 2 x cpu" in printed(cells[-2])


@pytest.mark.slow
def test_its_predictions_are_the_models(executed, tensors):
    (cell,) = (cell for cell in executed.cells if "sklearn.datasets.images" in cell.source)
    lines = printed(cell).splitlines()
    assert [lines[0], lines[6]] == ["china.jpg", "flower.jpg"]
    from sklearn import datasets

    photograph = Path(datasets.__file__).parent / "images" / "china.jpg"
    preprocessing = mambaout_jax.preprocessing(NAME)
    image = mambaout_jax.preprocess_image(photograph, preprocessing)
    model = mambaout_jax.create_model("mambaout_femto", depthwise="xla")
    params = mambaout_jax.from_torch(tensors, model)
    pixels = normalize(image[None], preprocessing.mean, preprocessing.std)
    want = np.asarray(jax.nn.softmax(jax.jit(model.apply)({"params": params}, pixels)))[0]
    shown = {line[11:]: float(line.split("%")[0]) / 100 for line in lines[1:6]}
    names = imagenet_names()
    for label, probability in shown.items():  # bfloat16 against float32
        assert probability == pytest.approx(want[names.index(label)], rel=0.2)
    assert names[int(want.argmax())] in shown


def test_the_notebook_has_no_outputs():
    """None of those of the tests would be of trained weights."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
