"""Eight CPU devices, rank promotion refused, one compilation cache: set before jax starts."""

import atexit
import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# The tests spend their time compiling: code that is not optimised is there in half of it.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
    )
)
# Programs that several tests, or the processes that tests start, have in common compile once.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mambaout_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def no_workers_unless_asked_for(monkeypatch):
    """Tests make few pictures: worker processes, one a core by default, would take longer."""
    monkeypatch.setattr("mambaout_jax.data.prefetch.usable_cores", lambda: 2)
