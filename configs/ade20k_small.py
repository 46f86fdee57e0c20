"""UperNet on MambaOut-Small, semantic segmentation of ADE20K: the paper's recipe.

    python main.py --config=configs/ade20k_small.py --workdir=DIR --config.data.dir=DIR_OF_ADE20K

See configs/ade20k_tiny.py. Published with this recipe (PyTorch): 49.5% mIoU, 50.6% with several
scales and flips. Not yet run here.
"""

from ml_collections import ConfigDict

from configs import ade20k_tiny


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = ade20k_tiny.get_config()
    config.init_from = "mambaout_small"
    config.model.name = "upernet_mambaout_small"
    config.model.drop_path_rate = 0.4
    return config
