"""The documentation builds without warnings, and everything that it names exists."""

import re
from pathlib import Path

import pytest

from configs import default
from mambaout_jax.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = {page.name: page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))}


def test_the_site_builds_without_warnings(tmp_path):
    mkdocs = pytest.importorskip("mkdocs", reason="mkdocs builds the site (extra: test)")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"))
    assert config.strict, f"mkdocs {mkdocs.__version__} turns warnings into errors when strict"
    build(config)
    for page in PAGES:
        name = "index.html" if page == "index.md" else f"{Path(page).stem}/index.html"
        assert (tmp_path / "site" / name).exists()


@pytest.mark.parametrize("page", PAGES)
def test_files_commands_and_options_exist(page):
    text = PAGES[page]
    roots = "mambaout_jax|configs|examples|tests|benchmarks|notebooks|demo|tools|docs"
    for path in re.findall(rf"(?<![\w/.-])((?:{roots})/[\w/-]+\.\w+)", text):
        assert (ROOT / path).exists(), path
    for command in re.findall(r"python -m mambaout_jax (\w+)", text):
        assert command in COMMANDS
    for key in re.findall(r"--config\.([\w.]+)=", text):
        node = default.get_config()
        for part in key.split("."):
            assert part in node, key
            node = node[part]


def test_the_loader_that_is_shown_is_the_examples():
    code = (ROOT / "examples" / "run_exported.py").read_text()
    loader = code[code.index("def load(") : code.index("\n\n\nif __name__")]
    assert loader in PAGES["using.md"]
