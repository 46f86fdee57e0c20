"""Training and evaluation batches of a configuration, as a run builds them."""

from mambaout_jax import build_data
from mambaout_jax.data.loader import EvalBatches, TrainBatches


def train_batches(config, **process):
    """Returns the training batches of a configuration."""
    return TrainBatches(
        build_data.build_dataset(config),
        build_data.build_augmentation(config),
        batch_size=config.batch_size,
        seed=config.seed,
        repeats=config.augment.repeats,
        max_bad_fraction=config.augment.max_bad_fraction,
        loader=build_data.build_loader_options(config),
        **process,
    )


def eval_batches(config, **process):
    """Returns the evaluation batches of a configuration."""
    return EvalBatches(
        build_data.build_dataset(config),
        build_data.build_preprocessing(config),
        batch_size=config.eval.batch_size,
        loader=build_data.build_loader_options(config),
        **process,
    )
