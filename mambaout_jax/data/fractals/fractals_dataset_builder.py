"""TFDS builder of the fractals."""

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from mambaout_jax.data.fractals.images import SIZE
from mambaout_jax.data.fractals.making import Plan, class_name, make_files

_DESCRIPTION = """
Attractors of random iterated function systems, drawn in random colours over a gradient and a faint
attractor of another system. A class is one system; its images vary the parameters. Made by
mambaout_jax.data.fractals, from formulas alone.
"""
_CITATION = """
@inproceedings{kataoka2020pretraining,
  author = {Kataoka, Hirokatsu and Okayasu, Kazushige and Matsumoto, Asato and Yamagata, Eisuke and
            Yamada, Ryosuke and Inoue, Nakamasa and Nakamura, Akio and Satoh, Yutaka},
  title = {Pre-training without Natural Images},
  booktitle = {Asian Conference on Computer Vision (ACCV)},
  year = {2020}
}
"""


class Builder(tfds.core.GeneratorBasedBuilder):
    """Splits: `train` and `validation`."""

    name = "fractals"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012

    # No checksums: nothing is downloaded. TFDS needs importlib_resources to look for them.
    url_infos: ClassVar[dict] = {}

    def __init__(self, *, plan: Plan, **options: Any):
        """Takes what is to be made, and the options of TFDS."""
        self._plan = plan
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        names = [class_name(label) for label in range(self._plan.classes)]
        return tfds.core.DatasetInfo(
            builder=self,
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIZE, SIZE, 3), encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=names),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://hirokatsukataoka16.github.io/Pretraining-without-Natural-Images/",
            citation=_CITATION,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterable]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in self._plan.images}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict]]:
        """Yields the images of a split."""
        for name, label, file in make_files(self._plan, split):
            yield name, {"image": file, "label": label, "file_name": name}
