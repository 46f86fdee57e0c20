"""Prepares the dataset in this package again: `python -m mambaout_jax.data.digits`.

Needs scikit-learn and importlib_resources; writes mambaout_jax/data/digits/<version>.
"""

import shutil
from pathlib import Path

from mambaout_jax.data.digits.digits_dataset_builder import Builder

if __name__ == "__main__":
    version = Path(__file__).parent / str(Builder.VERSION)
    shutil.rmtree(version, ignore_errors=True)
    builder = Builder(data_dir=str(version.parents[1]), file_format="array_record")
    builder.download_and_prepare()
    print(f"{version}: {dict((name, s.num_examples) for name, s in builder.info.splits.items())}")
