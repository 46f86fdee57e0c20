"""MambaOut-Base-Plus on the full ImageNet (ImageNet-21k, or -22k): 21,841 classes.

    python main.py --config=configs/in21k.py --workdir=DIR --config.data.dir=FOLDER

FOLDER has train/SYNSET/IMAGE for each class of the release of fall 2011. That of winter 2021 has
fewer: --config.data.num_classes=0 counts the folders. As configs/in12k.py in everything else,
also in what TFDS lacks. Not run here.
"""

from ml_collections import ConfigDict

from configs import in12k


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = in12k.get_config()
    config.data.num_classes = 21_841
    config.schedule.duration = "90 epochs"
    return config
