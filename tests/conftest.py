"""Eight CPU devices, strict rank promotion, one compilation cache, and no silent skips in CI.

Environment variables are set before jax is imported.
"""

import atexit
import os
import shutil
import tempfile

from compiler_flags import FAST_COMPILATION

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        FAST_COMPILATION,
    )
)
# A program that several tests need, or the processes that they start, is compiled once.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="mambaout_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# What no package can provide: a skip for one of these reasons is always allowed.
NOT_INSTALLABLE = ("needs an accelerator", "needs the open network")


def pytest_addoption(parser):
    parser.addoption(
        "--no-skips",
        action="store_true",
        help=f"fail tests that are skipped for any reason but {' or '.join(NOT_INSTALLABLE)}",
    )
    parser.addoption(
        "--skipped-to", metavar="FILE", help="write the skipped tests to a file: pytest @FILE"
    )


class NoSkips:
    """Turns a skip into a failure, so that a missing package cannot hide a test."""

    @staticmethod
    def refuse(report):
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            if not any(allowed in str(reason) for allowed in NOT_INSTALLABLE):
                report.outcome = "failed"
                report.longrepr = f"{report.nodeid}: {reason} (--no-skips)"
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self):
        return self.refuse((yield))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        return self.refuse((yield))


class SkippedTo:
    """Writes the node ids of skipped tests and modules, one a line."""

    def __init__(self, path):
        self.path, self.ids = path, set()

    def pytest_runtest_logreport(self, report):
        if report.skipped and not hasattr(report, "wasxfail"):
            self.ids.add(report.nodeid)

    pytest_collectreport = pytest_runtest_logreport

    def pytest_sessionfinish(self):
        with open(self.path, "w", encoding="utf-8") as file:
            file.writelines(f"{name}\n" for name in sorted(self.ids))


def pytest_configure(config):
    if config.getoption("--no-skips"):
        config.pluginmanager.register(NoSkips())
    if config.getoption("--skipped-to") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(SkippedTo(config.getoption("--skipped-to")))


@pytest.fixture(autouse=True)
def no_workers_unless_asked_for(monkeypatch):
    """Tests make few images: worker processes, by default one a core, would take longer."""
    monkeypatch.setattr("mambaout_jax.data.parallel.usable_cores", lambda: 2)
