"""The compiled programs that a restarted run finds again."""

import os
from pathlib import Path

import jax
from ml_collections import ConfigDict


def use_compilation_cache(config: ConfigDict) -> None:
    """Keeps compiled programs in the folder that the configuration names.

    "auto" is what JAX_COMPILATION_CACHE_DIR names, else a folder of the user's cache.
    """
    folder = config.compilation_cache
    if folder == "auto":
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(home / "mambaout_jax" / "xla")
    jax.config.update("jax_compilation_cache_dir", folder or None)
