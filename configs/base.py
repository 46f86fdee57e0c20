"""MambaOut-Base on ImageNet-1k, the paper's recipe.

    python main.py --config=configs/base.py --workdir=DIR --config.data.dir=DIR_OF_TFDS_DATA

Published with this recipe (PyTorch): 84.19% top-1 at 224 pixels. Not yet run to the end here.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = default.get_config()
    config.model.name = "mambaout_base"
    config.model.drop_path_rate = 0.6
    return config
