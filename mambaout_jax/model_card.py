"""The model card of a repository on the hub, and the command that trains a run again."""

import math
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mambaout_jax import config as configuration
from mambaout_jax.cli.train import shipped_folder
from mambaout_jax.weights.info import WeightsInfo

CURVES, METRICS, RUN_CONFIG = "curves.png", "metrics.csv", "run_config.json"

_CARD = """---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
- mambaout
- jax
---

# {title}

MambaOut ([Yu and Wang, CVPR 2025](https://arxiv.org/abs/2405.07992)), trained
or converted by mambaout_jax.

| | |
|---|---|
{table}

```python
model, params = mambaout_jax.load_pretrained("hf-hub:{name}")
```

```python
model = timm.create_model("hf-hub:{name}", pretrained=True)
```
{run}"""


def model_card(
    name: str,
    info: WeightsInfo,
    shapes: Mapping[Any, tuple[int, ...]],
    *,
    command: str = "",
    curves: bool = False,
) -> str:
    """Returns README.md.

    Args:
        name: "owner/name".
        info: what the weights are.
        shapes: of their parameters.
        command: that trains them again; "" if unknown.
        curves: whether curves.png lies beside it.
    """
    preprocessing = info.preprocessing
    height, width = preprocessing.shape
    rows = {
        "architecture": info.model,
        "parameters": f"{sum(math.prod(shape) for shape in shapes.values()):,}",
        "classes": f"{info.num_classes:,}",
        "input": f"{height} x {width} pixels, {preprocessing.interpolation}, "
        f"{preprocessing.crop_mode} crop of {preprocessing.crop_pct:g}",
    }
    names = {
        "top1": "top-1",
        "top5": "top-5",
        "loss": "evaluation loss",
        "examples": "evaluation images",
    }
    for key, value in info.metrics.items():
        percent = "%" if key.startswith("top") else ""
        rows[names.get(key, key)] = (
            f"{value:,.4g}{percent}" if percent or value < 1000 else f"{value:,.0f}"
        )
    run = ""
    if command:
        run += f"\nThe command that trains it:\n\n```\n{command}\n```\n"
    if curves:
        run += f"\n![The run's curves]({CURVES})\n"
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return _CARD.format(title=name.split("/")[1], name=name, table=table, run=run)


def run_command(record: Mapping[str, Any]) -> str:
    """Returns the command for a run's record: the nearest config that ships, and what differs.

    "" without the shipped configs, as in an editable install whose checkout is gone.
    """
    folder = shipped_folder()
    free = tuple(configuration.FREE_KEYS)
    best: tuple[str, dict[str, Any]] | None = None
    for path in sorted((folder / "configs").glob("*.py")):
        if path.stem == "__init__":
            continue
        theirs = configuration.flatten(_load(path, folder))
        differing = {
            key: value
            for key, value in record.items()
            if key in theirs and value != theirs[key] and not key.startswith(free)
        }
        if best is None or len(differing) < len(best[1]):
            best = path.stem, differing
    if best is None:
        return ""
    changes = [shlex.quote(f"--config.{key}={_text(value)}") for key, value in best[1].items()]
    return " ".join(["mambaout-jax train", f"--config={best[0]}", "--workdir=DIR", *changes])


def _load(path: Path, folder: Path) -> Any:
    """Loads a config, which may import `configs.default`."""
    sys.path.insert(0, str(folder))
    try:
        return configuration.load_config(path)
    finally:
        sys.path.remove(str(folder))


def _text(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, list) else str(value)
