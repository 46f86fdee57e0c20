"""The test sets of ImageNet's classes that networks are compared by, as TFDS prepares them."""

import dataclasses

from mambaout_jax.data.sources import Dataset, open_source
from mambaout_jax.errors import UserError, did_you_mean
from mambaout_jax.inference.ground_truth import GroundTruthSource
from mambaout_jax.labels import IMAGENET_CLASSES, imagenet_subset


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A test set.

    Attributes:
        dataset: its name in TFDS.
        split: of its images.
        subset: name of the classes that may be predicted, see `imagenet_subset`; "": all.
    """

    dataset: str
    split: str = "test"
    subset: str = ""

    @property
    def classes(self) -> tuple[int, ...] | None:
        """The classes that may be predicted; None: all."""
        return imagenet_subset(self.subset) if self.subset else None

    def open(self, data_dir: str) -> GroundTruthSource:
        """Opens the images.

        Args:
            data_dir: TFDS's folder; "": $TFDS_DATA_DIR.

        Raises:
            UserError: the dataset is not prepared there; says how to prepare it.
        """
        dataset = Dataset(
            kind="tfds",
            name=self.dataset,
            directory=data_dir,
            train_split=self.split,
            eval_split=self.split,
            num_classes=IMAGENET_CLASSES,
        )
        return GroundTruthSource(open_source(dataset, self.split), IMAGENET_CLASSES, self.classes)


BENCHMARKS: dict[str, Benchmark] = {
    "imagenet": Benchmark("imagenet2012", "validation"),
    "v2": Benchmark("imagenet_v2/matched-frequency"),
    "a": Benchmark("imagenet_a", subset="imagenet_a"),
    "r": Benchmark("imagenet_r", subset="imagenet_r"),
    "sketch": Benchmark("imagenet_sketch"),
    "real": Benchmark("imagenet2012_real", "validation"),
}


def find_benchmarks(names: str) -> dict[str, Benchmark]:
    """Returns the test sets of names with commas.

    Raises:
        UserError: a name is unknown; lists the known ones.
    """
    found: dict[str, Benchmark] = {}
    for name in names.split(","):
        if name not in BENCHMARKS:
            raise UserError(
                f"unknown test set {name!r}{did_you_mean(name, BENCHMARKS)} (expected some of "
                f"{','.join(BENCHMARKS)})"
            )
        found[name] = BENCHMARKS[name]
    return found
