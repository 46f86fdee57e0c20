"""Classifies by the frozen features of a network: kNN and a linear probe."""

import argparse

from mambaout_jax.cli.validate import THREADS
from mambaout_jax.cli.weights_arguments import (
    add_dataset_arguments,
    add_weights_arguments,
    weights_options,
)

SUMMARY = "Measures a network's pooled features on a dataset: kNN and a linear probe."
EXAMPLE = "--weights=mambaout_tiny --data=folder --data-dir=pets"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    add_dataset_arguments(parser)
    parser.add_argument(
        "--train-split",
        help="default: train; of a folder without splits the first four fifths of each class",
    )
    parser.add_argument(
        "--split",
        help="to classify; default: validation, of a folder also val, test or the last fifth",
    )
    parser.add_argument(
        "--k", type=int, default=20, help="nearest neighbours that vote (default: 20)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.07,
        help="a neighbour of cosine similarity s votes with exp(s / temperature) (default: 0.07)",
    )
    parser.add_argument(
        "--c",
        type=float,
        default=1.0,
        help="of the linear probe: inverse strength of the L2 penalty, as scikit-learn's C "
        "(default: 1)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=256, help="images in a step (default: 256)"
    )
    add_weights_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the accuracies of both."""
    from mambaout_jax.errors import UserError
    from mambaout_jax.runtime.memory import memory_for
    from mambaout_jax.runtime.processes import joined

    options = weights_options(args)
    for name in ("k", "temperature", "c", "batch_size"):
        if not getattr(args, name) > 0:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} is {getattr(args, name)}: expected a number above 0")
    with (
        joined(),
        memory_for(
            lambda reason: (
                f"not enough memory for the features and {args.batch_size} images a step "
                f"({reason}): try a smaller --batch-size, or more devices"
            )
        ),
    ):
        return _measure(args, options)


def _measure(args: argparse.Namespace, options: dict) -> int:
    import jax
    import jax.numpy as jnp

    from mambaout_jax.data.folder import find_splits
    from mambaout_jax.data.loader import EvalBatches, LoaderOptions
    from mambaout_jax.data.sources import Dataset, open_source
    from mambaout_jax.errors import UserError
    from mambaout_jax.inference.features import extract
    from mambaout_jax.inference.knn import knn_accuracy
    from mambaout_jax.inference.linear_probe import fit, probe_accuracy
    from mambaout_jax.runtime.processes import all_or_none, check_alike
    from mambaout_jax.runtime.sharding import make_mesh
    from mambaout_jax.weights.load import read_weights

    check_alike(options=str({key: value for key, value in vars(args).items() if key != "data_dir"}))
    mesh = make_mesh()
    batch_size = -(-args.batch_size // mesh.size) * mesh.size
    with all_or_none():
        params, info = read_weights(**options)
        info.check_task("classification", "its backbone's weights have features")
        folder = args.data == "folder"
        splits = (args.train_split or "train", args.split or "validation")
        if folder and args.train_split is None and args.split is None:
            splits = find_splits(args.data_dir)
        dataset = Dataset(
            kind="folder" if folder else "tfds",
            name="" if folder else args.data,
            directory=args.data_dir,
            train_split=splits[0],
            eval_split=splits[1],
            num_classes=None,
        )
        sources = [open_source(dataset, split) for split in splits]
        if lists := [source.name for source in sources if source.label_shape]:
            raise UserError(f"{lists[0]} has lists of right classes: expected one for each image")
    model = info.create_model(dtype=jnp.dtype(args.dtype))
    process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    loader = LoaderOptions(workers=-1, threads=THREADS, backend="auto")
    train, evaluation = (
        extract(
            model,
            params,
            EvalBatches(
                source, info.preprocessing, batch_size=batch_size, loader=loader, **process
            ),
            batch_size,
            info.preprocessing,
            mesh,
        )
        for source in sources
    )
    num_classes = sources[0].num_classes
    neighbours = knn_accuracy(
        train, evaluation, num_classes, mesh, k=args.k, temperature=args.temperature
    )
    linear = probe_accuracy(fit(train, num_classes, mesh, c=args.c), evaluation)
    if jax.process_index() == 0:
        print(
            f"{args.weights}: {train.values.shape[-1]} features, {len(sources[0]):,} images of "
            f"{sources[0].name} for {len(sources[1]):,} of {sources[1].name}"
        )
        print(f"kNN, k = {args.k}: top-1 {neighbours:.3f}%")
        print(f"linear probe, C = {args.c:g}: top-1 {linear:.3f}%")
    return 0
