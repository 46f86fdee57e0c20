"""The structure of the package: imports point one way, and light parts stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path("mambaout_jax")
# Folders and top-level files. Each may import from its own rank and from those above it here.
RANKS = (
    ("errors", "version"),
    ("bucket", "files", "labels", "ops"),
    ("runtime",),
    ("data",),
    ("models",),
    ("weights",),
    ("inference",),
    ("training",),
    ("config",),
    ("build", "build_data", "evaluate_run"),
    ("planning",),
    ("cli", "__main__", "__init__", "push", "model_card", "finetune"),
)


def module_of(path):
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def rank(module):
    part = [*module.split("."), "__init__"][1]
    (index,) = (index for index, parts in enumerate(RANKS) if part in parts)
    return index


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


def test_every_folder_and_file_has_one_rank():
    parts = [part for parts in RANKS for part in parts]
    there = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert sorted(parts) == sorted(there - {"__pycache__"})


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    for imported in imports(MODULES[module]):
        if imported in MODULES:
            assert rank(imported) <= rank(module), f"{module} imports {imported}"


def test_there_is_no_utils_file():
    assert not [path for path in Path().glob("*/**/*util*.py") if "site-packages" not in path.parts]


def test_the_package_imports_with_jax_and_flax_alone():
    code = (
        "import sys, mambaout_jax, jax.numpy as jnp\n"
        "model = mambaout_jax.create_model('test_mambaout')\n"
        "import jax; jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))\n"
        "print([name for name in sys.argv[1:] if name in sys.modules])\n"
    )
    names = ("tensorflow", "torch", "tensorflow_datasets", "grain", "PIL", "matplotlib",
             "tensorboardX", "huggingface_hub", "safetensors", "ml_collections", "clu")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_command_handles_signals_before_it_imports_jax():
    """main.py does that; `mambaout-jax train` imports nothing slow until it starts main.py."""
    code = "import sys, mambaout_jax.__main__; print('jax' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
