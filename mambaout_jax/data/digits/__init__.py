"""The dataset that ships with the package: scikit-learn's handwritten digits, as TFDS."""
