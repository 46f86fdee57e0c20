"""UperNet on a very small MambaOut: shapes, images with masks that one command makes.

    python -m mambaout_jax.data.shapes --output=DIR
    python main.py --config=configs/shapes.py --workdir=runs/shapes --config.data.dir=DIR

Minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from configs import ade20k_tiny


def get_config() -> ConfigDict:
    """Returns the configuration."""
    config = ade20k_tiny.get_config()
    config.init_from = ""
    config.model.name = "upernet_test_mambaout"
    config.model.drop_path_rate = 0.0
    config.model.head_dropout_rate = 0.0
    config.model.dtype = "float32"
    config.segmentation.channels = 32

    config.data.source = "tfds"
    config.data.name = "shapes"
    config.data.train_split = "train"
    config.data.eval_split = "validation"
    config.data.num_classes = 7
    config.data.reduce_zero_label = False
    config.data.image_size = 96
    config.data.workers = 0  # such small images load faster than processes start

    config.segmentation.ratio_range = (0.75, 1.5)
    config.segmentation.cat_max_ratio = 1.0  # most of an image is background

    config.batch_size = 16
    config.schedule.learning_rate = 2e-3
    config.schedule.duration = "20 epochs"
    config.schedule.warmup = "1 epochs"
    config.eval.batch_size = 16
    config.eval.every = "5 epochs"
    config.checkpoint.every = "1 epochs"
    config.log.every = "10 steps"
    return config
