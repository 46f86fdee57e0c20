"""MambaOut-Base-Plus on ImageNet-12k, from which timm's best MambaOut is fine-tuned.

    python main.py --config=configs/in12k.py --workdir=DIR --config.data.dir=FOLDER

FOLDER has train/SYNSET/IMAGE for the 11,821 classes of timm's list (imagenet12k_synsets.txt), a
part of the full ImageNet's. TFDS has no builder of ImageNet-12k, -21k or -22k: the images are read
from class folders, or, with --config.data.source=tfds --config.data.name=NAME, from a dataset in
ArrayRecord form that you wrote with a builder of your own. One image of a hundred of each class is
kept for evaluation.

150 epochs at 224 pixels, as the weights' name says (mambaout_base_plus_rw.sw_e150_in12k). The rest
of their recipe is not known here: it is the paper's, with a shorter warmup and less drop path.
Fine-tune on ImageNet-1k with --config=configs/base.py --config.model.name=mambaout_base_plus_rw
--config.init_from=DIR. Not run here.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = default.get_config()
    config.model.name = "mambaout_base_plus_rw"
    config.model.drop_path_rate = 0.4

    config.data.source = "folder"
    config.data.train_split = "train[:99%]"
    config.data.eval_split = "train[99%:]"
    config.data.num_classes = 11_821

    config.schedule.duration = "150 epochs"
    config.schedule.warmup = "5 epochs"
    config.schedule.cooldown = ""
    config.eval.every = "1 epochs"
    return config
