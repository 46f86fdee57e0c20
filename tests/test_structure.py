"""The house itself: imports point one way, and the light parts stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path("mambaout_jax")
# A module may import from its own rank and from those before it.
RANKS = (
    ("errors",),
    ("training.processes",),
    ("config", "ops", "labels"),
    ("data",),
    ("models",),
    ("weights",),
    ("training.workdir", "training.interruption", "training.compilation", "training.skipping"),
    ("training.sharding", "training.state", "training.schedule", "training.optimizer"),
    ("training.step", "training.goodput", "training.profiler"),
    ("training.build", "training.checkpoint", "training.losses"),
    ("training.progress", "training.recorder"),
    ("planning",),
    ("evaluation", "evidence", "ground_truth", "prediction", "export", "validation"),
    ("training.loop",),
    ("cli", "__main__", ""),
)


def rank(module):
    name = module.removeprefix("mambaout_jax").removeprefix(".")
    for index, prefixes in enumerate(RANKS):
        if any(name == prefix or (prefix and name.startswith(f"{prefix}.")) for prefix in prefixes):
            return index
    return None


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def module_of(path):
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    own = rank(module)
    if module in ("mambaout_jax.training",):
        return
    assert own is not None, f"{module} has no rank: say where it stands"
    for imported in imports(MODULES[module]):
        if imported in MODULES and imported not in ("mambaout_jax", "mambaout_jax.training"):
            assert rank(imported) <= own, f"{module} imports {imported}"


def test_there_is_no_drawer():
    assert not [path for path in Path().glob("*/**/*util*.py") if "env" not in str(path)]


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
